package broker

import (
	"context"
	"fmt"
	"time"
)

// LeaseLister is a Vault that can list the leases under the mounts that mint for tools.
type LeaseLister interface {
	// Leases gives every lease there is under them, whoever asked for it.
	Leases(ctx context.Context) ([]FoundLease, error)
}

// FoundLease is a lease that Vault lists.
type FoundLease struct {
	ID     string
	Issued time.Time
}

// Remover is a backend that can take away, without Vault, what lives under a grant's name.
type Remover interface {
	Remove(ctx context.Context, grants []GrantID) error
}

// Strays is what a sweep found that the ledger does not know as alive, and ended.
type Strays struct {
	Leases int
	Logins int
}

// Sweep compares what Vault and the backends hold under our names with the ledger, and ends
// what the ledger does not know: the answer of a mint that was lost, or somebody minting behind
// the broker (revoke, step 4). It runs on a schedule as well.
func (b *Broker) Sweep(ctx context.Context) (s Strays, err error) {
	if err := b.dropSpentRules(ctx); err != nil {
		return s, err
	}
	if lister, ok := b.cfg.Vault.(LeaseLister); ok {
		if s.Leases, err = b.sweepLeases(ctx, lister); err != nil {
			return s, err
		}
	}
	for name, backend := range b.cfg.Backends {
		finder, ok := backend.(Finder)
		if !ok {
			continue
		}
		n, err := b.sweepBackend(ctx, name, finder)
		if s.Logins += n; err != nil {
			return s, err
		}
	}
	return s, nil
}

// dropSpentRules takes final rules away once every chain that was open when they were written
// has ended: each transaction reads every rule.
func (b *Broker) dropSpentRules(ctx context.Context) error {
	now := b.cfg.Now()
	var spent []RevocationID
	if err := b.view(ctx, "sweep", func(tx Tx) error {
		rules, err := b.rules.read(tx)
		for _, r := range rules {
			if !r.Fence.Frozen && now.Sub(r.Fence.At) > MaxChainTTL {
				spent = append(spent, r.Fence.Revocation)
			}
		}
		return err
	}); err != nil || len(spent) == 0 {
		return err
	}
	return b.update(ctx, "sweep", func(tx Tx) error {
		for _, id := range spent {
			if err := tx.Put(keyRule(id), nil); err != nil {
				return err
			}
		}
		_, err := enter(tx, Entry{At: now, Actor: "pawl", Op: OpEnd, Detail: fmt.Sprintf("%d rules that no open chain can fall under", len(spent))})
		return err
	})
}

func (b *Broker) sweepLeases(ctx context.Context, lister LeaseLister) (n int, err error) {
	found, err := lister.Leases(ctx)
	if err != nil || len(found) == 0 {
		return 0, err
	}
	known := map[string]bool{}
	if err := b.view(ctx, "sweep", func(tx Tx) error {
		return eachLive(tx, "", func(g Grant) error { known[g.Lease.ID] = true; return nil })
	}); err != nil {
		return 0, err
	}
	now := b.cfg.Now()
	for _, lease := range found {
		// A younger one may be the answer that an issue is about to record.
		if known[lease.ID] || now.Sub(lease.Issued) < b.cfg.MintTimeout+5*time.Second {
			continue
		}
		if err := b.cfg.Vault.Revoke(ctx, lease.ID); err != nil {
			return n, err
		}
		n++
		if err := b.stray(ctx, Entry{Detail: "a lease that the ledger does not know was ended: " + lease.ID}); err != nil {
			return n, err
		}
	}
	return n, nil
}

func (b *Broker) sweepBackend(ctx context.Context, name string, finder Finder) (n int, err error) {
	found, err := finder.Find(ctx)
	if err != nil || len(found) == 0 {
		return 0, err
	}
	var strays []Grant
	now := b.cfg.Now()
	if err := b.view(ctx, "sweep", func(tx Tx) error {
		strays = nil
		for _, id := range found {
			g, ok, err := load[Grant](tx, keyGrant(id))
			if err != nil {
				return err
			}
			if g.ID = id; !ok || g.State == StateClosed && now.Sub(g.Ended) > 5*time.Second {
				strays = append(strays, g)
			}
		}
		return nil
	}); err != nil || len(strays) == 0 {
		return 0, err
	}
	if err := b.endStrays(ctx, name, strays); err != nil {
		return 0, err
	}
	for _, g := range strays {
		if err := b.stray(ctx, Entry{Chain: g.Chain, Delegation: g.Delegation, Grant: g.ID, Tool: g.Tool,
			Detail: "a credential at " + name + " that should not be alive was ended"}); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

func (b *Broker) endStrays(ctx context.Context, name string, strays []Grant) error {
	if s, ok := b.cfg.Backends[name].(Severer); ok {
		if err := s.Sever(ctx, strays); err != nil {
			return err
		}
	}
	if r, ok := b.cfg.Backends[name].(Remover); ok {
		all := make([]GrantID, len(strays))
		for i, g := range strays {
			all[i] = g.ID
		}
		return r.Remove(ctx, all)
	}
	return nil
}

func (b *Broker) stray(ctx context.Context, e Entry) error {
	e.At, e.Actor, e.Op = b.cfg.Now(), "pawl", OpStray
	b.cfg.Alarm("sweep", Errorf(Internal, "sweep", "%s", e.Detail))
	return b.update(ctx, "sweep", func(tx Tx) error { _, err := enter(tx, e); return err })
}

// runSweeps sweeps on a schedule until the broker stops.
func (b *Broker) runSweeps() {
	if b.cfg.SweepEvery < 0 {
		return
	}
	tick := time.NewTicker(b.cfg.SweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-b.ctx.Done():
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(b.ctx, b.cfg.SweepEvery)
		if _, err := b.Sweep(ctx); err != nil && b.ctx.Err() == nil {
			b.cfg.Alarm("sweep", err)
		}
		cancel()
	}
}
