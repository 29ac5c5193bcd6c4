//go:build !linux

package bolt

import "os"

// allocate allocates disk space for the first size bytes of f.
func allocate(f *os.File, size int64) error { return fill(f, size) }
