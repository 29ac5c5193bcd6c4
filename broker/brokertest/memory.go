package brokertest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Fault is an injected failure of an update at its commit.
type Fault int

// The faults.
const (
	None              Fault = iota
	NotCommitted            // nothing is applied; the error wraps broker.ErrNotCommitted
	CommittedButFails       // everything is applied, but Update returns an error that does not say so
)

// ErrFault is in every error that a Fault causes.
var ErrFault = errors.New("a fault injected by the test")

// Memory is a broker.Ledger in memory. Updates run one at a time on their callers' goroutines. Views run on snapshots
// and do not wait. Durable changes survive [Memory.Crash].
type Memory struct {
	// turn is held while an update runs, and while one becomes durable.
	turn sync.Mutex

	// mu guards the fields below. Records are replaced and entries are appended, so a snapshot of either never
	// changes.
	mu      sync.Mutex
	now     snapshot // with the ordered changes
	durable snapshot
	ordered []ordered // since durable
	fault   func(n int, entries []broker.Entry) Fault
	commits int
	crashed bool
}

type snapshot struct {
	records *record
	entries []broker.Entry
	trimmed broker.Revision // the entries up to it are not returned any more
}

// clipped is a snapshot to which other entries can be appended than were.
func (s snapshot) clipped() snapshot { return snapshot{s.records, slices.Clip(s.entries), s.trimmed} }

// ordered is an update that is not durable.
type ordered struct {
	appended []broker.Entry
	done     func(error)
}

var _ broker.Ledger = (*Memory)(nil)

// NewMemory returns an empty ledger.
func NewMemory() *Memory { return &Memory{} }

// Fail lets f decide about each update that succeeded and appended an entry, as it becomes durable. n counts these
// updates from 1, starting with this call, and entries are the appended ones. f is called by one goroutine at a time and
// must not use the ledger. Updates that become durable together fail together. Nil: no faults.
func (m *Memory) Fail(f func(n int, entries []broker.Entry) Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault, m.commits = f, 0
}

// Crash returns the ledger as the next process finds it: with the durable changes. m no longer changes.
func (m *Memory) Crash() *Memory {
	m.turn.Lock()
	defer m.turn.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.crashed = true
	left := m.durable.clipped()
	return &Memory{now: left, durable: left}
}

// Update implements broker.Ledger. f must not call Update.
func (m *Memory) Update(ctx context.Context, f func(broker.Tx) error) error {
	m.turn.Lock()
	defer m.turn.Unlock()
	tx, err := m.run(ctx, f)
	if err != nil || tx == nil {
		return err
	}
	return m.commit(tx)
}

// Order implements broker.Ledger. f must not call Update or Order.
func (m *Memory) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	m.turn.Lock()
	defer m.turn.Unlock()
	tx, err := m.run(ctx, f)
	if err != nil {
		return err
	}
	if tx == nil {
		done(nil)
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = tx.after()
	if m.ordered = append(m.ordered, ordered{tx.appended, done}); len(m.ordered) == 1 {
		time.AfterFunc(broker.MaxOrderDelay, m.Flush)
	}
	return nil
}

// Flush makes the ordered changes durable.
func (m *Memory) Flush() {
	m.turn.Lock()
	defer m.turn.Unlock()
	_ = m.commit(nil) // each ordered update has been told
}

// run runs f in a transaction. It returns nil when f changed nothing.
func (m *Memory) run(ctx context.Context, f func(broker.Tx) error) (*memoryTx, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", broker.ErrNotCommitted, err)
	}
	tx := m.begin()
	if err := f(tx); err != nil {
		return nil, err
	}
	switch {
	case tx.crashed:
		return nil, fmt.Errorf("%w: %w", broker.ErrNotCommitted, ErrFault)
	case len(tx.appended) == 0 && tx.put:
		return nil, fmt.Errorf("%w: %w", broker.ErrNotCommitted, broker.ErrNoEntry)
	case len(tx.appended) == 0:
		return nil, nil
	}
	return tx, nil
}

