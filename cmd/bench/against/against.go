// Package against runs the measurements of an older commit and of this tree in turns, and compares their rows.
package against

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/pawlsec/pawl/cmd/bench/report"
)

// Config is one comparison. All fields but Quick and Only are required.
type Config struct {
	Root   string // of the source tree, which is in a git repository
	Commit string // the older one, in any form that git takes
	Rounds int    // each build is run once in each; at least 1
	Quick  bool
	Only   string    // regular expression of the sections; empty: all
	Log    io.Writer // the output of both builds and of go
}

// program is the package of the measurements below the root of a tree.
const program = "cmd/bench"

// Run builds both trees, runs them in turns and compares them. The older commit is checked out below build/ of the
// source tree, so that the ledgers of both are on one disk, and removed at the end, also when ctx is cancelled.
func Run(ctx context.Context, c Config) (cmp report.Comparison, err error) {
	if c.Rounds < 1 {
		return cmp, fmt.Errorf("%d rounds: give 1 or more with -rounds", c.Rounds)
	}
	commit, err := c.resolve(ctx)
	if err != nil {
		return cmp, err
	}
	build := filepath.Join(c.Root, "build")
	if err := os.MkdirAll(build, 0o755); err != nil {
		return cmp, err
	}
	dir, err := os.MkdirTemp(build, "against-")
	if err != nil {
		return cmp, err
	}
	older := side{root: filepath.Join(dir, "tree"), file: filepath.Join(dir, "old"), name: commit[:7]}
	newer := side{root: c.Root, file: filepath.Join(dir, "new"), name: "this tree"}
	defer func() { err = errors.Join(err, c.remove(ctx, dir, older.root)) }()
	if out, err := c.git(ctx, "worktree", "add", "--detach", older.root, commit); err != nil {
		return cmp, fmt.Errorf("checking out %s: %w: %s", older.name, err, out)
	}
	for _, b := range []side{older, newer} {
		if err := c.compile(ctx, b); err != nil {
			return cmp, err
		}
	}
	var rows [2][][]report.Row
	for round := range c.Rounds {
		for _, which := range turns(round) {
			b := []side{newer, older}[which]
			fmt.Fprintf(c.Log, "bench: round %d of %d: %s\n", round+1, c.Rounds, b.name)
			got, err := c.measure(ctx, b)
			if err != nil {
				return cmp, err
			}
			rows[which] = append(rows[which], got)
		}
	}
	return report.Comparison{New: newer.name, Old: older.name, Pairs: report.Compare(rows[0], rows[1])}, nil
}

// turns gives the order of the builds in a round, 0 for the newer one: A B, B A, A B. So neither has the warmer machine.
func turns(round int) [2]int {
	if round%2 == 1 {
		return [2]int{1, 0}
	}
	return [2]int{0, 1}
}

// side is one side: its source tree and its program.
type side struct{ root, file, name string }

// resolve finds the commit and checks that it can be measured.
func (c Config) resolve(ctx context.Context) (commit string, err error) {
	shallow, err := c.git(ctx, "rev-parse", "--is-shallow-repository")
	if err != nil {
		return "", fmt.Errorf("-against needs git and a clone of the repository, and %s is none: %w: %s", c.Root, err, shallow)
	}
	commit, err = c.git(ctx, "rev-parse", "--verify", "--quiet", "--end-of-options", c.Commit+"^{commit}")
	switch {
	case err != nil && shallow == "true":
		return "", fmt.Errorf("there is no commit %q in this clone, which is shallow: run `git fetch --unshallow`", c.Commit)
	case err != nil:
		return "", fmt.Errorf("there is no commit %q in this repository: `git log --oneline -- %s` lists those that can be measured", c.Commit, program)
	}
	if _, err := c.git(ctx, "cat-file", "-e", commit+":"+program); err != nil {
		return "", fmt.Errorf("commit %s has no %s: take a later one; `git log --oneline -- %s` lists them", commit[:7], program, program)
	}
	return commit, nil
}

// git runs git in the source tree and returns its output, without the last newline.
func (c Config) git(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "git", append([]string{"-C", c.Root}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// remove removes the checkout and everything beside it. It also works when ctx has ended.
func (c Config) remove(ctx context.Context, dir, tree string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	_, _ = c.git(ctx, "worktree", "remove", "--force", tree) // it may not be there yet
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing the checkout: %w: remove %s and run `git worktree prune`", err, dir)
	}
	if out, err := c.git(ctx, "worktree", "prune"); err != nil {
		return fmt.Errorf("the checkout is removed, and git still lists it: %w: run `git worktree prune`: %s", err, out)
	}
	return nil
}

func (c Config) compile(ctx context.Context, b side) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", b.file, "./"+program)
	cmd.Dir, cmd.Stdout, cmd.Stderr = b.root, c.Log, c.Log
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // go ends its compilers
	cmd.WaitDelay = time.Minute
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("building %s of %s: %w: its lines above say why; take a commit that this Go builds", program, b.name, err)
	}
	return nil
}

// measure runs a build once and returns its rows.
func (c Config) measure(ctx context.Context, b side) ([]report.Row, error) {
	file := filepath.Join(b.root, "build", "bench.json")
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) { // rows of an earlier turn must not count
		return nil, err
	}
	args := []string{"-C", b.root, "-page=false", "-only", c.Only}
	if c.Quick {
		args = append(args, "-quick")
	}
	cmd := exec.CommandContext(ctx, b.file, args...)
	// An interrupted build stops its servers and removes its files. Its table is not printed: the comparison follows.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	said := &head{}
	cmd.Dir, cmd.Stderr = b.root, io.MultiWriter(c.Log, said)
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil && strings.Contains(said.String(), "flag provided but not defined"):
		return nil, fmt.Errorf("%s does not know one of the flags %s: take a later commit", b.name, strings.Join(args, " "))
	case err != nil:
		return nil, fmt.Errorf("the measurements of %s: %w: its lines above say why", b.name, err)
	}
	rows, err := report.ReadRows(file)
	if err != nil {
		return nil, fmt.Errorf("the rows of %s: %w", b.name, err)
	}
	return rows, nil
}

// head keeps the beginning of an output: a program that misses a flag says so first.
type head struct{ strings.Builder }

func (t *head) Write(p []byte) (int, error) {
	if t.Len() < 4096 {
		t.Builder.Write(p)
	}
	return len(p), nil
}
