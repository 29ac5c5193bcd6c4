package against_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/cmd/bench/against"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// measuring is a program of measurements with the flags of an older one. It writes the rows, and its name to the file
// turns beside the repository.
const measuring = `package main

import (
	"flag"
	"os"
	"path/filepath"
)

func main() {
	root := flag.String("C", ".", "")
	flag.Bool("page", true, "")
	flag.Bool("quick", false, "")
	only := flag.String("only", "", "")
	flag.Parse()
	f, err := os.OpenFile(os.Getenv("TURNS"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	if _, err := f.WriteString("NAME " + *only + "\n"); err != nil {
		panic(err)
	}
	if err := os.MkdirAll(filepath.Join(*root, "build"), 0o700); err != nil {
		panic(err)
	}
	if err := os.WriteFile(filepath.Join(*root, "build", "bench.json"), []byte(` + "`ROWS`" + `), 0o600); err != nil {
		panic(err)
	}
}
`

// waiting is a program of measurements that goes on until it is interrupted.
const waiting = `package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	os.Stderr.WriteString("waiting\n")
	<-stop
}
`

const (
	oldRows = `[{"name": "issue.kv.c64.throughput", "unit": "per second", "ours": 100}, {"name": "gone", "unit": "ms", "ours": 1}]`
	newRows = `[{"name": "issue.kv.c64.throughput", "unit": "per second", "ours": 250}, {"name": "added", "unit": "ms", "ours": 1}]`
)

// repository makes a repository with one commit for each program, and returns its root and the commits by name. The
// newest is checked out.
func repository(t *testing.T) (root string, commits map[string]string) {
	t.Helper()
	root, commits = filepath.Join(t.TempDir(), "repository"), map[string]string{}
	t.Setenv("TURNS", filepath.Join(t.TempDir(), "turns"))
	t.Setenv("GIT_CONFIG_GLOBAL", os.DevNull)
	program := func(name, rows string) string {
		return strings.NewReplacer("NAME", name, "ROWS", rows).Replace(measuring)
	}
	write(t, filepath.Join(root, "go.mod"), "module fixture\n\ngo 1.26\n")
	write(t, filepath.Join(root, ".gitignore"), "/build/\n")
	git(t, root, "init", "--quiet")
	for _, c := range []struct{ name, source string }{
		{"before", ""},
		{"flagless", "package main\n\nimport \"flag\"\n\nfunc main() { flag.Parse() }\n"},
		{"broken", "package main\n\nfunc main() { this does not compile }\n"},
		{"waiting", waiting},
		{"garbage", program("garbage", "nonsense")},
		{"old", program("old", oldRows)},
		{"new", program("new", newRows)},
	} {
		if c.source != "" {
			write(t, filepath.Join(root, "cmd", "bench", "main.go"), c.source)
		}
		git(t, root, "add", ".")
		git(t, root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", c.name)
		commits[c.name] = git(t, root, "rev-parse", "HEAD")
	}
	return root, commits
}

func git(t *testing.T, root string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "git", append([]string{"-C", root}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// clean checks that nothing of the checkout is left.
func clean(t *testing.T, root string) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(root, "build", "against-*")); len(left) > 0 {
		t.Errorf("these are left in build/: %v", left)
	}
	if list := git(t, root, "worktree", "list"); strings.Count(list, "\n") > 0 {
		t.Errorf("git still has the checkout: %s", list)
	}
}

func TestRun(t *testing.T) {
	root, commits := repository(t)
	got, err := against.Run(t.Context(), against.Config{Root: root, Commit: commits["old"][:9], Rounds: 3, Quick: true,
		Only: "^issue$", Log: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	turns, err := os.ReadFile(os.Getenv("TURNS"))
	if want := "new ^issue$\nold ^issue$\nold ^issue$\nnew ^issue$\nnew ^issue$\nold ^issue$\n"; err != nil || string(turns) != want {
		t.Errorf("the turns were\n%s%v, want\n%s", turns, err, want)
	}
	at := slices.IndexFunc(got.Pairs, func(p report.Pair) bool { return p.Name == "issue.kv.c64.throughput" })
	if at < 0 || got.Pairs[at].Ratio == nil || *got.Pairs[at].Ratio != 2.5 || got.Pairs[at].Rounds != 3 {
		t.Errorf("pairs = %+v, want 250 beside 100 in 3 rounds", got.Pairs)
	}
	var table strings.Builder
	got.Table(&table)
	for _, want := range []string{commits["old"][:7] + " does not have: added", "this tree does not have: gone", "×2.50"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, table.String())
		}
	}
	clean(t, root)
}

// TestErrors checks that each error names what to do, and that nothing of the checkout is left after it.
func TestErrors(t *testing.T) {
	root, commits := repository(t)
	shallow := filepath.Join(t.TempDir(), "shallow")
	git(t, root, "clone", "--quiet", "--depth", "1", "file://"+root, shallow)
	for _, row := range []struct {
		name, root, commit string
		rounds             int
		want               []string
	}{
		{"unknown", root, "0123456789", 1, []string{`no commit "0123456789"`, "git log --oneline -- cmd/bench"}},
		{"an option", root, "--all", 1, []string{`no commit "--all"`}},
		{"empty", root, "", 1, []string{`no commit ""`}},
		{"not in a shallow clone", shallow, commits["old"], 1, []string{"shallow", "git fetch --unshallow"}},
		{"no repository", t.TempDir(), "HEAD", 1, []string{"needs git and a clone"}},
		{"before the measurements", root, commits["before"], 1, []string{"has no cmd/bench", "take a later one"}},
		{"does not build", root, commits["broken"], 1, []string{"building cmd/bench of " + commits["broken"][:7], "take a commit that this Go builds"}},
		{"does not know a flag", root, commits["flagless"], 1, []string{commits["flagless"][:7] + " does not know one of the flags -C", "take a later commit"}},
		{"writes no rows", root, commits["garbage"], 1, []string{"the rows of " + commits["garbage"][:7]}},
		{"no rounds", root, commits["old"], 0, []string{"0 rounds", "-rounds"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := against.Run(t.Context(), against.Config{Root: row.root, Commit: row.commit, Rounds: row.rounds, Log: io.Discard})
			for _, want := range row.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error = %v, want one that says %q", err, want)
				}
			}
			clean(t, root)
		})
	}
}

// onWaiting interrupts once the program of a build waits.
type onWaiting struct{ interrupt func() }

func (w onWaiting) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "waiting\n") {
		w.interrupt()
	}
	return len(p), nil
}

func TestInterrupt(t *testing.T) {
	root, commits := repository(t)
	git(t, root, "checkout", "--quiet", commits["waiting"])
	ctx, interrupt := context.WithCancel(t.Context())
	_, err := against.Run(ctx, against.Config{Root: root, Commit: commits["old"], Rounds: 1, Log: onWaiting{interrupt}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v, want that it was interrupted", err)
	}
	clean(t, root)
}
