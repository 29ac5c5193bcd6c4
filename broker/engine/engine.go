// Package engine carries out the procedures over the ports of package broker: open a chain, delegate, issue a secret for
// one step, collect it, close it, report a violation, plan and carry out a revocation, and resume after a crash.
//
// It does no I/O and never reads the clock. Three rules shape every procedure. Before an act that cannot be undone, the
// intent is committed. A secret is handed over only after a commit that found nothing fenced. An unknown outcome is a state,
// which ends by proof or by time.
package engine

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

// Config is what a [Broker] is made of.
type Config struct {
	Ledger   broker.Ledger
	Policy   func() broker.Policy      // the running bundle's snapshot; called once for each request
	Vault    broker.Vault              // mints and kills
	Backends map[string]broker.Backend // by the name that tools use
	Now      func() time.Time
	Random   io.Reader // for ids; crypto/rand.Reader but in tests

	// Alarm is told what a person should see and no request can answer: a kill that Vault
	// refused, a sweep that found an orphan. It must not block. Nil: nobody is told, and only the
	// ledger shows it.
	Alarm func(op string, err error)

	MintTimeout time.Duration // how long a mint is waited for; zero means 10 s
	MintBound   time.Duration // how long Vault may still complete a request that was given up (its max_request_duration); zero means 90 s
	SweepEvery  time.Duration // how often orphans are searched for; zero means 1 min, negative never
	Workers     int           // kills under way at once for each backend; zero means 8
}

// Engine carries out the procedures. Make one with [New]; it is safe for concurrent use.
type Engine struct {
	cfg    Config
	hub    volatile.Hub
	cache  records.Cache
	reaper *closing.Reaper

	watchdog   *volatile.Watchdog
	deliveries volatile.Deliveries
	plans      volatile.Latest[string, planned]                               // by token; executing one shows what has been added
	expected   volatile.Latest[broker.RevocationID, []broker.Acknowledgement] // the holders that must acknowledge: the set does not change after the fence

	reconciling sched.Busy[broker.RevocationID]  // by this process
	touching    sched.Busy[broker.ValueDigest]   // canary values that are being recorded as presented
	tokenLocks  sched.Locks[broker.DelegationID] // one delegation's token is made once at a time

	ctx  context.Context // ends with Stop: the lifetime of background work
	stop context.CancelFunc
	work sync.WaitGroup
}

// planned is the set that a plan was made of. A restart forgets it, and the plan must be made again.
type planned struct {
	selector string
	set      map[string]bool
	at       time.Time
}

// background runs f until it returns; Stop waits for it.
func (e *Engine) background(f func()) {
	e.work.Go(f)
}

// newID draws an id with the given two-letter prefix.
func (e *Engine) newID(prefix string) (string, error) {
	return broker.NewID(prefix, e.cfg.Now(), e.cfg.Random)
}

// update runs one transaction for the procedure op. Entries of the transaction wake whoever
// watches their chains.
func (e *Engine) update(ctx context.Context, op string, f func(*records.Tx) error) error {
	var recording topicTx
	err := e.cfg.Ledger.Update(ctx, func(tx broker.Tx) error {
		recording = topicTx{Tx: tx}
		return f(e.cache.In(&recording))
	})
	if err == nil {
		e.hub.Wake(recording.topics)
		return nil
	}
	var refusal *broker.Error
	if errors.As(err, &refusal) {
		return refusal
	}
	return broker.Errorf(broker.Unavailable, op, "the ledger cannot record this now, and nothing was handed out").
		With(broker.CodeLedgerDown).Because(err)
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

// touchedTx remembers whom the entries of a transaction are about.
type topicTx struct {
	broker.Tx
	topics []volatile.Topic
}

func (t *topicTx) Append(entry broker.Entry) (broker.Revision, error) {
	t.topics = append(t.topics, volatile.Topic{Chain: entry.Chain, Fences: entry.Op == broker.OpFence || entry.Op == broker.OpFreeze || entry.Op == broker.OpUnfreeze})
	return t.Tx.Append(entry)
}

// after gives a context for cleaning up after a request, which may itself be over.
func detached(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

// checkText refuses text that is too long or could forge a line of a log or terminal.
func checkText(op, what, s string, least, most int) error {
	if len(s) < least || len(s) > most {
		return broker.Errorf(broker.Malformed, op, "%s must be %d to %d bytes", what, least, most)
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == 0xfffd || r >= 0x80 && r < 0xa0 || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return broker.Errorf(broker.Malformed, op, "%s has a control character or is not valid UTF-8", what)
		}
	}
	return nil
}

// asUnavailable keeps a classified error and makes Unavailable of any other.
func asUnavailable(err error, code broker.Code, msg string) error {
	var refusal *broker.Error
	if errors.As(err, &refusal) {
		return refusal
	}
	return broker.Errorf(broker.Unavailable, "issue", "%s", msg).With(code).Because(err).After(time.Second)
}

// kill ends a token that the ledger may not know, best effort: it has a hard end of its own.
func (e *Engine) kill(ctx context.Context, token broker.Handle) {
	clean, cancel := detached(ctx, e.cfg.MintTimeout)
	defer cancel()
	if err := e.cfg.Vault.Kill(clean, token.Accessor); err != nil {
		e.cfg.Alarm("ending an unused token", err)
	}
}

// orUnknown gives the error of a read, or the refusal of what was not found.
func orNotFound(err error, unknown *broker.Error) error {
	if err != nil {
		return err
	}
	return unknown
}
