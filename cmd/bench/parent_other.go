//go:build !linux

package main

import "syscall"

// withParent does nothing: only Linux can do this. When the bench is killed, end its broker by hand.
func withParent() *syscall.SysProcAttr { return nil }
