//go:build !linux

package main

import "syscall"

// withParent does nothing: only Linux has the means. A broker whose bench was killed must be
// ended by hand.
func withParent() *syscall.SysProcAttr { return nil }
