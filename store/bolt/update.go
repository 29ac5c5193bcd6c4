package bolt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/store/bolt/internal/journal"
)

// maxBatch is the limit of updates in one commit.
const maxBatch = 512

// stage is a point of a commit at which tests inject a fault.
type stage int

const (
	beforeCommit stage = iota
	afterCommit
)

// request is one queued Update or Order.
type request struct {
	f       func(broker.Tx) error
	durable func(error)  // of an Order; nil: it is an Update
	urgent  bool         // see broker.Urgent
	claimed atomic.Bool  // by the writer, or by its caller when ctx is done
	done    chan outcome // of size 1: the writer never waits for a caller
}

type outcome struct {
	err   error
	panic any
}

// Update implements broker.Ledger. f runs on the writer's goroutine. It must not wait for another Update or for
// anything slow, because every other Update waits for it. Update re-raises a panic of f. If ctx is done before f has
// begun, nothing is changed. After that Update ignores ctx and waits for the outcome.
func (l *Ledger) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.enqueue(ctx, &request{f: f, urgent: broker.IsUrgent(ctx)})
}

// Order implements broker.Ledger. It is [Ledger.Update] but for the sync: it waits only for one that is under way.
func (l *Ledger) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	return l.enqueue(ctx, &request{f: f, durable: done})
}

// enqueue gives the request to the writer and waits for the outcome.
func (l *Ledger) enqueue(ctx context.Context, r *request) error {
	if err := ctx.Err(); err != nil {
		return notCommitted(err)
	}
	r.done = make(chan outcome, 1)
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return notCommitted(ErrClosed)
	}
	if r.urgent {
		l.urgent = append(l.urgent, r)
	} else {
		l.queue = append(l.queue, r)
	}
	l.mu.Unlock()
	l.notify()

	var o outcome
	select {
	case o = <-r.done:
	case <-ctx.Done():
		if r.claimed.CompareAndSwap(false, true) {
			return notCommitted(ctx.Err())
		}
		o = <-r.done
	}
	if o.panic != nil {
		panic(o.panic)
	}
	return o.err
}

