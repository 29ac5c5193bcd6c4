// Package bolt keeps the ledger in one file, for a broker that runs alone.
//
// Updates wait in a queue. One goroutine takes all that wait, runs each over what the ones
// before it left, and commits them together in one bbolt transaction with one sync. An update
// that fails leaves the others alone, and nobody waits for a timer.
//
// The file defends itself. Every record carries a digest, the audit log is a chain of digests,
// and the head counts and sums up both. Open reads the whole file before it trusts any of it
// and refuses one that was cut or changed: a ledger that lost a fence is worse than none.
//
// What a file cannot tell about itself: that it is an older copy, put back whole; that the disk
// acknowledged the last commit and lost all of it; or that somebody who may write it made it
// anew, digests included. For these the log's digest must be known elsewhere. Damage to pages
// that are free and to the unused ends of others is not seen, and does nothing.
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

// Config says where the ledger is.
type Config struct {
	// Path of the file. Required; made with mode 0600 when it does not exist. Its directory
	// must exist.
	Path string
	// LockTimeout is how long Open waits for another process to let go of the file.
	// Zero: one second.
	LockTimeout time.Duration
	// Reserve is how many bytes of disk are kept in Path+".reserve", to be given up when the
	// disk is full so that fences and endings can still be written. Zero: 64 MiB; negative: none.
	Reserve int64
	// Now is the clock that spaces out attempts to win the reserve back. Nil: time.Now.
	Now func() time.Time

	fault func(stage) error // set by tests
}

// What Open and Update say. Each Update error below also wraps broker.ErrNotCommitted.
var (
	ErrInUse    = errors.New("another process holds the ledger")
	ErrNewer    = errors.New("the ledger was written by a newer version")
	ErrDamaged  = errors.New("the ledger is damaged")
	ErrDiskFull = errors.New("the disk is full: only fences and endings are written")
	ErrStopped  = errors.New("the ledger stopped after a commit that failed and must be opened again")
	ErrClosed   = errors.New("the ledger is closed")
)

const (
	schema         = 1
	lockTimeout    = time.Second
	defaultReserve = 64 << 20
	// mapSize is address space, not memory or disk. As long as the file is smaller, growing it
	// never has to wait for readers.
	mapSize = 16 << 30
)

var (
	bucketMeta    = []byte("meta")
	bucketRecords = []byte("records")
	bucketLog     = []byte("log")
	keySchema     = []byte("schema")
	keyHead       = []byte("head")
)

// Ledger is a broker.Ledger in a bbolt file.
type Ledger struct {
	path  string
	db    *bbolt.DB
	fault func(stage) error

	// Owned by the writer goroutine.
	head    head
	reserve reserve

	stopped atomic.Pointer[error] // why nothing is written any more
	full    atomic.Bool           // the reserve is given up
	wake    chan struct{}         // "look at the queue again"
	done    chan struct{}         // closed when the writer is gone

	// mu guards the queue.
	mu     sync.Mutex
	queue  []*request
	closed bool
}

var _ broker.Ledger = (*Ledger)(nil)

// Open opens the ledger, or makes an empty one where there is no file. It reads and checks the
// whole file first. Errors wrap ErrInUse, ErrNewer or ErrDamaged where they apply; a damaged
// file is left as it is. A full disk does not keep a ledger from opening.
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
	switch err := l.reserve.take(); {
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
	case err == nil && info.Size() < int64(2*os.Getpagesize()): // an empty file too was a ledger once
		err = fmt.Errorf("%w: it is cut to %d bytes", ErrDamaged, info.Size())
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
		_ = db.Close() // the first error is the one to tell
	}
	return err
}

// inspect checks the file under a lock that keeps writers out. It is done before bbolt reads
// more than the meta pages, because bbolt trusts what it maps: a bad page number ends the process.
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
		NoFreelistSync:  true, // Open reads the whole file anyway; one thing less to be damaged
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: mapSize,
		NoStatistics:    true,
	}
}

// create makes an empty ledger beside path and moves it there, so that a crash leaves either
// no ledger or a whole one.
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
	if err := os.Link(fresh, path); err != nil { // unlike Rename, never over a ledger that appeared meanwhile
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

// explain turns bbolt's refusals into ours, with what to do.
func explain(err error) error {
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return fmt.Errorf("%w: stop it, or give this one another file", ErrInUse)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum),
		errors.Is(err, berrors.ErrVersionMismatch):
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if errors.Is(err, ErrDamaged) {
		return fmt.Errorf("%w; it is left untouched: keep it for inspection, put the newest good copy "+
			"in its place, and treat every secret issued since that copy as alive", err)
	}
	return err
}

// Close lets the updates that wait finish, then closes the file. Views must have returned.
func (l *Ledger) Close() error {
	l.mu.Lock()
	already := l.closed
	l.closed = true
	l.mu.Unlock()
	l.look()
	<-l.done
	if already {
		return nil
	}
	if err := l.db.Close(); err != nil {
		return fmt.Errorf("closing ledger %q: %w", l.path, err)
	}
	return nil
}

// Err says why the ledger does not take every Update: it wraps ErrStopped or ErrDiskFull. Nil
// when it does.
func (l *Ledger) Err() error {
	if err := l.stopped.Load(); err != nil {
		return *err
	}
	if l.full.Load() {
		return ErrDiskFull
	}
	return nil
}
