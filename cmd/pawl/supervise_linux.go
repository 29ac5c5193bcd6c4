package main

import (
	"bytes"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// becomeReaper makes this process the parent of orphaned descendants, as process 1 is anyway. So none
// of them leaves its sight, also after setsid.
func becomeReaper() {
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) // an old kernel has none: then the group is all that is seen
}

// dieWithParent has the kernel kill the command when this process is killed. It holds for the command alone, and not for
// what it started.
func dieWithParent(a *syscall.SysProcAttr) { a.Pdeathsig = syscall.SIGKILL }

// descendants returns the processes below this one. Without /proc there are none.
func descendants() (list []int) {
	entries, _ := os.ReadDir("/proc") // none
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		raw, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may have any character. The state and the parent follow.
		fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
		if len(fields) < 2 || fields[0][0] == 'Z' {
			continue
		}
		if parent, err := strconv.Atoi(string(fields[1])); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	for next := []int{os.Getpid()}; len(next) > 0; next = next[1:] {
		below := children[next[0]]
		list, next = append(list, below...), append(next, below...)
	}
	return list
}
