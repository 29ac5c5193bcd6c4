package engine

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/ahead"
	"github.com/pawlsec/pawl/broker/engine/internal/archiving"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/indexing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/sweeping"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

// New validates cfg and makes an Engine. No background work runs before [Engine.Resume].
func New(cfg Config) (*Engine, error) {
	for name, missing := range map[string]bool{
		"Ledger": cfg.Ledger == nil, "Policy": cfg.Policy == nil, "Vault": cfg.Vault == nil,
		"Backends": len(cfg.Backends) == 0, "Now": cfg.Now == nil, "Random": cfg.Random == nil,
	} {
		if missing {
			return nil, fmt.Errorf("engine: Config.%s is required", name)
		}
	}
	if cfg.Alarm == nil {
		cfg.Alarm = func(string, error) {}
	}
	if cfg.Refused == nil {
		cfg.Refused = func(string) {}
	}
	cfg.MintTimeout = cmp.Or(cfg.MintTimeout, 10*time.Second)
	cfg.MintBound = cmp.Or(cfg.MintBound, 90*time.Second)
	cfg.SweepEvery = cmp.Or(cfg.SweepEvery, time.Minute)
	cfg.Workers = cmp.Or(cfg.Workers, 8)
	cfg.OpenChains = cmp.Or(cfg.OpenChains, broker.MaxOpenChains)
	e := &Engine{cfg: cfg}
	e.ctx, e.stop = context.WithCancel(context.Background())
	e.turns = volatile.Turns{AtOnce: cfg.Mints, Each: cfg.WaitingMints, Longest: cfg.MintTimeout,
		Refused: func() { cfg.Refused("waiting_mints") }}
	e.refusals.Each = cfg.Refusals
	e.touching.Most, e.plans.Most, e.expected.Most = maxTouches, maxPlans, maxExpected
	e.past = archiving.Mover{Archive: cfg.Archive, Keep: cfg.Keep, Cache: &e.cache, View: e.view, Update: e.update,
		Now: cfg.Now, Alarm: cfg.Alarm}
	e.watchdog = volatile.NewWatchdog(cfg.Now, e.missedHeartbeat)
	e.reaper = closing.New(closing.Config{Vault: cfg.Vault, Backends: cfg.Backends, Now: cfg.Now, Alarm: cfg.Alarm,
		View: e.view, Update: e.update, Order: e.order, Undeliverable: e.undeliverable, Discard: e.deliveries.Drop,
		Reconcile: e.reconcile, Context: e.ctx, Background: e.background, CallTimeout: cfg.MintTimeout, Workers: cfg.Workers})
	e.ahead = ahead.New(ahead.Config{Vault: cfg.Vault, Now: cfg.Now, Alarm: cfg.Alarm, NewID: e.newID, Update: e.update,
		Order: func(ctx context.Context, op string, f func(*records.Tx) error, lost func(error)) error {
			return record(e, op, f, func(f func(broker.Tx) error) error { return e.cfg.Ledger.Order(ctx, f, lost) })
		},
		Limits: e.reaper, Busy: func() bool { return e.turns.Waiting() > 0 },
		Context: e.ctx, Background: e.background, CallTimeout: cfg.MintTimeout})
	e.index = indexing.Index{Cache: &e.cache, View: e.view, Update: e.update, Now: cfg.Now, Alarm: cfg.Alarm,
		Schedule: e.reaper.Schedule}
	e.sweeper = sweeping.New(sweeping.Config{Vault: cfg.Vault, Backends: cfg.Backends, Reaper: e.reaper,
		Policy: cfg.Policy, Now: cfg.Now, Alarm: cfg.Alarm, View: e.view, Update: e.update,
		Retire: e.index.Retire, MintTimeout: cfg.MintTimeout, MintBound: cfg.MintBound, Every: cfg.SweepEvery})
	e.Process = closing.Process{Reaper: e.reaper, Holds: closing.NewHolds(e.reaper), Waiting: e.deliveries.Waiting,
		Beat: e.watchdog.BeatAgain}
	return e, nil
}

// Stop cancels the background work and waits for it. Unfinished work is in the ledger, and [Engine.Resume] of the next
// Engine continues it.
func (e *Engine) Stop() {
	e.stop()
	e.Holds.Stop()
	e.work.Wait()
}

// Resume reads the unfinished work from the ledger and starts the background work. The caller calls it once, before the
// first request. It runs the functions of the normal path:
//   - It ends the grants that were in flight when the last process died, and the tokens that it had made ahead.
//   - It schedules the end of the grants that are alive.
//   - It reconciles the revocations that have not settled, and has Vault remove the leases of closed grants.
//
// Errors: Unavailable when the ledger cannot be read or written.
func (e *Engine) Resume(ctx context.Context) error {
	const op = "resume"
	e.started = e.cfg.Now()
	var live []records.Scheduled
	var madeAhead []broker.Grant
	var unsettled []broker.Revocation
	var watching []broker.Delegation
	var held []broker.GrantID
	err := e.view(ctx, op, func(tx *records.Tx) error {
		live, madeAhead, unsettled, held = nil, nil, nil, nil
		err := tx.EachScheduled(func(s records.Scheduled) {
			live = append(live, s)
			if s.Held && !s.Abandoned {
				held = append(held, s.ID)
			}
		})
		if err := cmp.Or(err, tx.EachAhead(records.Everywhere, func(g broker.Grant) error {
			madeAhead = append(madeAhead, g)
			return nil
		})); err != nil {
			return err
		}
		return tx.EachRevocation(func(rv broker.Revocation) error {
			if !finished(rv) {
				unsettled = append(unsettled, rv)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	if err := e.update(ctx, op, func(tx *records.Tx) (err error) {
		if watching, err = withHeartbeat(tx, e.cfg.Now()); err != nil {
			return err
		}
		_, err = tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: "pawl", Op: broker.OpResume})
		return err
	}); err != nil {
		return err
	}
	for _, id := range held {
		e.Holds.Expect(id, closing.ResumeGrace)
	}
	for _, d := range watching {
		e.watchdog.Beat(d, e.cfg.Now())
	}
	e.background(func() { e.watchdog.Run(e.ctx) })
	e.background(func() {
		e.refusals.Run(e.ctx, e.cfg.Now, e.cfg.Alarm, func(ctx context.Context, entries []broker.Entry) error {
			return e.update(ctx, "refusals", func(tx *records.Tx) error { return tx.EnterAll(entries) })
		})
	})
	e.ahead.Recorded(false, madeAhead...)
	e.background(e.ahead.Run)
	e.background(e.reaper.Run)
	e.background(e.reaper.RemoveLeftovers)
	e.background(func() { e.sweeper.Run(e.ctx) })
	e.background(func() { e.index.Run(e.ctx) })
	e.background(func() { e.past.Run(e.ctx) })
	e.reaper.WatchTargets()
	e.reaper.Schedule(live)
	for _, rv := range unsettled {
		e.reconcile(rv)
	}
	return nil
}
