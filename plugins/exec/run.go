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

// limits are the limits of one start.
type limits struct {
	time   time.Duration
	output int // bytes, of standard output and of standard error each
}

// grace is the wait for a pipe that another process still holds after the plugin has exited.
const grace = 250 * time.Millisecond

// maxProgram is the size limit of a program in bytes.
const maxProgram = 256 << 20

var (
	errTime   = errors.New("it exceeded its time limit")
	errOutput = errors.New("it exceeded its output limit")
	errSum    = errors.New("the program is not the configured one: its checksum differs")
)

// run starts a verified copy of the program with in as its standard input. It returns the standard output once the
// program has exited and its process group was killed. Errors contain nothing of the output.
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
	discarded := &limited{left: l.output, full: full}

	cmd := osexec.CommandContext(ctx, image.path)
	cmd.Args = append([]string{p.Path}, p.Args...)
	cmd.Env = append([]string{}, p.Env...) // nil would pass on our own environment
	if cmd.Dir = p.Dir; cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.ExtraFiles = image.files
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, discarded
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	kill := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Cancel, cmd.WaitDelay = kill, grace
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting it: %w", err)
	}
	err = cmd.Wait()
	_ = kill() // processes left in the group; usually there are none, and the kill fails
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	var exit *osexec.ExitError
	switch {
	case errors.Is(err, osexec.ErrWaitDelay):
		return nil, errors.New("it left a process behind that holds its output")
	case errors.As(err, &exit):
		return nil, fmt.Errorf("%s, with %d bytes on standard error", exit.ProcessState, discarded.seen)
	case err != nil:
		return nil, errors.New("running it")
	}
	return out.kept.Bytes(), nil
}

// limited receives a process's output up to a limit. One goroutine of os/exec writes to it.
type limited struct {
	keep bool // false: count only
	left int
	full func() // called beyond the limit

	kept bytes.Buffer
	seen int
}

// Write never fails. Beyond the limit, full stops the process.
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

// image is an immutable copy of a program.
type image struct {
	path  string     // to execute
	files []*os.File // must be open in the process
	close func()
}

// verify copies the program and checks the copy's checksum. The copy is executed, so a later change of the file has no
// effect.
func (p Program) verify() (*image, error) {
	src, err := os.OpenFile(p.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // do not block if it is a FIFO
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
