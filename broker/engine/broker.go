// Package engine carries out the procedures over the ports of package broker: open a chain, delegate, issue a secret for
// one step, collect it, close it, report a violation, plan and carry out a revocation, and resume after a crash.
//
// It does no I/O and never reads the clock. Three rules shape every procedure. Before an act that cannot be undone, the
// intent is committed. A secret is handed over only after a commit that found nothing fenced. An unknown outcome is a state,
// which ends by proof or by time.
package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
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
	// refused, a sweep that found a stray. It must not block. Nil: nobody is told, and only the
	// ledger shows it.
	Alarm func(op string, err error)

	MintTimeout time.Duration // how long a mint is waited for; zero means 10 s
	MintBound   time.Duration // how long Vault may still complete a request that was given up (its max_request_duration); zero means 90 s
	SweepEvery  time.Duration // how often strays are looked for; zero means 1 min, negative never
	Workers     int           // kills under way at once for each backend; zero means 8
}

// Broker carries out the procedures. Make one with [New]; it is safe for concurrent use.
type Engine struct {
	cfg    Config
	hub    hub
	closer *closer

	watchdog   *watchdog
	deliveries deliveries
	rules      ruleCache
	nodes      recordCache[broker.Delegation]
	chains     recordCache[broker.Chain]
	usages     recordCache[Usage]
	plans      planBook
	rolls      rolls

	pursued pursuits
	stuck   stuck
	touches touches

	branching keyedLocks // one delegation's token is made once at a time

	ctx  context.Context // ends with Stop: the lifetime of background work
	stop context.CancelFunc
	work sync.WaitGroup
}

// New validates cfg. Nothing runs in the background before [Broker.Resume].
func New(cfg Config) (*Engine, error) {
	for name, missing := range map[string]bool{
		"Ledger": cfg.Ledger == nil, "Policy": cfg.Policy == nil, "Vault": cfg.Vault == nil,
		"Backends": len(cfg.Backends) == 0, "Now": cfg.Now == nil, "Random": cfg.Random == nil,
	} {
		if missing {
			return nil, fmt.Errorf("broker: Config.%s is required", name)
		}
	}
	if cfg.Alarm == nil {
		cfg.Alarm = func(string, error) {}
	}
	cfg.MintTimeout = cmp.Or(cfg.MintTimeout, 10*time.Second)
	cfg.MintBound = cmp.Or(cfg.MintBound, 90*time.Second)
	cfg.SweepEvery = cmp.Or(cfg.SweepEvery, time.Minute)
	cfg.Workers = cmp.Or(cfg.Workers, 8)
	b := &Engine{cfg: cfg}
	b.ctx, b.stop = context.WithCancel(context.Background())
	b.closer = newCloser(b)
	b.watchdog = newWatchdog(b)
	return b, nil
}

// Stop ends the background work and waits for it. What was not finished is in the ledger, and
// [Broker.Resume] of the next Broker goes on with it.
func (b *Engine) Stop() {
	b.stop()
	b.work.Wait()
}

// background runs f until it returns; Stop waits for it.
func (b *Engine) background(f func()) {
	b.work.Go(f)
}

// newID draws an id with the given two-letter prefix.
func (b *Engine) newID(prefix string) (string, error) {
	return broker.NewID(prefix, b.cfg.Now(), b.cfg.Random)
}

// update runs one transaction for the procedure op. Entries of the transaction wake whoever
// watches their chains.
func (b *Engine) update(ctx context.Context, op string, f func(broker.Tx) error) error {
	var touched touchedTx
	err := b.cfg.Ledger.Update(ctx, func(tx broker.Tx) error {
		touched = touchedTx{Tx: tx}
		return f(&touched)
	})
	if err == nil {
		b.hub.wake(touched.names)
		return nil
	}
	var e *broker.Error
	if errors.As(err, &e) {
		return e
	}
	return broker.Errorf(broker.Unavailable, op, "the ledger cannot record this now, and nothing was handed out").
		With(broker.CodeLedgerDown).Because(err)
}

// view runs one read for the procedure op.
func (b *Engine) view(ctx context.Context, op string, f func(broker.Tx) error) error {
	err := b.cfg.Ledger.View(ctx, f)
	var e *broker.Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	return broker.Errorf(broker.Unavailable, op, "the ledger cannot be read now").With(broker.CodeLedgerDown).Because(err)
}

// touchedTx remembers whom the entries of a transaction are about.
type touchedTx struct {
	broker.Tx
	names []topicName
}

func (t *touchedTx) Append(e broker.Entry) (broker.Revision, error) {
	t.names = append(t.names, topicName{e.Chain, e.Op == broker.OpFence || e.Op == broker.OpFreeze || e.Op == broker.OpUnfreeze})
	return t.Tx.Append(e)
}

// after gives a context for cleaning up after a request, which may itself be over.
func after(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
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

// keyedLocks serialises work on one delegation without stopping work on others.
type keyedLocks struct {
	mu   sync.Mutex // guards held
	held map[broker.DelegationID]chan struct{}
}

// lock waits for the key; the returned function gives it back.
func (k *keyedLocks) lock(ctx context.Context, id broker.DelegationID) (unlock func(), err error) {
	for {
		k.mu.Lock()
		busy, taken := k.held[id]
		if !taken {
			if k.held == nil {
				k.held = map[broker.DelegationID]chan struct{}{}
			}
			mine := make(chan struct{})
			k.held[id] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, id)
				k.mu.Unlock()
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
