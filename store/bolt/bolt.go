// Package bolt stores the ledger in one file, for a broker with a single replica.
//
// Updates wait in a queue. One goroutine takes all that wait and runs them in order, each on the result of the ones
// before it. It commits them together in one bbolt transaction with one sync. A failed update does not affect the
// others. There is no timer: a commit starts as soon as the previous one ends.
//
// The file detects damage. Every record has a digest, the audit log is a chain of digests, and the head has the count
// and the checksum of both. Open reads the whole file before it trusts any of it, and refuses a truncated or changed
// file: a ledger that lost a fence is worse than none.
//
// Three changes are not detectable from the file alone. An older copy may have replaced it. The disk may have
// acknowledged the last commit and lost all of it. An attacker with write access may have rebuilt the file with all
// digests. To detect these, compare the log's digest with one kept elsewhere. Damage to free pages and to unused parts
// of pages is not detected, and has no effect.
package bolt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/pawlsec/pawl/broker"
)

// Config configures a [Ledger].
type Config struct {
	// Path of the file. Required. Open creates a missing file with mode 0600. Its directory must exist.
	Path string
	// LockTimeout is the time for which Open waits until another process releases the file. Zero: one second.
	LockTimeout time.Duration
	// Reserve is the disk space in bytes that is kept in Path+".reserve". It is released when the disk is full, so that
	// fences and endings can still be written. Zero: 64 MiB; negative: none.
	Reserve int64
	// Now is the clock for the interval between attempts to reacquire the reserve. Nil: time.Now.
	Now func() time.Time

	fault func(stage) error // set by tests
}

// Errors of Open and Update. If Update returns one of these, its error also wraps broker.ErrNotCommitted.
var (
	ErrInUse    = errors.New("another process holds the ledger")
	ErrNewer    = errors.New("the ledger was written by a newer version")
	ErrDamaged  = errors.New("the ledger is damaged")
	ErrDiskFull = errors.New("the disk is full: only fences and endings are written")
	ErrStopped  = errors.New("the ledger stopped after a failed commit and must be reopened")
	ErrClosed   = errors.New("the ledger is closed")
)

const (
	schema         = 1
	lockTimeout    = time.Second
	defaultReserve = 64 << 20
	// mapSize is address space, not memory or disk. A smaller file can grow without waiting for readers.
	mapSize = 16 << 30
)

var (
	bucketMeta    = []byte("meta")
	bucketRecords = []byte("records")
	bucketLog     = []byte("log")
	keySchema     = []byte("schema")
	keyHead       = []byte("head")
)

// Ledger implements broker.Ledger in a bbolt file.
type Ledger struct {
	path  string
	db    *bbolt.DB
	fault func(stage) error

	// Owned by the writer goroutine.
	head    head
	reserve reserve

	stopped atomic.Pointer[error] // the reason why nothing is written; nil while the ledger runs
	full    atomic.Bool           // the reserve was released
	wake    chan struct{}         // signals that the queue or closed has changed
	done    chan struct{}         // closed when the writer has ended

	// mu guards the queue.
	mu     sync.Mutex
	queue  []*request
	closed bool
}

var _ broker.Ledger = (*Ledger)(nil)

