//go:build !linux

package bolt

import "os"

// allocate makes sure that f's first size bytes have room on the disk.
func allocate(f *os.File, size int64) error { return fill(f, size) }
