package bolt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"
)

// reserve is disk space held by a separate file. Removing the file frees space for fences on a full disk, on any file
// system.
type reserve struct {
	path string
	size int64 // zero: there is no reserve
	now  func() time.Time
	last time.Time // the last call of acquire
}

const (
	// retryReserve is the time between attempts to reacquire the reserve.
	retryReserve = time.Second
	// reserveMargin is the space that must be free in addition to the reserve when it is acquired. Otherwise the next
	// update could release it at once.
	reserveMargin = 1 << 20
)

// due reports whether it is time to call acquire again.
func (r *reserve) due() bool { return r.now().Sub(r.last) >= retryReserve }

// acquire creates the file and allocates its full size. If there is no room, it leaves no file.
func (r *reserve) acquire() (err error) {
	r.last = r.now()
	if r.size == 0 {
		return r.release()
	}
	f, err := os.OpenFile(r.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("acquiring the reserve: %w", err)
	}
	err = errors.Join(allocate(f, r.size+reserveMargin), f.Truncate(r.size), f.Sync(), f.Close())
	if err != nil {
		return errors.Join(fmt.Errorf("acquiring the reserve: %w", err), r.release())
	}
	return syncDir(r.path)
}

// release removes the file.
func (r *reserve) release() error {
	if err := os.Remove(r.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("releasing the reserve: %w", err)
	}
	return nil
}

// fill writes size incompressible bytes, for file systems that cannot preallocate.
func fill(f *os.File, size int64) error {
	var block [1 << 16]byte
	for at := int64(0); at < size; at += int64(len(block)) {
		_, _ = rand.Read(block[:]) // never fails
		if _, err := f.WriteAt(block[:min(int64(len(block)), size-at)], at); err != nil {
			return err
		}
	}
	return nil
}
