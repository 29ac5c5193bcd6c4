package bolt

import (
	"errors"
	"os"
	"syscall"
)

// allocate allocates disk space for the first size bytes of f.
func allocate(f *os.File, size int64) error {
	err := syscall.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return fill(f, size)
	}
	return err
}
