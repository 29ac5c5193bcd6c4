package bolt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
)

// maxBatch is how many updates share one commit.
const maxBatch = 512

// stage is a point of the commit at which tests let things fail.
type stage int

const (
	beforeCommit stage = iota
	afterCommit
)

// request is one Update on its way through the writer.
type request struct {
	f     func(broker.Tx) error
	begun atomic.Bool  // by the writer, or by the caller that gave up waiting
	done  chan outcome // of size 1: the writer never waits for a caller
}

type outcome struct {
	err   error
	panic any
}

// Update is broker.Ledger's. f runs on the writer's goroutine and must not wait for another
// Update or for anything slow: every other Update waits for it. A panic in f is raised again
// here. When ctx is done before f began, nothing happened; from then on Update waits for the
// outcome.
func (l *Ledger) Update(ctx context.Context, f func(broker.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return notCommitted(err)
	}
	r := &request{f: f, done: make(chan outcome, 1)}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return notCommitted(ErrClosed)
	}
	l.queue = append(l.queue, r)
	l.mu.Unlock()
	l.look()

	var o outcome
	select {
	case o = <-r.done:
	case <-ctx.Done():
		if r.begun.CompareAndSwap(false, true) {
			return notCommitted(ctx.Err())
		}
		o = <-r.done
	}
	if o.panic != nil {
		panic(o.panic)
	}
	return o.err
}

// View is broker.Ledger's. It never waits for an Update.
func (l *Ledger) View(ctx context.Context, f func(broker.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return l.db.View(func(btx *bbolt.Tx) error {
		return f(&tx{records: btx.Bucket(bucketRecords), readOnly: true, view: btx})
	})
}

func notCommitted(err error) error { return fmt.Errorf("%w: %w", broker.ErrNotCommitted, err) }

// look wakes the writer. It never blocks.
func (l *Ledger) look() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// write is the writer goroutine.
func (l *Ledger) write() {
	defer close(l.done)
	for {
		batch, closed := l.take()
		switch {
		case len(batch) > 0:
			l.settle(batch)
		case closed:
			return
		default:
			<-l.wake
		}
	}
}

// take removes what waits, up to maxBatch, from the queue.
func (l *Ledger) take() (batch []*request, closed bool) {
	l.gather()
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(len(l.queue), maxBatch)
	batch = l.queue[:n:n]
	l.queue = l.queue[n:]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	return batch, l.closed
}

// gather lets goroutines that are ready to run, such as those just answered, queue their next
// update first. Without it every second batch would hold one or two of them.
func (l *Ledger) gather() {
	for n := -1; ; {
		runtime.Gosched()
		l.mu.Lock()
		m := len(l.queue)
		l.mu.Unlock()
		if m == n || m >= maxBatch {
			return
		}
		n = m
	}
}

// settle answers every request of the batch.
func (l *Ledger) settle(batch []*request) {
	if l.full.Load() && l.reserve.due() && l.reserve.take() == nil {
		l.full.Store(false)
	}
	mine := batch[:0]
	for _, r := range batch {
		if r.begun.CompareAndSwap(false, true) {
			mine = append(mine, r)
		}
	}
	ran, err := l.commit(mine)
	if isFull(err) && l.stopped.Load() == nil {
		// Nothing was written. Fences and endings get the reserve, the others are told so.
		l.full.Store(true)
		l.reserve.release()
		ran, err = l.commit(ran)
	}
	if isFull(err) {
		err = fmt.Errorf("%w: %w", ErrDiskFull, err)
	}
	for _, r := range ran {
		r.done <- outcome{err: err}
	}
}

// commit runs the functions and commits what they left. It answers the requests whose own
// function failed and returns the others with the fate they share.
func (l *Ledger) commit(batch []*request) (ran []*request, err error) {
	if err := l.stopped.Load(); err != nil {
		return batch, notCommitted(*err)
	}
	btx, err := l.db.Begin(true)
	if err != nil {
		return batch, notCommitted(err)
	}
	t := &tx{records: btx.Bucket(bucketRecords), log: btx.Bucket(bucketLog), head: l.head}
	t.log.FillPercent = 1       // entries only ever go to the end
	t.records.FillPercent = 0.8 // costs nothing where keys are random, saves writes where they are not
	for i, r := range batch {
		if o, ok := l.run(r, t); !ok {
			r.done <- o
			continue
		}
		ran = append(ran, r)
		if err := t.keep(); err != nil { // part of it may be in btx: nobody's work is kept
			return append(ran, batch[i+1:]...), errors.Join(notCommitted(err), btx.Rollback())
		}
	}
	if t.head == l.head {
		_ = btx.Rollback() // nothing was put: nothing to lose
		return ran, nil
	}
	if err := btx.Bucket(bucketMeta).Put(keyHead, t.head.encode()); err != nil {
		return ran, errors.Join(notCommitted(err), btx.Rollback())
	}
	if err := l.fault(beforeCommit); err != nil {
		return ran, errors.Join(notCommitted(err), btx.Rollback())
	}
	if err := l.finish(btx); err != nil {
		return ran, err
	}
	l.head = t.head
	return ran, nil
}

// run runs one function; ok says that what it left in t is to be kept.
func (l *Ledger) run(r *request, t *tx) (o outcome, ok bool) {
	t.begin()
	defer func() {
		if v := recover(); v != nil {
			o, ok = outcome{panic: fmt.Sprintf("%v [in a ledger update]\n%s", v, debug.Stack())}, false
		}
	}()
	if err := r.f(t); err != nil {
		return outcome{err: err}, false
	}
	switch {
	case len(t.puts) > 0 && len(t.entries) == 0:
		return outcome{err: notCommitted(broker.ErrNoEntry)}, false
	case len(t.entries) > 0 && !t.ending && l.full.Load():
		return outcome{err: notCommitted(ErrDiskFull)}, false
	}
	return outcome{}, true
}

// finish commits. After a failure other than a full disk nothing is written any more: what a
// failed sync left on the disk cannot be known, and the next sync would not tell.
func (l *Ledger) finish(btx *bbolt.Tx) (err error) {
	id := btx.ID()
	defer func() {
		if v := recover(); v != nil { // bbolt's assertions
			err = fmt.Errorf("committing, outcome unknown: %v", v)
			l.stop(err)
			_ = btx.Rollback() // or Close would wait for it for ever
		}
	}()
	if err = btx.Commit(); err == nil {
		err = l.fault(afterCommit)
	}
	switch {
	case err == nil:
		return nil
	case !l.written(id):
		// The meta page, which is written last, was not even begun.
		if !isFull(err) {
			l.stop(err)
		}
		return notCommitted(fmt.Errorf("committing: %w", err))
	}
	l.stop(err)
	return fmt.Errorf("committing, outcome unknown: %w", err)
}

// written reports whether the file may hold transaction id.
func (l *Ledger) written(id int) bool {
	newest := id
	err := l.db.View(func(tx *bbolt.Tx) error {
		newest = tx.ID()
		return nil
	})
	return err != nil || newest >= id
}

func (l *Ledger) stop(cause error) {
	err := fmt.Errorf("%w: %w", ErrStopped, cause)
	l.stopped.CompareAndSwap(nil, &err)
}

// isFull reports a write that found no room. A sync that says so is another matter: what it
// left behind is not known.
func isFull(err error) bool {
	var at *fs.PathError
	return errors.As(err, &at) && at.Op == "write" && noRoom(at.Err)
}

func noRoom(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }
