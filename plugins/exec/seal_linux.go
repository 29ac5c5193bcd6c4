package exec

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// seal copies a program into sealed memory. It uses no disk, because a full disk must not stop a revocation. A script's
// interpreter opens the copy by the same path.
func seal(src io.Reader) (*image, error) {
	fd, err := unix.MemfdCreate("pawl-plugin", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("pawl-plugin", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "pawl-plugin")
	im := &image{path: "/proc/self/fd/3", files: []*os.File{f}, close: func() { _ = f.Close() }}
	if _, err = io.Copy(f, src); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		im.close()
		return nil, err
	}
	return im, nil
}