// commit makes the ordered changes durable, and the transaction over it, if there is one.
func (m *Memory) commit(tx *memoryTx) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	waiting, fault := m.ordered, None
	if m.crashed || tx == nil && len(waiting) == 0 {
		return nil
	}
	m.ordered = nil
	for _, o := range waiting {
		fault = cmp.Or(fault, m.strikeLocked(o.appended))
	}
	if tx != nil {
		fault = cmp.Or(fault, m.strikeLocked(tx.appended))
		m.now = tx.after()
	}
	var err error
	switch fault {
	case NotCommitted:
		m.now, err = m.durable.clipped(), fmt.Errorf("%w: %w", broker.ErrNotCommitted, ErrFault)
	case CommittedButFails:
		m.durable, err = m.now, fmt.Errorf("outcome unknown: %w", ErrFault)
	default:
		m.durable = m.now
	}
	for _, o := range waiting {
		o.done(err)
	}
	return err
}

// strikeLocked asks for the fault of one update.
func (m *Memory) strikeLocked(entries []broker.Entry) Fault {
	m.commits++
	if m.fault == nil {
		return None
	}
	return m.fault(m.commits, slices.Clone(entries))
}

// View implements broker.Ledger.
func (m *Memory) View(ctx context.Context, f func(broker.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	tx := m.begin()
	tx.readOnly = true
	return f(tx)
}

// Entries returns up to limit entries with a revision greater than after.
func (m *Memory) Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	all := m.durable.entries
	after = max(after, m.durable.trimmed)
	m.mu.Unlock()
	all = all[min(uint64(after), uint64(len(all))):]
	return slices.Clone(all[:max(0, min(limit, len(all)))]), nil
}

func (m *Memory) begin() *memoryTx {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &memoryTx{records: m.now.records, entries: m.now.entries, trimmed: m.now.trimmed, crashed: m.crashed}
}

// Head implements broker.Tx.
func (tx *memoryTx) Head() (broker.Revision, error) {
	return broker.Revision(len(tx.entries) + len(tx.appended)), nil
}

// memoryTx is a transaction over a snapshot.
type memoryTx struct {
	records  *record
	entries  []broker.Entry // only read
	appended []broker.Entry
	trimmed  broker.Revision
	put      bool
	readOnly bool
	crashed  bool // the ledger takes nothing more
}

// after is the ledger with the transaction.
func (tx *memoryTx) after() snapshot {
	return snapshot{tx.records, append(tx.entries, tx.appended...), tx.trimmed}
}

var errReadOnly = errors.New("a view is read-only")

func (tx *memoryTx) Get(key string) ([]byte, error) { return tx.records.get(key), nil }

func (tx *memoryTx) Put(key string, value []byte) error {
	switch {
	case tx.readOnly:
		return errReadOnly
	case key == "":
		return errors.New("a key must not be empty")
	}
	tx.put = true
	if value == nil {
		tx.records = tx.records.without(key)
	} else {
		tx.records = tx.records.with(key, append([]byte{}, value...))
	}
	return nil
}

func (tx *memoryTx) Scan(prefix, after string, f func(key string, value []byte) bool) error {
	tx.records.scan(prefix, after, f)
	return nil
}

func (tx *memoryTx) ScanBack(prefix, before string, f func(key string, value []byte) bool) error {
	tx.records.scanBack(prefix, before, f)
	return nil
}

func (tx *memoryTx) Trim(through broker.Revision) error {
	switch {
	case tx.readOnly:
		return errReadOnly
	case through > broker.Revision(len(tx.entries)):
		return errors.New("the log has no such entry")
	}
	tx.trimmed, tx.put = max(tx.trimmed, through), true
	return nil
}

func (tx *memoryTx) Append(e broker.Entry) (broker.Revision, error) {
	if tx.readOnly {
		return 0, errReadOnly
	}
	e.Revision = broker.Revision(len(tx.entries) + len(tx.appended) + 1)
	e.At, e.Policies = e.At.UTC(), slices.Clone(e.Policies)
	tx.appended = append(tx.appended, e)
	return e.Revision, nil
}
