package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// exited is the end of the command of a step. The command has printed its own error.
type exited struct {
	status int    // as of a shell: that of the command, or 128 and the number of the signal that ended it
	how    string // for people
}

func (e exited) Error() string { return e.how }

// supervisor runs the command of a step in a process group of its own. It is the parent of everything that the command
// leaves behind: where the system allows, also of processes that left the group.
type supervisor struct {
	grace time.Duration // from TERM to KILL, when the step has ended
	tty   int           // the terminal that the command gets the foreground of; -1: none

	leader  int             // the process group, and the id of its leader
	ended   bool            // the leader has ended
	status  unix.WaitStatus // its end
	signals chan os.Signal
}

// forwarded are the signals that the command gets when pawl does.
var forwarded = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1,
	syscall.SIGUSR2, syscall.SIGWINCH}

// run runs a command until it ends, and returns how. It does not begin when interrupted has ended. When ctx ends, which it does when the step is revoked, the command
// and everything that it started get TERM, and KILL after the grace.
func (v *supervisor) run(ctx, interrupted context.Context, command, env []string) error {
	path, err := exec.LookPath(command[0])
	if err != nil {
		return notRun(command[0], err)
	}
	// The parent-death signal is sent when the thread that started the command ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	v.signals = make(chan os.Signal, 64)
	signal.Notify(v.signals, append(forwarded, syscall.SIGCHLD)...)
	defer signal.Stop(v.signals)
	if interrupted.Err() != nil { // by a signal that came before the line above
		return context.Cause(interrupted)
	}
	becomeReaper()
	v.tty = foreground(int(os.Stdin.Fd()))
	attributes := &syscall.SysProcAttr{Setpgid: true}
	if v.tty >= 0 {
		attributes.Foreground, attributes.Ctty = true, v.tty
		defer v.takeForeground()
	}
	dieWithParent(attributes)
	child, err := os.StartProcess(path, command,
		&os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Env: env, Sys: attributes})
	if err != nil {
		return notRun(command[0], err)
	}
	v.leader = child.Pid
	_ = child.Release() // reap waits for it, as for every other process
	v.wait(ctx)
	switch code := v.status.ExitStatus(); {
	case v.status.Signaled():
		return exited{128 + int(v.status.Signal()), "signal: " + v.status.Signal().String()}
	case code != 0:
		return exited{code, fmt.Sprintf("exit status %d", code)}
	}
	return nil
}

// notRun is the error for a command that cannot be run, with the status of a shell.
func notRun(name string, err error) error {
	status := 126
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		status = 127
	}
	return unstarted{exited{status, fmt.Sprintf("running %s: %v", name, err)}}
}

// unstarted is exited for a command that has printed nothing, because it did not run.
type unstarted struct{ exited }

// wait returns when the command has ended: when ctx ends, with everything that it started.
func (v *supervisor) wait(ctx context.Context) {
	over, kill := ctx.Done(), (<-chan time.Time)(nil)
	for {
		last := v.reap()
		if v.ended && over != nil {
			return // the step goes on until now; processes that the command left behind live on without its secret
		}
		if last && v.ended && syscall.Kill(-v.leader, 0) != nil { // the group can outlive its leader, unseen
			return
		}
		select {
		case s := <-v.signals:
			if s != syscall.SIGCHLD {
				_ = syscall.Kill(-v.leader, s.(syscall.Signal)) // the group may have ended
			}
		case <-over:
			over = nil
			v.signalAll(syscall.SIGTERM)
			v.signalAll(syscall.SIGCONT) // a stopped process takes no TERM
			timer := time.NewTimer(v.grace)
			defer timer.Stop()
			kill = timer.C
		case <-kill:
			// A process may fork while it is killed: all are killed until none is left.
			v.signalAll(syscall.SIGKILL)
			again := time.NewTimer(killAgain)
			defer again.Stop()
			kill = again.C
		}
	}
}

// killAgain is the time between two rounds of KILL.
const killAgain = 10 * time.Millisecond

// signalAll signals the group of the command, and every other descendant of this process that the system shows.
func (v *supervisor) signalAll(s syscall.Signal) {
	_ = syscall.Kill(-v.leader, s) // the group may have ended
	for _, pid := range descendants() {
		_ = syscall.Kill(pid, s) // the same
	}
}

// reap waits for each process that has ended: the command, and the orphans that this process has become the parent of.
// It reports whether no child is left.
func (v *supervisor) reap() (last bool) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG|unix.WUNTRACED, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return true
		case pid == 0:
			return false
		case pid == v.leader && status.Stopped():
			v.stop(status.StopSignal())
		case pid == v.leader:
			v.ended, v.status = true, status
		}
	}
}

// stop follows a command that the terminal has stopped: this process stops too, so that the shell gets the terminal
// back. When it continues, so does the command.
func (v *supervisor) stop(by syscall.Signal) {
	if v.tty < 0 || by != syscall.SIGTSTP && by != syscall.SIGTTIN && by != syscall.SIGTTOU {
		return
	}
	v.takeForeground()
	_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) // it cannot fail
	if foreground(v.tty) >= 0 {
		setForeground(v.tty, v.leader)
	}
	_ = syscall.Kill(-v.leader, syscall.SIGCONT) // the group may have ended
}

// takeForeground makes the group of this process the foreground of the terminal again.
func (v *supervisor) takeForeground() {
	// A group in the background is stopped by this, unless it ignores TTOU.
	signal.Ignore(syscall.SIGTTOU)
	defer signal.Reset(syscall.SIGTTOU)
	setForeground(v.tty, syscall.Getpgrp())
}

func setForeground(tty, group int) {
	_ = unix.IoctlSetPointerInt(tty, unix.TIOCSPGRP, group) // the terminal may have been closed
}

// foreground returns fd if it is a terminal in whose foreground this process is, and -1 otherwise.
func foreground(fd int) int {
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	if err != nil || group != syscall.Getpgrp() {
		return -1
	}
	return fd
}
