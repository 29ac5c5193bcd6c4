package brokertest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

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
// and do not wait.
type Memory struct {
	// turn is held while an update runs.
	turn sync.Mutex

	// mu guards the fields below. Records are replaced and entries are appended, so a snapshot of either never
	// changes.
	mu      sync.Mutex
	records *record
	entries []broker.Entry
	fault   func(n int, entries []broker.Entry) Fault
	commits int
}

var _ broker.Ledger = (*Memory)(nil)

// NewMemory returns an empty ledger.
func NewMemory() *Memory { return &Memory{} }

// Fail lets f decide about each update that succeeded and appended an entry. n counts these updates from 1, starting
// with this call, and entries are the appended ones. f is called by one goroutine at a time and must not use the
// ledger. Nil: no faults.
func (m *Memory) Fail(f func(n int, entries []broker.Entry) Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault, m.commits = f, 0
}

// Update implements broker.Ledger. f must not call Update.
func (m *Memory) Update(ctx context.Context, f func(broker.Tx) error) error {
	m.turn.Lock()
	defer m.turn.Unlock()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", broker.ErrNotCommitted, err)
	}
	tx := m.begin()
	if err := f(tx); err != nil {
		return err
	}
	switch {
	case len(tx.appended) == 0 && tx.put:
		return fmt.Errorf("%w: %w", broker.ErrNotCommitted, broker.ErrNoEntry)
	case len(tx.appended) == 0:
		return nil
	}
	return m.commit(tx)
}

func (m *Memory) commit(tx *memoryTx) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.commits++
	fault := None
	if m.fault != nil {
		fault = m.fault(m.commits, slices.Clone(tx.appended))
	}
	if fault == NotCommitted {
		return fmt.Errorf("%w: %w", broker.ErrNotCommitted, ErrFault)
	}
	m.records, m.entries = tx.records, append(m.entries, tx.appended...)
	if fault == CommittedButFails {
		return fmt.Errorf("outcome unknown: %w", ErrFault)
	}
	return nil
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
	all := m.begin().entries
	all = all[min(uint64(after), uint64(len(all))):]
	return slices.Clone(all[:max(0, min(limit, len(all)))]), nil
}

func (m *Memory) begin() *memoryTx {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &memoryTx{records: m.records, entries: m.entries}
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
	put      bool
	readOnly bool
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

func (tx *memoryTx) Append(e broker.Entry) (broker.Revision, error) {
	if tx.readOnly {
		return 0, errReadOnly
	}
	e.Revision = broker.Revision(len(tx.entries) + len(tx.appended) + 1)
	e.At, e.Policies = e.At.UTC(), slices.Clone(e.Policies)
	tx.appended = append(tx.appended, e)
	return e.Revision, nil
}
