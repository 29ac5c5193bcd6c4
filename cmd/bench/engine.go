package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/store/bolt"
)

// embedded is the real engine on the real embedded ledger, with a Vault and a target in memory.
type embedded struct {
	*engine.Engine
	ledger *bolt.Ledger
}

const engineTool = broker.ToolName("db.read")

func newEngine(ctx context.Context, path string) (*embedded, error) {
	ledger, err := bolt.Open(bolt.Config{Path: path, Reserve: -1})
	if err != nil {
		return nil, err
	}
	return newEngineOn(ctx, ledger)
}

func newEngineOn(ctx context.Context, ledger *bolt.Ledger) (e *embedded, err error) {
	target, policy := brokertest.NewTarget(), brokertest.AllowAll(engineTool)
	t := policy.Tools[engineTool]
	t.TTL = broker.MaxTTL
	policy.Tools[engineTool] = t
	e = &embedded{ledger: ledger}
	if e.Engine, err = engine.New(engine.Config{Ledger: ledger, Policy: func() broker.Policy { return policy }, Vault: brokertest.NewVault(target),
		Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1}); err != nil {
		return nil, errors.Join(err, ledger.Close())
	}
	if err := e.Resume(ctx); err != nil {
		return nil, errors.Join(err, e.close())
	}
	return e, nil
}

func (e *embedded) close() error {
	e.Stop()
	return e.ledger.Close()
}

func caller() broker.Caller {
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://pawl.dev/agent/bench"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
}

func (e *embedded) open(ctx context.Context) (broker.Delegation, error) {
	return e.Open(ctx, caller(), broker.OpenRequest{Task: "bench", Rights: []broker.Right{{Tool: engineTool, Use: true}}})
}

func (e *embedded) issue(ctx context.Context, d broker.Delegation) (broker.Issued, error) {
	return e.Issue(ctx, caller(), broker.StepRequest{Delegation: d.ID, Tool: engineTool})
}

// grow makes a chain with n live grants. It issues one and copies its records under other ids. To the engine the
// copies are like the grants that it finds after a restart: it knows their secrets by name.
func (e *embedded) grow(ctx context.Context, n int) (broker.Delegation, error) {
	return e.growIn(ctx, n, "l/", 0)
}

// growIn is grow for grants in another list of the chain: "p/" has closed ones. Each has a number of entries.
func (e *embedded) growIn(ctx context.Context, n int, list string, entries int) (broker.Delegation, error) {
	d, err := e.open(ctx)
	if err != nil {
		return d, err
	}
	first, err := e.issue(ctx, d)
	if err != nil {
		return d, err
	}
	old := string(first.Grant.ID)
	var raw []byte
	listed := []byte{} // in the list of live grants
	if err := e.ledger.View(ctx, func(tx broker.Tx) error {
		v, err := tx.Get("g/" + old)
		raw = append(raw, v...)
		if err != nil || list != "l/" {
			return err
		}
		v, err = tx.Get(list + string(d.Chain) + "/" + old)
		listed = append(listed, v...)
		return err
	}); err != nil || raw == nil {
		return d, errors.Join(err, errors.New("the ledger does not store grants under g/"))
	}
	const batch = 2000
	for from := 1; from < n; from += batch {
		if err := e.ledger.Update(ctx, func(tx broker.Tx) error {
			for i := from; i < min(from+batch, n); i++ {
				id := fmt.Sprintf("%s%010d", old[:len(old)-10], i)
				if err := tx.Put("g/"+id, []byte(strings.ReplaceAll(string(raw), old, id))); err != nil {
					return err
				}
				if err := tx.Put(list+string(d.Chain)+"/"+id, listed); err != nil {
					return err
				}
				for range entries {
					_, err := tx.Append(broker.Entry{At: time.Now(), Actor: caller().ID.String(), Op: broker.OpIssued, Chain: d.Chain,
						Delegation: d.ID, Grant: broker.GrantID(id), Tool: engineTool})
					if err != nil {
						return err
					}
				}
			}
			_, err := tx.Append(broker.Entry{At: time.Now(), Actor: "bench", Op: broker.OpIssued, Chain: d.Chain})
			return err
		}); err != nil {
			return d, err
		}
	}
	return d, nil
}

// measureLedger times issuing without Vault. A step waits for one durable transaction, and its second record is durable
// with another.
func measureLedger(ctx context.Context, b *bench) error {
	const clients = 64
	var ours, theirs report.Samples
	n := 0
	for round := range pick(b, 5, 3) {
		l, err := engineRound(ctx, filepath.Join(b.dir, fmt.Sprintf("engine-%d.db", round)), clients, pick(b, 3*time.Second, time.Second))
		if err != nil {
			return err
		}
		ours, n = append(ours, l.perSecond()), n+len(l.latencies)
		if l, err = bareRound(filepath.Join(b.dir, fmt.Sprintf("bare-%d.db", round)), clients, pick(b, 3*time.Second, time.Second)); err != nil {
			return err
		}
		theirs = append(theirs, l.perSecond())
	}
	b.report.Add(report.Row{Name: "ledger.bolt.c64.per_s", Unit: "per second", N: n,
		Against: "bbolt alone: 64 writers, the same number of durable records: each waits for one batched transaction, which has two " +
			"records of 800 bytes and two entries of 300"}, ours, theirs)
	return b.stepBytes(ctx)
}

