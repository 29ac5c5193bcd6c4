// Package bolt stores the ledger in one file, for a broker with a single replica.
//
// Updates wait in a queue. One goroutine takes all that wait and runs them in order, each on the result of the ones
// before it. It commits them together in one bbolt transaction with one sync. A failed update does not affect the
// others. A commit starts as soon as the previous one ends.
//
// What [Ledger.Order] takes waits in memory for the next of these commits, or for one of its own after a few
// milliseconds. Views and updates read it there. So a process that is killed loses it, as a power failure does, and the
// file has at every moment a beginning of the order.
//
// The file detects damage. Every record has a digest, the audit log is a chain of digests, and the head has the count
// and the checksum of both. The whole file is read before any of it is trusted, and a truncated or changed file is
// refused: a ledger that lost a fence is worse than none. Reading takes time, and a fence must not wait for it. So
// [OpenUnchecked] returns before the check has ended. Until then the file is only read, and updates that reduce
// authority, such as fences, go to a file of their own beside it. All others are refused.
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
	"github.com/pawlsec/pawl/store/bolt/internal/journal"
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
	// BeforeCheck runs before the check of the whole file, and may block. It is for tests of a long check. Nil: nothing.
	BeforeCheck func()

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
	ErrChecking = fmt.Errorf("%w: only fences and endings are written", broker.ErrChecking)
)

const (
	// schema 2 has a log that may begin after its first entry. It is written with the first Trim.
	schema         = 2
	schemaWhole    = 1
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
	keyBase       = []byte("base") // the head before the first entry of the log; none: the log is whole
)

// Ledger implements broker.Ledger in a bbolt file.
type Ledger struct {
	path  string
	lock  *os.File // has the lock of the file; bbolt's descriptors are duplicates of it
	fault func(stage) error

	// Owned by the writer goroutine.
	head    head // with the ordered changes
	reserve reserve
	journal *journal.File
	waiting []func(error) // to be called when the ordered changes are durable, or lost
	oldest  time.Time     // when the first of them was ordered

	synced  atomic.Uint64         // the revision of the last entry that is durable
	stopped atomic.Pointer[error] // the reason why nothing is written; nil while the ledger runs
	full    atomic.Bool           // the reserve was released
	wake    chan struct{}         // signals that the queue or closed has changed, or that the check has ended
	done    chan struct{}         // closed when the writer has ended

	cancel  atomic.Bool           // ends the check early
	result  chan error            // the outcome of the check, once
	checked chan struct{}         // closed when the outcome is in verdict
	verdict atomic.Pointer[error] // nil until the check has ended; points to nil when it passed

	// state guards the file that is read, and the updates that are not in it.
	state   sync.RWMutex
	db      *bbolt.DB // read only until the check has passed
	pending *pending  // until then the updates beside the file; from then on the ordered changes, or nil

	// mu guards the queue.
	mu     sync.Mutex
	queue  []*request
	urgent []*request // go first
	passed bool       // the last batch were urgent ones alone, while others waited
	closed bool
}

var _ broker.Ledger = (*Ledger)(nil)

// Open opens the ledger, or creates an empty one if there is no file. It reads and checks the whole file first. Errors
// wrap ErrInUse, ErrNewer or ErrDamaged where they apply. A damaged file is left unchanged. A ledger also opens on a
// full disk.
func Open(c Config) (*Ledger, error) {
	l, err := OpenUnchecked(c)
	if err != nil {
		return nil, err
	}
	<-l.Checked()
	if err := *l.verdict.Load(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// OpenUnchecked is [Open] that does not wait for the check of the whole file. Until [Ledger.Checked] is closed, and for
// good if the check fails, the ledger takes only updates that reduce authority. These stay, whatever the check finds:
// in Path+".pending" until the ledger takes them in. Its errors are those that the first pages of the file show.
func OpenUnchecked(c Config) (*Ledger, error) {
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
		result: make(chan error, 1), checked: make(chan struct{}),
	}
	im, err := l.open(c.LockTimeout)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening ledger %q: %w", c.Path, explain(err)), l.release())
	}
	switch err := l.reserve.acquire(); {
	case noRoom(err):
		l.full.Store(true)
	case err != nil:
		return nil, errors.Join(fmt.Errorf("opening ledger %q: %w", c.Path, err), l.release())
	}
	go l.check(im, c.BeforeCheck)
	go l.write()
	return l, nil
}

