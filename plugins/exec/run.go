package exec

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	osexec "os/exec"
	"syscall"
	"time"
)

// limits are those of one start.
type limits struct {
	time   time.Duration
	output int // bytes, of standard output and of standard error each
}

// grace is how long a pipe that another process holds is waited for after the plugin has ended.
const grace = 250 * time.Millisecond

// maxProgram is the largest program in bytes.
const maxProgram = 256 << 20

var (
	errTime   = errors.New("it took longer than it may")
	errOutput = errors.New("it wrote more than it may")
	errSum    = errors.New("the program is not the one that was configured: its checksum differs")
)

// run starts a verified copy of the program, hands it in, and gives what it wrote, once it and its
// process group are gone. An error says nothing of what it wrote.
func (p Program) run(ctx context.Context, l limits, in []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, l.time, errTime)
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	image, err := p.verify()
	if err != nil {
		return nil, err
	}
	defer image.close()
	full := func() { stop(errOutput) }
	out := &limited{keep: true, left: l.output, full: full}
	waste := &limited{left: l.output, full: full}

	cmd := osexec.CommandContext(ctx, image.path)
	cmd.Args = append([]string{p.Path}, p.Args...)
	cmd.Env = append([]string{}, p.Env...) // nil would hand over ours
	if cmd.Dir = p.Dir; cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.ExtraFiles = image.files
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, waste
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	kill := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Cancel, cmd.WaitDelay = kill, grace
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting it: %w", err)
	}
	err = cmd.Wait()
	_ = kill() // what it left behind; mostly nothing, which is an error here
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	var exit *osexec.ExitError
	switch {
	case errors.Is(err, osexec.ErrWaitDelay):
		return nil, errors.New("it left a process behind that holds its output")
	case errors.As(err, &exit):
		return nil, fmt.Errorf("%s, with %d bytes on standard error", exit.ProcessState, waste.seen)
	case err != nil:
		return nil, errors.New("running it")
	}
	return out.kept.Bytes(), nil
}

// limited takes what a process writes, up to a limit. One goroutine of os/exec writes to it.
type limited struct {
	keep bool // or count only
	left int
	full func() // called when there is more

	kept bytes.Buffer
	seen int
}

// Write never fails: a full pipe is the kill's business.
func (w *limited) Write(p []byte) (int, error) {
	if w.seen += len(p); len(p) > w.left {
		w.full()
		return len(p), nil
	}
	w.left -= len(p)
	if w.keep {
		w.kept.Write(p)
	}
	return len(p), nil
}

// image is a copy of a program that nobody can change any more.
type image struct {
	path  string     // to execute
	files []*os.File // that the process needs open
	close func()
}

// verify copies the program and compares the copy with the checksum, so that what is executed is
// what was checked, whatever happens to the file.
func (p Program) verify() (*image, error) {
	src, err := os.OpenFile(p.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO in its place must not hang us
	if err != nil {
		return nil, fmt.Errorf("opening the program: %w", err)
	}
	defer func() { _ = src.Close() }() // only read
	if info, err := src.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > maxProgram {
		return nil, errors.New("the program is not a regular file of at most 256 MiB")
	}
	sum := sha256.New()
	im, err := seal(io.TeeReader(io.LimitReader(src, maxProgram), sum))
	if err != nil {
		return nil, fmt.Errorf("copying the program: %w", err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); subtle.ConstantTimeCompare([]byte(got), []byte(p.SHA256)) != 1 {
		im.close()
		return nil, errSum
	}
	return im, nil
}
