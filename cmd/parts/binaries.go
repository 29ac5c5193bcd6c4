package parts

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	modulePath       = "github.com/pawlsec/pawl"
	progressInterval = 5 * time.Second
)

// Binaries finds the servers that are Go programs, on PATH or in a cache. If the machine has neither, it builds them
// once from the modules beside this package (about five minutes each on two cores). The zero value does all of that.
// Several processes may use it at once; a build waits for another one.
type Binaries struct {
	// Cache is the directory of built servers. Empty is $PAWL_PARTS, or pawl/parts in the user's cache directory.
	Cache string
	// Source is the root of Pawl's source tree. Empty searches from the working directory upwards. Without one the server
	// that was built last is taken.
	Source string
	// NoBuild returns ErrMissing instead of building.
	NoBuild bool
	// Progress receives the progress of a build every few seconds. Nil is os.Stderr.
	Progress io.Writer
}

// recipe is a separate module that builds servers.
type recipe struct {
	name     string // for people
	dir      string // below cmd/parts
	packages []string
	programs []string // the build's output in the cache
	needsC   string   // why a C compiler is needed; empty if none is
}

func vaultRecipe() recipe {
	return recipe{name: "Vault", dir: "vaultserver", packages: []string{"."}, programs: []string{"vaultserver"}}
}

func spireRecipe() recipe {
	const prefix = "github.com/spiffe/spire/cmd/"
	return recipe{
		name:     "SPIRE",
		dir:      "spire",
		packages: []string{prefix + "spire-server", prefix + "spire-agent"},
		programs: []string{"spire-server", "spire-agent"},
		needsC:   "its datastore is SQLite",
	}
}

// Vault returns the path of a Vault server. official is true for a `vault` or `bao` on PATH, which takes a
// configuration file. It is false for the server built here, which takes flags.
func (b Binaries) Vault(ctx context.Context) (path string, official bool, err error) {
	for _, name := range []string{"vault", "bao"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, true, nil
		}
	}
	dir, err := b.built(ctx, vaultRecipe())
	if err != nil {
		return "", false, err
	}
	return filepath.Join(dir, "vaultserver"), false, nil
}

// SPIRE returns the paths of SPIRE's server and agent.
func (b Binaries) SPIRE(ctx context.Context) (server, agent string, err error) {
	server, serverErr := exec.LookPath("spire-server")
	agent, agentErr := exec.LookPath("spire-agent")
	if serverErr == nil && agentErr == nil {
		return server, agent, nil
	}
	dir, err := b.built(ctx, spireRecipe())
	if err != nil {
		return "", "", err
	}
	return filepath.Join(dir, "spire-server"), filepath.Join(dir, "spire-agent"), nil
}

// built returns the directory of the recipe's programs. It builds them if necessary.
func (b Binaries) built(ctx context.Context, r recipe) (string, error) {
	cache, err := b.cache()
	if err != nil {
		return "", err
	}
	source, err := b.source()
	if err != nil {
		if dir := newest(cache, r); dir != "" {
			return dir, nil
		}
		return "", missing(r.name, err.Error())
	}
	module := filepath.Join(source, "cmd", "parts", r.dir)
	key, err := moduleKey(module)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, r.dir+"-"+key)
	if complete(dir, r) {
		return dir, nil
	}
	if b.NoBuild {
		return "", missing(r.name, "build it with `make parts`, which takes about five minutes once")
	}
	return dir, b.build(ctx, r, module, dir)
}

// newest returns the directory of the recipe's programs that was built last, for a machine without the source; empty if
// there is none.
func newest(cache string, r recipe) (dir string) {
	var last time.Time
	all, _ := filepath.Glob(filepath.Join(cache, r.dir+"-*")) // an error is of the pattern, which is a constant
	for _, found := range all {
		if info, err := os.Stat(found); err == nil && complete(found, r) && info.ModTime().After(last) {
			dir, last = found, info.ModTime()
		}
	}
	return dir
}

func (b Binaries) cache() (string, error) {
	if b.Cache != "" {
		return b.Cache, nil
	}
	if dir := os.Getenv("PAWL_PARTS"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding the cache (PAWL_PARTS names one): %w", err)
	}
	return filepath.Join(dir, "pawl", "parts"), nil
}

func (b Binaries) source() (string, error) {
	if b.Source != "" {
		return b.Source, nil
	}
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the source of %s: %w", modulePath, err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(text, []byte("module "+modulePath+"\n")) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("put it on PATH, or run this inside the source tree of %s", modulePath)
		}
	}
}