// open locks the file and reads its first pages. bbolt opens it for reading alone: it trusts the file, and would write
// where a damaged page says that there is room.
func (l *Ledger) open(timeout time.Duration) (*image, error) {
	if _, err := os.Stat(l.path); errors.Is(err, os.ErrNotExist) {
		if err := create(l.path); err != nil {
			return nil, err
		}
	}
	var err error
	if l.lock, err = os.OpenFile(l.path, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	if err := waitLock(l.lock, timeout); err != nil {
		return nil, err
	}
	// A process that was killed may not have synced its last writes.
	if err := errors.Join(l.lock.Sync(), syncDir(l.path)); err != nil {
		return nil, err
	}
	info, err := l.lock.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() < int64(2*os.Getpagesize()) { // an empty file is a truncated ledger too
		return nil, fmt.Errorf("%w: it is truncated to %d bytes", ErrDamaged, info.Size())
	}
	im, err := readImage(l.lock, uint64(info.Size()))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	im.cancelled = l.cancel.Load
	if err := im.open(); err != nil {
		return nil, err
	}
	if l.journal, l.pending, err = readPending(l.path+".pending", im.head); err != nil {
		return nil, err
	}
	l.head = l.pending.head
	l.synced.Store(uint64(l.head.revision))
	o := l.options(timeout)
	o.ReadOnly = true
	if l.db, err = bbolt.Open(l.path, 0o600, o); err != nil {
		return nil, err
	}
	return im, waitLock(l.lock, timeout) // bbolt has made it a shared one
}

// check is the goroutine that checks the whole file.
func (l *Ledger) check(im *image, before func()) {
	if before != nil {
		before()
	}
	l.result <- im.check()
	l.notify()
}

// settle takes in the outcome of the check, if there is one: the updates that waited for it become part of the ledger.
// It runs on the writer's goroutine.
func (l *Ledger) settle(err error) {
	if err == nil {
		err = l.takeIn()
	}
	if err != nil {
		err = fmt.Errorf("checking ledger %q: %w", l.path, explain(err))
	}
	l.verdict.Store(&err)
	close(l.checked)
}

// takeIn opens the checked file for writing, writes the pending updates to it, and has it read from then on. A crash
// before the commit leaves the updates beside the ledger. One after it leaves them there too, and the next process sees
// that the ledger has them.
func (l *Ledger) takeIn() error {
	db, err := bbolt.Open(l.path, 0o600, l.options(lockTimeout))
	if err != nil {
		return err
	}
	if err = l.pending.fold(db); isFull(err) {
		l.full.Store(true)
		_ = l.reserve.release() // the next attempt shows whether there is room
		err = l.pending.fold(db)
	}
	if err != nil {
		l.stop(err)
		return errors.Join(err, db.Close())
	}
	l.state.Lock()
	old := l.db
	l.db, l.pending = db, nil
	l.state.Unlock()
	err = l.journal.Remove()
	if err != nil { // it may be there at the next start, which takes it in only if nothing was committed since
		l.stop(err)
	}
	return errors.Join(old.Close(), err) // Close waits for its Views
}

// Checked is closed when the check of the whole file has ended. [Ledger.Err] has the outcome.
func (l *Ledger) Checked() <-chan struct{} { return l.checked }

// options lets bbolt use a duplicate of the locked descriptor.
func (l *Ledger) options(timeout time.Duration) *bbolt.Options {
	o := options(timeout)
	o.OpenFile = func(string, int, os.FileMode) (*os.File, error) { return duplicate(l.lock) }
	return o
}

func options(timeout time.Duration) *bbolt.Options {
	return &bbolt.Options{
		Timeout:         timeout,
		NoFreelistSync:  true, // the whole file is read anyway, and a list on disk could be damaged
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: mapSize,
		NoStatistics:    true,
	}
}

// create makes an empty ledger at a temporary path and links it to path. A crash leaves either no ledger or a complete
// one. The caller makes the name durable.
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
		if err := meta.Put(keySchema, fmt.Append(nil, schemaWhole)); err != nil {
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
	return os.Remove(fresh)
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

// Close waits for the queued updates, then closes the file. All Views must have returned. A check that has not ended is
// given up.
func (l *Ledger) Close() error {
	l.mu.Lock()
	already := l.closed
	l.closed = true
	l.mu.Unlock()
	l.cancel.Store(true)
	l.notify()
	<-l.done
	if already {
		return nil
	}
	if err := l.release(); err != nil {
		return fmt.Errorf("closing ledger %q: %w", l.path, err)
	}
	return nil
}

// release closes the files.
func (l *Ledger) release() (err error) {
	if l.db != nil {
		err = l.db.Close()
	}
	if l.journal != nil {
		err = errors.Join(err, l.journal.Close())
	}
	if l.lock != nil {
		err = errors.Join(err, l.lock.Close())
	}
	return err
}

// Err returns the reason why the ledger refuses updates. It wraps ErrStopped; or ErrChecking, ErrDamaged or ErrDiskFull
// if fences and endings are still accepted. Nil means that every Update is accepted.
func (l *Ledger) Err() error {
	if err := l.stopped.Load(); err != nil {
		return *err
	}
	if err := l.Unchecked(); err != nil {
		return err
	}
	if l.full.Load() {
		return ErrDiskFull
	}
	return nil
}

// Unchecked returns nil once the check of the whole file has passed. Before that it returns ErrChecking. If the check
// failed, it returns an error that wraps ErrDamaged, or the error of reading.
func (l *Ledger) Unchecked() error {
	if err := l.verdict.Load(); err != nil {
		return *err
	}
	return ErrChecking
}
