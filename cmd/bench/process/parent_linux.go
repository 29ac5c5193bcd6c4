package process

import "syscall"

// WithParent makes the kernel kill a child when this process is killed.
func WithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