// moduleKey identifies a build by everything that determines its result.
func moduleKey(module string) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	err := filepath.WalkDir(module, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		fmt.Fprintf(sum, "%s %d\n%s", filepath.Base(path), len(text), text)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("reading module %s: %w", module, err)
	}
	return hex.EncodeToString(sum.Sum(nil))[:16], nil
}

func complete(dir string, r recipe) bool {
	for _, program := range r.programs {
		if _, err := os.Stat(filepath.Join(dir, program)); err != nil {
			return false
		}
	}
	return true
}

// build compiles into a scratch directory and renames it, so that dir is either complete or absent.
func (b Binaries) build(ctx context.Context, r recipe, module, dir string) (err error) {
	if err := b.buildable(ctx, r); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("creating the cache: %w", err)
	}
	unlock, err := b.lock(ctx, filepath.Join(filepath.Dir(dir), "lock"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if complete(dir, r) {
		return nil // another process built it while we waited
	}
	scratch, err := os.MkdirTemp(filepath.Dir(dir), "building-")
	if err != nil {
		return fmt.Errorf("creating a directory to build in: %w", err)
	}
	defer func() { _ = os.RemoveAll(scratch) }() // absent after the rename
	if err := b.compile(ctx, r, module, scratch); err != nil {
		return err
	}
	if err := os.Chmod(scratch, 0o755); err != nil {
		return fmt.Errorf("setting the mode of %s: %w", scratch, err)
	}
	if err := os.Rename(scratch, dir); err != nil {
		return fmt.Errorf("installing %s: %w", r.name, err)
	}
	return nil
}

func (b Binaries) buildable(ctx context.Context, r recipe) error {
	if _, err := exec.LookPath("go"); err != nil {
		return missing(r.name, "building it needs the go command")
	}
	if r.needsC == "" {
		return nil
	}
	out, err := exec.CommandContext(ctx, "go", "env", "CGO_ENABLED").Output()
	if err != nil {
		return fmt.Errorf("reading the settings of go: %w", err)
	}
	if strings.TrimSpace(string(out)) != "1" {
		return missing(r.name, r.needsC+", so building it needs a C compiler: apt-get install gcc libc6-dev")
	}
	return nil
}

func (b Binaries) progress() io.Writer {
	if b.Progress != nil {
		return b.Progress
	}
	return os.Stderr
}

// lock waits for an exclusive lock on the file. The system releases it if this process dies.
func (b Binaries) lock(ctx context.Context, path string) (unlock func() error, err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the lock of the cache: %w", err)
	}
	tick := time.NewTicker(progressInterval / 10)
	defer tick.Stop()
	for announced := false; ; announced = true {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return file.Close, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("locking the cache: %w", err), file.Close())
		}
		if !announced {
			fmt.Fprintln(b.progress(), "parts: waiting for another build")
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("waiting for another build: %w", context.Cause(ctx)), file.Close())
		case <-tick.C:
		}
	}
}

// compile runs go build and reports its progress every few seconds.
func (b Binaries) compile(ctx context.Context, r recipe, module, out string) error {
	var log buildLog
	args := append([]string{"build", "-v", "-ldflags=-s -w", "-o", out + string(filepath.Separator)}, r.packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-buildvcs=false")
	cmd.Stdout, cmd.Stderr = &log, &log

	started := time.Now()
	report := func(format string, values ...any) {
		fmt.Fprintf(b.progress(), "parts: "+r.name+": "+format+"\n", values...)
	}
	report("building, about five minutes on two cores the first time")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(progressInterval)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				report("%4.0fs %5d steps", time.Since(started).Seconds(), log.lines.Load())
			}
		}
	}()
	err := cmd.Run()
	close(stop)
	<-stopped
	if err != nil {
		return fmt.Errorf("building %s: %w\n%s", r.name, err, log.tail)
	}
	report("built in %.0fs", time.Since(started).Seconds())
	return nil
}

// buildLog counts lines, one for each module fetched or package compiled, and keeps the last ones.
type buildLog struct {
	lines atomic.Int64
	tail  []byte // written by one goroutine, read after it has ended
}

func (l *buildLog) Write(p []byte) (int, error) {
	l.lines.Add(int64(bytes.Count(p, []byte("\n"))))
	l.tail = append(l.tail, p...)
	if len(l.tail) > tailLength {
		l.tail = l.tail[len(l.tail)-tailLength:]
	}
	return len(p), nil
}