// Open opens the ledger, or creates an empty one if there is no file. It reads and checks the whole file first. Errors
// wrap ErrInUse, ErrNewer or ErrDamaged where they apply. A damaged file is left unchanged. A ledger also opens on a
// full disk.
func Open(c Config) (*Ledger, error) {
	if c.Path == "" {
		return nil, errors.New("opening a ledger: Path is empty")
	}
	if c.LockTimeout == 0 {
		c.LockTimeout = lockTimeout
	}
	if c.Reserve == 0 {
		c.Reserve = defaultReserve
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.fault == nil {
		c.fault = func(stage) error { return nil }
	}
	l := &Ledger{
		path: c.Path, fault: c.fault,
		reserve: reserve{path: c.Path + ".reserve", size: max(c.Reserve, 0), now: c.Now},
		wake:    make(chan struct{}, 1), done: make(chan struct{}),
	}
	if err := l.open(c.LockTimeout); err != nil {
		return nil, fmt.Errorf("opening ledger %q: %w", c.Path, explain(err))
	}
	switch err := l.reserve.acquire(); {
	case noRoom(err):
		l.full.Store(true)
	case err != nil:
		return nil, fmt.Errorf("opening ledger %q: %w", c.Path, errors.Join(err, l.db.Close()))
	}
	go l.write()
	return l, nil
}

func (l *Ledger) open(timeout time.Duration) error {
	info, err := os.Stat(l.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		err = create(l.path)
	case err == nil && info.Size() < int64(2*os.Getpagesize()): // an empty file is a truncated ledger too
		err = fmt.Errorf("%w: it is truncated to %d bytes", ErrDamaged, info.Size())
	}
	if err != nil {
		return err
	}
	if err := inspect(l.path, timeout); err != nil {
		return err
	}
	db, err := bbolt.Open(l.path, 0o600, options(timeout))
	if err != nil {
		return err
	}
	l.db = db
	err = db.View(func(tx *bbolt.Tx) error {
		l.head, err = readHead(tx)
		return err
	})
	if err != nil {
		_ = db.Close() // the first error is returned
	}
	return err
}

// inspect checks the file under a lock that excludes writers. It must run before bbolt reads more than the meta pages:
// bbolt trusts the mapped file, and a bad page number crashes the process.
func inspect(path string, timeout time.Duration) error {
	o := options(timeout)
	o.ReadOnly = true
	db, err := bbolt.Open(path, 0o600, o)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }() // nothing was written
	_, err = checkFile(path)
	return err
}

func options(timeout time.Duration) *bbolt.Options {
	return &bbolt.Options{
		Timeout:         timeout,
		NoFreelistSync:  true, // Open reads the whole file anyway, and a list on disk could be damaged
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: mapSize,
		NoStatistics:    true,
	}
}

// create makes an empty ledger at a temporary path and links it to path. A crash leaves either no ledger or a complete
// one.
func create(path string) error {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	db, err := bbolt.Open(fresh, 0o600, options(lockTimeout))
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketRecords, bucketLog, bucketMeta} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		if err := meta.Put(keySchema, fmt.Append(nil, schema)); err != nil {
			return err
		}
		return meta.Put(keyHead, head{}.encode())
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Link(fresh, path); err != nil { // Rename would replace a ledger that appeared meanwhile
		return err
	}
	if err := os.Remove(fresh); err != nil {
		return err
	}
	return syncDir(path)
}

// syncDir makes the names in path's directory durable.
func syncDir(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// explain converts bbolt's errors to ours, and adds advice.
func explain(err error) error {
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return fmt.Errorf("%w: stop it, or configure another file", ErrInUse)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum),
		errors.Is(err, berrors.ErrVersionMismatch):
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if errors.Is(err, ErrDamaged) {
		return fmt.Errorf("%w; it is left unchanged: keep it for inspection, replace it with the newest good copy, "+
			"and treat every secret issued since that copy as alive", err)
	}
	return err
}

// Close waits for the queued updates, then closes the file. All Views must have returned.
func (l *Ledger) Close() error {
	l.mu.Lock()
	already := l.closed
	l.closed = true
	l.mu.Unlock()
	l.notify()
	<-l.done
	if already {
		return nil
	}
	if err := l.db.Close(); err != nil {
		return fmt.Errorf("closing ledger %q: %w", l.path, err)
	}
	return nil
}

// Err returns the reason why the ledger refuses updates. It wraps ErrStopped, or ErrDiskFull if fences and endings are
// still accepted. Nil means that every Update is accepted.
func (l *Ledger) Err() error {
	if err := l.stopped.Load(); err != nil {
		return *err
	}
	if l.full.Load() {
		return ErrDiskFull
	}
	return nil
}
