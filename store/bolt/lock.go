package bolt

import (
	"errors"
	"os"
	"time"

	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// lockPoll is the time between two attempts to get the lock.
const lockPoll = 20 * time.Millisecond

// waitLock locks a file against every other process, also one that only reads.
func waitLock(f *os.File, timeout time.Duration) error {
	for end := time.Now().Add(timeout); ; <-time.After(lockPoll) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if !time.Now().Before(end) {
			return berrors.ErrTimeout
		}
	}
}

// duplicate returns another descriptor of an open file. Both have its lock.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
