package engine

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

// New validates cfg. Nothing runs in the background before [Engine.Resume].
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
	cfg.MintTimeout = cmp.Or(cfg.MintTimeout, 10*time.Second)
	cfg.MintBound = cmp.Or(cfg.MintBound, 90*time.Second)
	cfg.SweepEvery = cmp.Or(cfg.SweepEvery, time.Minute)
	cfg.Workers = cmp.Or(cfg.Workers, 8)
	e := &Engine{cfg: cfg}
	e.ctx, e.stop = context.WithCancel(context.Background())
	e.touching.Most, e.plans.Most, e.expected.Most = maxTouches, maxPlans, maxExpected
	e.watchdog = volatile.NewWatchdog(cfg.Now, e.missedHeartbeat)
	e.reaper = closing.New(closing.Config{Vault: cfg.Vault, Backends: cfg.Backends, Now: cfg.Now, Alarm: cfg.Alarm,
		View: e.view, Update: e.update, Undeliverable: e.undeliverable, Discard: e.deliveries.Drop,
		Context: e.ctx, Background: e.background, CallTimeout: cfg.MintTimeout, Workers: cfg.Workers})
	return e, nil
}

// Stop ends the background work and waits for it. What was not finished is in the ledger, and
// [Engine.Resume] of the next Engine goes on with it.
func (e *Engine) Stop() {
	e.stop()
	e.work.Wait()
}

// Resume takes up what the ledger holds and starts the background work. Grants that were under
// way when a process died are hunted down, grants that are alive end when their time comes, and
// revocations go on. It is called once, before the first request.
//
// Errors: Unavailable when the ledger cannot be read or written.
func (e *Engine) Resume(ctx context.Context) error {
	const op = "resume"
	var alive []closing.Due
	var abandoned []broker.Grant
	var unsettled []broker.Revocation
	var watching []broker.Delegation
	err := e.view(ctx, op, func(tx *records.Tx) error {
		alive, abandoned, unsettled = nil, nil, nil
		err := tx.EachLiveHead(func(g records.GrantHead) error {
			uncollected := g.Sealed != "" && g.Collected.IsZero() // what was kept for it went with the process
			if g.State == broker.StateIssued && g.Ending == "" && !uncollected {
				alive = append(alive, closing.Due{At: g.Expires, ID: g.ID, Backend: g.Backend})
			} else {
				abandoned = append(abandoned, broker.Grant{ID: g.ID, Backend: g.Backend})
			}
			return nil
		})
		if err != nil {
			return err
		}
		return tx.EachRevocation(func(rv broker.Revocation) error {
			if rv.Settled.IsZero() {
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
	e.reaper.Fill(alive)
	for _, d := range watching {
		e.watchdog.Beat(d, e.cfg.Now())
	}
	e.background(func() { e.watchdog.Run(e.ctx) })
	e.background(e.reaper.Run)
	e.background(e.runSweeps)
	e.reaper.EndNow(abandoned...)
	for _, rv := range unsettled {
		e.reconcile(rv)
	}
	return nil
}