// View implements broker.Ledger. It never waits for an Update.
func (l *Ledger) View(ctx context.Context, f func(broker.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return l.view(func(btx *bbolt.Tx, p *pending) error {
		return f(&tx{records: btx.Bucket(bucketRecords), readOnly: true, view: btx, pending: p})
	})
}

// view runs f on a snapshot of the file, with the updates that are not in it.
func (l *Ledger) view(f func(*bbolt.Tx, *pending) error) error {
	l.state.RLock()
	p := l.pending
	btx, err := l.db.Begin(false)
	l.state.RUnlock()
	if err != nil {
		return err
	}
	defer func() { _ = btx.Rollback() }() // the end of a read fails only after another end
	if p != nil && p.ordered {
		switch h, err := readHead(btx); {
		case err != nil:
			return err
		case h != p.from:
			p = nil // a commit has just taken all of it into the file
		}
	}
	return f(btx, p)
}

func notCommitted(err error) error { return fmt.Errorf("%w: %w", broker.ErrNotCommitted, err) }

// notify wakes the writer. It never blocks.
func (l *Ledger) notify() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// write is the writer goroutine.
func (l *Ledger) write() {
	defer close(l.done)
	for {
		if l.verdict.Load() == nil {
			select {
			case err := <-l.result:
				l.settle(err)
			default:
			}
		}
		batch, closed := l.dequeue()
		switch {
		case len(batch) > 0 || l.mustSync(closed):
			l.process(batch, l.mustSync(closed))
		case closed:
			if l.verdict.Load() == nil { // Close has cancelled it
				l.settle(errors.Join(<-l.result, ErrClosed))
			}
			return
		default:
			l.sleep()
		}
	}
}

// dequeue removes up to maxBatch requests from the queue, and the urgent ones. These are a batch of their own while
// others wait, which then are in the next batch.
func (l *Ledger) dequeue() (batch []*request, closed bool) {
	l.gather()
	l.mu.Lock()
	defer l.mu.Unlock()
	batch, l.urgent = l.urgent, nil
	if l.passed = len(batch) > 0 && len(l.queue) > 0 && !l.passed; l.passed {
		return batch, l.closed
	}
	n := min(len(l.queue), maxBatch)
	batch = append(batch, l.queue[:n]...)
	l.queue = l.queue[n:]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	return batch, l.closed
}

// gather first lets other runnable goroutines enqueue their next updates, such as the callers of the previous batch.
// Without it every second batch would have only one or two updates. An urgent update waits for none of them.
func (l *Ledger) gather() {
	for n := -1; ; {
		l.mu.Lock()
		urgent := len(l.urgent) > 0
		l.mu.Unlock()
		if urgent {
			return
		}
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

// process runs the Orders of the batch, and then commits the rest of it with all ordered changes. It sends
// the outcome to every caller. Without a rest it commits only if sync is set.
func (l *Ledger) process(batch []*request, sync bool) {
	if l.full.Load() && l.reserve.due() && l.reserve.acquire() == nil {
		l.full.Store(false)
	}
	var updates, orders []*request
	for _, r := range batch {
		switch {
		case !r.claimed.CompareAndSwap(false, true):
		case r.durable != nil && l.pending.isOrdered():
			orders = append(orders, r)
		default:
			updates = append(updates, r)
		}
	}
	l.order(orders)
	if len(updates) == 0 && !sync {
		return
	}
	ran, err := l.commit(updates, sync)
	if isFull(err) && l.stopped.Load() == nil {
		// Nothing was written. Fences and endings may use the reserve, and so may ordered changes: their callers have gone
		// on. The other updates fail with ErrDiskFull.
		l.full.Store(true)
		l.reserve.release()
		ran, err = l.commit(ran, sync)
	}
	if isFull(err) {
		err = fmt.Errorf("%w: %w", ErrDiskFull, err)
	}
	if err != nil {
		l.dropOrdered(err)
	}
	for _, r := range ran {
		if r.durable != nil && err == nil { // an Order while the file is checked
			r.durable(nil)
		}
		r.done <- outcome{err: err}
	}
}

// commit runs the functions on the ordered changes, and commits both. It sends the outcome of each failed function itself,
// and returns the other requests with their common outcome. If the functions change nothing, the ordered changes wait on,
// unless sync is set.
func (l *Ledger) commit(batch []*request, sync bool) (ran []*request, err error) {
	if err := l.stopped.Load(); err != nil {
		return batch, notCommitted(*err)
	}
	if !l.pending.isOrdered() {
		return l.commitPending(batch)
	}
	btx, err := l.db.Begin(true)
	if err != nil {
		return batch, notCommitted(err)
	}
	t := &tx{records: btx.Bucket(bucketRecords), log: btx.Bucket(bucketLog), meta: btx.Bucket(bucketMeta), head: l.head}
	t.log.FillPercent = 1       // entries are only appended
	t.records.FillPercent = 0.8 // costs nothing for random keys, saves writes for ordered ones
	if err := l.pending.foldInto(btx); err != nil {
		return batch, errors.Join(notCommitted(err), btx.Rollback())
	}
	if ran, err = l.runAll(batch, t); err != nil {
		return ran, errors.Join(notCommitted(err), btx.Rollback())
	}
	if t.head == l.head && (l.pending == nil || !sync) {
		_ = btx.Rollback() // nothing was changed
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
	l.synced.Store(uint64(l.head.revision))
	l.settleOrdered(nil)
	return ran, nil
}

// commitPending is commit while the file is checked, or after it was found damaged. It only reads the file.
func (l *Ledger) commitPending(batch []*request) (ran []*request, err error) {
	btx, err := l.db.Begin(false)
	if err != nil {
		return batch, notCommitted(err)
	}
	defer func() { _ = btx.Rollback() }() // it was only read
	next := l.pending.clone()
	t := &tx{records: btx.Bucket(bucketRecords), head: l.head, pending: next, changed: map[string][]byte{}}
	if ran, err = l.runAll(batch, t); err != nil {
		return ran, notCommitted(err)
	}
	if t.head == l.head {
		return ran, nil // nothing was changed
	}
	one := frame{From: l.head.encode(), Head: t.head.encode(), Entries: next.entries[len(l.pending.entries):]}
	for key, stored := range t.changed {
		one.Puts = append(one.Puts, put{[]byte(key), stored})
	}
	if err := l.fault(beforeCommit); err != nil {
		return ran, notCommitted(err)
	}
	record, err := json.Marshal(one)
	if err != nil {
		return ran, notCommitted(err)
	}
	err = l.journal.Append(record)
	if err == nil {
		err = l.fault(afterCommit)
	} else if !errors.Is(err, journal.ErrUnsynced) {
		return ran, notCommitted(err)
	}
	if err != nil { // as for a commit, the next sync would not report it
		l.stop(err)
		return ran, fmt.Errorf("committing, outcome unknown: %w", err)
	}
	next.head, l.head = t.head, t.head
	l.synced.Store(uint64(l.head.revision))
	l.publish(next)
	return ran, nil
}

// runAll runs the functions, each on the changes of the ones before it. After an error, which is of the file, all of
// them fail.
func (l *Ledger) runAll(batch []*request, t *tx) (ran []*request, err error) {
	for i, r := range batch {
		if o, ok := l.run(r, t); !ok {
			r.done <- o
			continue
		}
		ran = append(ran, r)
		if err := t.apply(); err != nil {
			return append(ran, batch[i+1:]...), err
		}
	}
	return ran, nil
}

// run runs one function. It reports whether the changes in t must be applied.
func (l *Ledger) run(r *request, t *tx) (o outcome, ok bool) {
	t.reset()
	defer func() {
		if v := recover(); v != nil {
			o, ok = outcome{panic: fmt.Sprintf("%v [in a ledger update]\n%s", v, debug.Stack())}, false
		}
	}()
	if err := r.f(t); err != nil {
		return outcome{err: err}, false
	}
	switch {
	case (len(t.puts) > 0 || t.trimmed > 0) && len(t.entries) == 0:
		return outcome{err: notCommitted(broker.ErrNoEntry)}, false
	case len(t.entries) > 0 && !t.reserve && (!t.pending.isOrdered() || l.full.Load()):
		return outcome{err: notCommitted(l.Err())}, false
	}
	return outcome{}, true
}

// finish commits. After a failure other than a full disk it stops the ledger: the state of the disk after a failed sync
// is unknown, and the next sync would not report the failure.
func (l *Ledger) finish(btx *bbolt.Tx) (err error) {
	id := btx.ID()
	defer func() {
		if v := recover(); v != nil { // bbolt's assertions
			err = fmt.Errorf("committing, outcome unknown: %v", v)
			l.stop(err)
			_ = btx.Rollback() // otherwise Close would wait for it indefinitely
		}
	}()
	if err = btx.Commit(); err == nil {
		err = l.fault(afterCommit)
	}
	switch {
	case err == nil:
		return nil
	case !l.written(id):
		// The meta page, which is written last, was not written.
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

// isFull reports whether a write failed for lack of space. It excludes a sync with the same error, because the state of
// the disk after that is unknown.
func isFull(err error) bool {
	var at *fs.PathError
	return errors.As(err, &at) && at.Op == "write" && noRoom(at.Err)
}

func noRoom(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// order runs the functions on a copy of the ordered changes, and publishes it. It sends the outcomes: nothing waits for a
// sync.
func (l *Ledger) order(batch []*request) {
	if len(batch) == 0 {
		return
	}
	ran, err := l.runOrdered(batch)
	for _, r := range ran {
		r.done <- outcome{err: err}
	}
}

func (l *Ledger) runOrdered(batch []*request) (ran []*request, err error) {
	if err := l.stopped.Load(); err != nil {
		return batch, notCommitted(*err)
	}
	btx, err := l.db.Begin(false)
	if err != nil {
		return batch, notCommitted(err)
	}
	defer func() { _ = btx.Rollback() }() // it was only read
	next := &pending{ordered: true, from: l.head, head: l.head, puts: map[string][]byte{}}
	if l.pending != nil {
		next = l.pending.clone()
	}
	t := &tx{records: btx.Bucket(bucketRecords), head: l.head, pending: next, changed: map[string][]byte{}}
	if ran, err = l.runAll(batch, t); err != nil {
		return ran, notCommitted(err)
	}
	if t.head == l.head && l.pending == nil {
		for _, r := range ran {
			r.durable(nil) // nothing was changed, and all that they read is durable
		}
		return ran, nil
	}
	if len(l.waiting) == 0 {
		l.oldest = time.Now()
	}
	for _, r := range ran {
		l.waiting = append(l.waiting, r.durable)
	}
	next.head, l.head = t.head, t.head
	l.publish(next)
	return ran, nil
}

// publish has Views read the ordered changes of p.
func (l *Ledger) publish(p *pending) {
	l.state.Lock()
	l.pending = p
	l.state.Unlock()
}

// settleOrdered reports that the ordered changes are in the file, or are lost.
func (l *Ledger) settleOrdered(err error) {
	if l.pending != nil {
		l.publish(nil)
	}
	told := l.waiting
	l.waiting = nil
	for _, durable := range told {
		durable(err)
	}
}

// dropOrdered gives up the ordered changes after a commit that failed. Nothing else was built on it: what ran after it has
// failed too.
func (l *Ledger) dropOrdered(err error) {
	if !l.pending.isOrdered() {
		return
	}
	if l.pending != nil {
		l.head = l.pending.from
	}
	l.settleOrdered(err)
}

// mustSync reports whether the ordered changes must be committed now, without an update. closed: the ledger is closed.
func (l *Ledger) mustSync(closed bool) bool {
	return len(l.waiting) > 0 && (closed || time.Since(l.oldest) >= broker.MaxOrderDelay)
}

// sleep waits for the next request, and no longer than ordered changes may wait.
func (l *Ledger) sleep() {
	if len(l.waiting) == 0 {
		<-l.wake
		return
	}
	timer := time.NewTimer(time.Until(l.oldest.Add(broker.MaxOrderDelay)))
	defer timer.Stop()
	select {
	case <-l.wake:
	case <-timer.C:
	}
}
