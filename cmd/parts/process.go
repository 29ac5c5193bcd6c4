package parts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	startTimeout = time.Minute // a server that is not ready by then will not become ready
	stopTimeout  = 20 * time.Second
	pollInterval = 20 * time.Millisecond
	tailLength   = 2000 // bytes of the log that an error shows
)

// command is a program to run.
type command struct {
	path string
	args []string
	user *syscall.Credential // nil is our own user
}

// process is one run of a server, as the leader of its own process group.
type process struct {
	workdir *workdir
	cmd     *exec.Cmd
	log     string
	exited  chan struct{} // closed when the process has ended and was reaped
}

// start runs c in the directory. Its output is appended to a file there. It inherits only PATH from our environment.
func (n *workdir) start(c command) (*process, error) {
	name := filepath.Base(c.path)
	logFile := n.path(name + ".log")
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", name, err)
	}
	defer func() { _ = log.Close() }() // the child has its own descriptor

	cmd := exec.Command(c.path, c.args...)
	cmd.Dir = n.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + n.dir, "LC_ALL=C"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: c.user}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("running %s: %w", name, err)
	}
	p := &process{workdir: n, cmd: cmd, log: logFile, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // ProcessState has the result
		close(p.exited)
	}()
	if err := n.watch(cmd.Process.Pid); err != nil {
		return nil, errors.Join(err, p.kill())
	}
	return p, nil
}

// ready polls check until it succeeds. If the process ends or the time is up, it fails with the end of the log.
func (p *process) ready(ctx context.Context, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return p.failure(fmt.Errorf("ended: %s", p.cmd.ProcessState))
		case <-ctx.Done():
			return p.failure(fmt.Errorf("not ready: %w (%w)", err, context.Cause(ctx)))
		case <-tick.C:
		}
	}
}

func (p *process) failure(err error) error {
	return fmt.Errorf("%s %w\n%s", filepath.Base(p.cmd.Path), err, p.tail())
}

// tail returns the end of the log.
func (p *process) tail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return fmt.Sprintf("(no log: %v)", err)
	}
	if len(text) > tailLength {
		text = text[len(text)-tailLength:]
	}
	return strings.TrimSpace(string(text))
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// signal sends a signal to the whole process group.
func (p *process) signal(s syscall.Signal) error {
	if err := syscall.Kill(-p.cmd.Process.Pid, s); err != nil {
		return fmt.Errorf("sending %v to %s: %w", s, filepath.Base(p.cmd.Path), err)
	}
	return nil
}

// signalLeader sends a signal to the leader of the group alone, which passes it on as its program wants.
func (p *process) signalLeader(s syscall.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("sending %v to %s: %w", s, filepath.Base(p.cmd.Path), err)
	}
	return nil
}

// pause stops the process and returns when each of its threads has stopped. The signal reaches one thread after the
// other, and the remaining threads continue to answer. Without /proc it does not wait.
func (p *process) pause() error {
	if err := p.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	tasks := fmt.Sprintf("/proc/%d/task/*/stat", p.cmd.Process.Pid)
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
		files, err := filepath.Glob(tasks)
		if err != nil || len(files) == 0 || !slices.ContainsFunc(files, runs) {
			return nil
		}
	}
	return fmt.Errorf("%s does not stop", filepath.Base(p.cmd.Path))
}

// runs reports whether the thread of a stat file in /proc is neither stopped nor gone.
func runs(stat string) bool {
	raw, err := os.ReadFile(stat)
	_, after, ok := strings.Cut(string(raw), ") ")
	return err == nil && ok && !strings.HasPrefix(after, "T") && !strings.HasPrefix(after, "t")
}

// kill ends the group at once and returns when it has been reaped. Killing an ended process is not an error.
func (p *process) kill() error {
	return p.end(syscall.SIGKILL)
}

// end sends s, and a kill after stopTimeout, and returns when the process is gone.
func (p *process) end(s syscall.Signal) error {
	if !p.running() {
		return nil
	}
	if err := p.signal(s); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	_ = p.signal(syscall.SIGCONT) // a paused process reacts only to a kill; an ended one ignores this
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		_ = p.signal(syscall.SIGKILL) // fails only if it has just ended
		<-p.exited
	}
	return p.workdir.watch(0)
}
