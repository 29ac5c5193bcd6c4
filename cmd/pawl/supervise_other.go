//go:build !linux

package main

import "syscall"

// Only Linux lets a process become the parent of its orphaned descendants, and kills a command with its parent. On other
// systems a process that left the group of the command is not seen, and a command outlives a pawl that is killed.

func becomeReaper() {}

func dieWithParent(*syscall.SysProcAttr) {}

func descendants() []int { return nil }
