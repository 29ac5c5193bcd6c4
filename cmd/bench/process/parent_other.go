//go:build !linux

package process

import "syscall"

// WithParent does nothing: only Linux can do this. When the bench is killed, end its broker by hand.
func WithParent() *syscall.SysProcAttr { return nil }
