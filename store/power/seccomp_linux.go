package power

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// calls are the system calls that wait for the supervisor, by number.
var calls = map[int32]string{
	unix.SYS_PWRITE64: "pwrite", unix.SYS_FSYNC: "fsync", unix.SYS_FDATASYNC: "fdatasync",
	unix.SYS_FTRUNCATE: "truncate", unix.SYS_FALLOCATE: "allocate", unix.SYS_UNLINKAT: "unlink",
	unix.SYS_LINKAT: "link", unix.SYS_RENAMEAT: "rename", unix.SYS_RENAMEAT2: "rename",
}

// notification is the kernel's struct seccomp_notif.
type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

// response is the kernel's struct seccomp_notif_resp.
type response struct {
	id    uint64
	value int64
	err   int32
	flags uint32
}

// watcher returns the error of a call on a path. fd is of the file, and offset that of a pwrite.
type watcher func(call, path string, fd int, offset int64) unix.Errno

// supervisor answers the notifications of this process. The filter stays for as long as the process runs.
type supervisor struct {
	listener uintptr
	mu       sync.Mutex // guards watcher
	watcher  watcher    // nil: no directory is watched
}

var supervise = sync.OnceValues(func() (*supervisor, error) {
	// The filter is of this thread and, with TSYNC, of all others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("no_new_privs: %w", err)
	}
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // the number of the call
	for nr := range calls {
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: uint32(nr)},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	const flags = unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH |
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&filter)))
	if errno != 0 {
		return nil, fmt.Errorf("seccomp with a listener (Linux 5.19 or later): %w", errno)
	}
	s := &supervisor{listener: fd}
	go s.serve()
	return s, nil
})

// serve answers for ever. It makes none of the calls that it answers.
func (s *supervisor) serve() {
	for {
		var n notification
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, s.listener, unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
		switch {
		case errno == unix.EINTR || errno == unix.ENOENT: // the caller was interrupted
			continue
		case errno != 0:
			panic(fmt.Sprintf("power: receiving a notification: %v", errno))
		}
		r := response{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		call, err := s.answer(n)
		switch {
		case err != 0:
			r.err, r.flags = -int32(err), 0
		case call == "fsync" || call == "fdatasync":
			r.flags = 0 // done: the machine's own disk is not waited for
		}
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, s.listener, unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r)))
		if errno != 0 && errno != unix.ENOENT {
			panic(fmt.Sprintf("power: answering a notification: %v", errno))
		}
	}
}

func (s *supervisor) answer(n notification) (call string, err unix.Errno) {
	s.mu.Lock()
	defer s.mu.Unlock()
	call = calls[n.nr]
	if s.watcher == nil {
		return call, 0
	}
	path, problem := pathOf(call, n.args)
	if problem != nil {
		panic(fmt.Sprintf("power: %s: %v", call, problem))
	}
	return call, s.watcher(call, path, int(n.args[0]), int64(n.args[3]))
}

// pathOf returns the path that a call is about: that of its descriptor, or its last one.
func pathOf(call string, args [6]uint64) (string, error) {
	switch call {
	case "unlink":
		return textAt(args[1])
	case "link", "rename":
		return textAt(args[3])
	}
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", args[0]))
}

// textAt reads a path of this process's memory, as the kernel would.
func textAt(address uint64) (string, error) {
	var raw [unix.PathMax]byte
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return "", err
	}
	n, err := mem.ReadAt(raw[:], int64(address))
	if n > 0 {
		err = nil
	}
	return unix.ByteSliceToString(raw[:n]), errors.Join(err, mem.Close())
}
