package bolt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"
)

// reserve is disk space held by a file of its own, so that giving it up makes room on any
// file system (hardening.md: space for fences on a full disk).
type reserve struct {
	path string
	size int64 // zero: none is kept
	now  func() time.Time
	last time.Time // when take was tried last
}

const (
	// retryReserve is the time between attempts to take the reserve back.
	retryReserve = time.Second
	// reserveMargin must be free beside the reserve before it counts as back, so that the next
	// update does not give it up again at once.
	reserveMargin = 1 << 20
)

// due reports whether it is time to try take again.
func (r *reserve) due() bool { return r.now().Sub(r.last) >= retryReserve }

// take makes the file of its full size, really allocated. When there is no room it leaves none.
func (r *reserve) take() (err error) {
	r.last = r.now()
	if r.size == 0 {
		return r.release()
	}
	f, err := os.OpenFile(r.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("taking the reserve: %w", err)
	}
	err = errors.Join(allocate(f, r.size+reserveMargin), f.Truncate(r.size), f.Sync(), f.Close())
	if err != nil {
		return errors.Join(fmt.Errorf("taking the reserve: %w", err), r.release())
	}
	return syncDir(r.path)
}

// release gives the space up.
func (r *reserve) release() error {
	if err := os.Remove(r.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("releasing the reserve: %w", err)
	}
	return nil
}

// fill writes size bytes that do not compress, for file systems that only count what was written.
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
