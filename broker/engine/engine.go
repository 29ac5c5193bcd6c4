// Package engine runs the procedures over the ports of package broker. They open a chain, delegate, issue a secret for
// one step, collect it, and close it. They report a violation, plan and execute a revocation, and resume after a crash.
//
// It does no I/O and never reads the clock. Three rules shape every procedure:
//   - The intent is committed before any act that cannot be undone.
//   - A secret is handed over only after a commit that found no fence over it.
//   - An unknown outcome is a recorded state. It ends by proof or by time.
package engine

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/ahead"
	"github.com/pawlsec/pawl/broker/engine/internal/archiving"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/indexing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
	"github.com/pawlsec/pawl/broker/engine/internal/sweeping"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

// Config configures an [Engine].
type Config struct {
	Ledger   broker.Ledger
	Policy   func() broker.Policy      // the running bundle's snapshot; called once for each request
	Vault    broker.Vault              // mints and kills
	Backends map[string]broker.Backend // by the name that tools use
	Now      func() time.Time
	Random   io.Reader // for ids and canary values; crypto/rand.Reader except in tests

	// Alarm receives events that need an operator and that no request reports: a kill that Vault refused, an orphan
	// that a sweep found. It must not block. Nil: these events are in the ledger only.
	Alarm func(op string, err error)

	MintTimeout time.Duration // of one mint; zero means 10 s
	// MintBound is how long Vault may take to complete a request after the client gave it up (Vault's
	// max_request_duration). Zero means 90 s.
	MintBound  time.Duration
	SweepEvery time.Duration // between two sweeps for orphans; zero means 1 min, negative never
	Workers    int           // concurrent kills for each backend; zero means 8

	Mints        int                // steps of one backend that run at a time; zero means 64
	WaitingMints int                // steps of one caller that wait for that; zero means 64
	Refusals     int                // of one caller recorded one by one a minute; zero means 60
	Refused      func(limit string) // is called for each request that a limit refuses; nil means no call
	OpenChains   int                // chains of one opener that are open at a time; zero means broker.MaxOpenChains

	Archive broker.Archive // keeps what is closed and older than Keep; nil means that it all stays in the ledger
	Keep    time.Duration  // zero means for ever
}

// Engine runs the procedures. [New] makes one. It is safe for concurrent use.
type Engine struct {
	cfg    Config
	hub    volatile.Hub
	cache  records.Cache
	index  indexing.Index
	ahead  *ahead.Book
	reaper *closing.Reaper
	closing.Process
	sweeper *sweeping.Sweeper
	past    archiving.Mover

	watchdog   *volatile.Watchdog
	deliveries volatile.Deliveries
	turns      volatile.Turns
	refusals   volatile.Refusals
	plans      volatile.Latest[string, planned] // by token

	// expected has the holders that must acknowledge a revocation. The set does not change after the fence.
	expected volatile.Latest[broker.RevocationID, []broker.Acknowledgement]

	reconciling sched.Busy[broker.RevocationID]  // revocations that this process reconciles
	progress    sync.Map                         // their progress: broker.RevocationID to *closing.Progress
	touching    sched.Busy[broker.ValueDigest]   // presented values that are being recorded
	tokenLocks  sched.Locks[broker.DelegationID] // serialize the creation of one delegation's token

	started time.Time // when Resume was called

	ctx  context.Context // ends with Stop: the lifetime of background work
	stop context.CancelFunc
	work sync.WaitGroup
}

// planned is the resolved set of a plan. A restart loses it, and the operator must make the plan again.
type planned struct {
	selector string
	set      map[string]bool
	at       time.Time
}

// background runs f in a goroutine. Stop waits for it.
func (e *Engine) background(f func()) { e.work.Go(f) }

// newID draws an id with the given two-letter prefix.
func (e *Engine) newID(prefix string) (string, error) {
	return broker.NewID(prefix, e.cfg.Now(), e.cfg.Random)
}

// update runs one transaction for the procedure op. After the commit it wakes the watchers of the chains that have
// entries in it.
func (e *Engine) update(ctx context.Context, op string, f func(*records.Tx) error) error {
	return record(e, op, f, func(f func(broker.Tx) error) error { return e.cfg.Ledger.Update(ctx, f) })
}

// order is [Engine.update] that does not wait for the disk. done is called as [broker.Ledger] has it.
func (e *Engine) order(ctx context.Context, op string, f func(*records.Tx) error, done func(error)) error {
	return record(e, op, f, func(f func(broker.Tx) error) error { return e.cfg.Ledger.Order(ctx, f, done) })
}

// record runs one transaction by write: an Update of the ledger, or an Order.
func record(e *Engine, op string, f func(*records.Tx) error, write func(func(broker.Tx) error) error) error {
	var last volatile.TopicTx
	err := write(func(tx broker.Tx) error {
		last = volatile.TopicTx{Tx: tx}
		return f(e.cache.In(&last))
	})
	if err == nil {
		e.hub.Wake(last.Topics)
		return nil
	}
	var refusal *broker.Error
	if errors.As(err, &refusal) {
		return refusal
	}
	refusal = broker.Errorf(broker.Unavailable, op, "the ledger cannot record this now, and nothing was handed out").
		With(broker.CodeLedgerDown).Because(err)
	if errors.Is(err, broker.ErrChecking) {
		return refusal.With(broker.CodeLedgerChecking).After(time.Second)
	}
	return refusal
}

// view runs one read for the procedure op.
func (e *Engine) view(ctx context.Context, op string, f func(*records.Tx) error) error {
	err := e.cfg.Ledger.View(ctx, func(tx broker.Tx) error { return f(e.cache.In(tx)) })
	var refusal *broker.Error
	if err == nil || errors.As(err, &refusal) {
		return err
	}
	return broker.Errorf(broker.Unavailable, op, "the ledger cannot be read now").With(broker.CodeLedgerDown).Because(err)
}

// detached returns a context for work that must complete although its request may have ended.
func detached(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

// asUnavailable returns a classified error as it is, and any other as the cause of an Unavailable.
func asUnavailable(err error, code broker.Code, msg string) error {
	var refusal *broker.Error
	if errors.As(err, &refusal) {
		return refusal
	}
	return broker.Errorf(broker.Unavailable, "issue", "%s", msg).With(code).Because(err).After(time.Second)
}

// kill revokes a token that the ledger may not know. It is best effort: Vault expires the token at its hard maximum.
func (e *Engine) kill(ctx context.Context, token broker.Handle) {
	killCtx, cancel := detached(ctx, e.cfg.MintTimeout)
	defer cancel()
	if err := e.cfg.Vault.Kill(killCtx, token.Accessor); err != nil {
		e.cfg.Alarm("ending an unused token", err)
	}
}

// orNotFound returns the error of a read, or unknown when the read succeeded and found no record.
func orNotFound(err error, unknown *broker.Error) error {
	if err != nil {
		return err
	}
	return unknown
}
