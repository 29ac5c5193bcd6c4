package bolt

import (
	"errors"
	"os"
	"syscall"
)

// allocate makes sure that f's first size bytes have room on the disk.
func allocate(f *os.File, size int64) error {
	err := syscall.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return fill(f, size)
	}
	return err
}
