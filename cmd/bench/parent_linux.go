package main

import "syscall"

// withParent makes the kernel kill a child when this process is killed.
func withParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