// stepBytes measures the pages of the ledger that a step takes once it is closed.
func (b *bench) stepBytes(ctx context.Context) error {
	path, n := filepath.Join(b.dir, "steps.db"), pick(b, 5000, 500)
	if err := takeAndClose(ctx, path, n/5); err != nil { // the first steps also fill half-empty pages
		return err
	}
	before, err := process.UsedBytes(path)
	if err != nil {
		return err
	}
	if err := takeAndClose(ctx, path, n); err != nil {
		return err
	}
	after, err := process.UsedBytes(path)
	if err != nil {
		return err
	}
	b.report.Add(report.Row{Name: "ledger.bytes_per_step", Unit: "bytes", N: n,
		Note: "of pages in use, for a step that was taken and closed"}, report.Samples{(after - before) / float64(n)}, nil)
	return nil
}

// takeAndClose takes n steps of 16 chains and waits until each is closed. It leaves the ledger closed.
func takeAndClose(ctx context.Context, path string, n int) (err error) {
	e, err := newEngine(ctx, path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	held := make([]broker.Delegation, 16)
	for i := range held {
		if held[i], err = e.open(ctx); err != nil {
			return err
		}
	}
	return each(len(held), n, func(i int) error {
		got, err := e.issue(ctx, held[i%len(held)])
		if err != nil {
			return err
		}
		g, err := e.Close(ctx, caller(), got.Grant.ID)
		if err == nil && g.State != broker.StateClosed {
			err = fmt.Errorf("a step that was closed is %s", g.State)
		}
		return err
	})
}

func engineRound(ctx context.Context, path string, clients int, d time.Duration) (l loop, err error) {
	e, err := newEngine(ctx, path)
	if err != nil {
		return l, err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	held := make([]broker.Delegation, clients)
	for i := range held {
		if held[i], err = e.open(ctx); err != nil {
			return l, err
		}
		if _, err = e.issue(ctx, held[i]); err != nil {
			return l, err
		}
	}
	l = closedLoop(clients, d, 1<<30, func(c int) error { _, err := e.issue(ctx, held[c]); return err })
	return l, l.err
}

func bareRound(path string, clients int, d time.Duration) (l loop, err error) {
	db, records, entries, err := bare(path)
	if err != nil {
		return l, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	db.MaxBatchSize = clients
	last := make([][]byte, clients) // of each client
	for i := range last {
		last[i] = []byte(rand.Text())
	}
	l = closedLoop(clients, d, 1<<30, func(c int) error {
		key := []byte(rand.Text())
		if err := db.Batch(func(tx *bbolt.Tx) error { // the first record of a step, and the second of the one before
			return errors.Join(putRecord(tx, records, entries, key), putRecord(tx, records, entries, last[c]))
		}); err != nil {
			return err
		}
		last[c] = key
		return nil
	})
	return l, l.err
}

// putRecord puts a record and appends an entry.
func putRecord(tx *bbolt.Tx, records, entries, key []byte) error {
	log := tx.Bucket(entries)
	next, err := log.NextSequence()
	if err != nil {
		return err
	}
	if err := log.Put(fmt.Appendf(nil, "%016x", next), make([]byte, 300)); err != nil {
		return err
	}
	return tx.Bucket(records).Put(key, make([]byte, 800))
}

// commit times n synced commits of bbolt alone, one after the other.
func commit(path string, n int) (took report.Samples, err error) {
	db, records, entries, err := bare(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	for range n {
		began := time.Now()
		if err := db.Update(func(tx *bbolt.Tx) error { return putRecord(tx, records, entries, []byte(rand.Text())) }); err != nil {
			return nil, err
		}
		took = append(took, ms(time.Since(began)))
	}
	return took, nil
}

// bare opens bbolt alone, with two buckets.
func bare(path string) (db *bbolt.DB, records, entries []byte, err error) {
	if db, err = bbolt.Open(path, 0o600, &bbolt.Options{NoFreelistSync: true, FreelistType: bbolt.FreelistMapType}); err != nil {
		return nil, nil, nil, err
	}
	records, entries = []byte("records"), []byte("entries")
	if err := db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(records)
		_, err2 := tx.CreateBucketIfNotExists(entries)
		return errors.Join(err, err2)
	}); err != nil {
		return nil, nil, nil, errors.Join(err, db.Close())
	}
	return db, records, entries, nil
}

// openLedger times opening a ledger alone.
func openLedger(path string) (time.Duration, error) {
	began := time.Now()
	ledger, err := bolt.Open(bolt.Config{Path: path, Reserve: -1})
	if err != nil {
		return 0, err
	}
	return time.Since(began), ledger.Close()
}
