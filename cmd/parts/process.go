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
	startTimeout = time.Minute // a server that is not ready by then never will be
	stopTimeout  = 20 * time.Second
	pollInterval = 20 * time.Millisecond
	tailLength   = 2000 // bytes of the log that an error shows
)

// command says what to run.
type command struct {
	path string
	args []string
	user *syscall.Credential // nil is our own user
}

// process is one run of a server: the leader of a process group of its own.
type process struct {
	nest   *nest
	cmd    *exec.Cmd
	log    string
	exited chan struct{} // closed when it has ended and was waited for
}

// start runs c in the nest. Its output is appended to a file there; its environment holds nothing of ours but PATH.
func (n *nest) start(c command) (*process, error) {
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
	p := &process{nest: n, cmd: cmd, log: logFile, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in ProcessState
		close(p.exited)
	}()
	if err := n.watch(cmd.Process.Pid); err != nil {
		return nil, errors.Join(err, p.kill())
	}
	return p, nil
}

// ready polls check until it succeeds. It fails when the process ends or the time is up, with the end of its log.
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

// tail is the end of the log.
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

// signal reaches the whole process group.
func (p *process) signal(s syscall.Signal) error {
	if err := syscall.Kill(-p.cmd.Process.Pid, s); err != nil {
		return fmt.Errorf("sending %v to %s: %w", s, filepath.Base(p.cmd.Path), err)
	}
	return nil
}

// pause stops the process and returns when each of its threads stands still: the signal is delivered to
// one after the other, and those that still run go on answering. Where there is no /proc it does not wait.
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
	return fmt.Errorf("%s does not stand still", filepath.Base(p.cmd.Path))
}

// runs reports whether the thread of a stat file in /proc is neither stopped nor gone.
func runs(stat string) bool {
	raw, err := os.ReadFile(stat)
	_, after, ok := strings.Cut(string(raw), ") ")
	return err == nil && ok && !strings.HasPrefix(after, "T") && !strings.HasPrefix(after, "t")
}

// kill ends the group at once and returns when it has been waited for. Killing what has ended is no error.
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
	_ = p.signal(syscall.SIGCONT) // a paused process hears nothing but a kill; one that is gone needs nothing
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		_ = p.signal(syscall.SIGKILL) // can fail only because it just ended
		<-p.exited
	}
	return p.nest.watch(0)
}
