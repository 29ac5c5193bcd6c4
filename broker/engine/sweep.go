package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Orphans counts the orphaned leases and logins that a sweep ended.
type Orphans struct {
	Leases int
	Logins int
}

// Sweep compares the leases in Vault and the logins at the backends with the ledger, and ends the orphans. An orphan
// has our name, and the ledger does not know it as alive. A mint with a lost answer leaves an orphan, and so does a
// mint that bypasses the broker. Sweep is step 4 of Revoke for all paths, and runs on a schedule too.
func (e *Engine) Sweep(ctx context.Context) (Orphans, error) { return sweeper{e}.sweep(ctx, true) }

// leasesEvery is how many scheduled sweeps come to one that lists the leases without a suspicion. A list writes each id
// to each audit device of Vault.
const leasesEvery = 10

// lastMint returns when the last mint that was sent before a time can complete. EndTolerance allows for Vault's clock.
func lastMint(cfg Config, sent time.Time) time.Time {
	return sent.Add(cfg.MintTimeout + cfg.MintBound + broker.EndTolerance)
}

// sweeper is one sweep.
type sweeper struct{ *Engine }

func (s sweeper) sweep(ctx context.Context, leases bool) (ended Orphans, err error) {
	if err := s.dropSpentRules(ctx); err != nil {
		return ended, err
	}
	var errs []error
	began := s.cfg.Now()
	if lister, ok := s.cfg.Vault.(broker.LeaseLister); ok && leases {
		former := []broker.Tool{}
		err := s.view(ctx, "sweep", func(tx *records.Tx) (err error) {
			former, err = tx.FormerTools(s.cfg.Policy())
			return err
		})
		errs = append(errs, err)
		for _, tools := range [][]broker.Tool{nil, former} {
			if tools == nil || len(tools) > 0 {
				n, _, err := s.sweepLeases(ctx, lister, tools)
				ended.Leases += n
				errs = append(errs, err)
			}
		}
		if s.suspicion.Settle(began); ended.Leases > 0 || errors.Join(errs...) != nil {
			s.suspicion.Raise(began)
		}
	}
	if lister, ok := s.cfg.Vault.(broker.IrrevocableLister); ok {
		errs = append(errs, s.retryIrrevocable(ctx, lister))
	}
	for name := range s.cfg.Backends {
		n, err := s.sweepBackend(ctx, name)
		ended.Logins += n
		errs = append(errs, err)
	}
	return ended, errors.Join(errs...)
}

// dropSpentRules deletes the final rules of which every covered chain has expired, since each transaction reads all
// rules.
func (s sweeper) dropSpentRules(ctx context.Context) error {
	now := s.cfg.Now()
	var spent []broker.RevocationID
	if err := s.view(ctx, "sweep", func(tx *records.Tx) (err error) {
		spent, err = tx.SpentRules(now)
		return err
	}); err != nil || len(spent) == 0 {
		return err
	}
	return s.update(ctx, "sweep", func(tx *records.Tx) error {
		for _, id := range spent {
			if err := tx.DropRule(id); err != nil {
				return err
			}
		}
		_, err := tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: broker.OpEnd,
			Detail: fmt.Sprintf("deleted %d rules that can cover no open chain", len(spent))})
		return err
	})
}

// sweepLeases ends the orphaned leases. It leaves the recent ones alone: an issue may be about to record them.
func (s sweeper) sweepLeases(ctx context.Context, lister broker.LeaseLister, tools []broker.Tool,
) (n int, recent []broker.FoundLease, err error) {
	ids, err := lister.Leases(ctx, tools)
	if len(ids) == 0 {
		return 0, nil, err
	}
	errs := []error{err}
	now := s.cfg.Now() // a lease that is young now may be recorded during the look-ups
	if err := s.view(ctx, "sweep", func(tx *records.Tx) error {
		known := map[string]bool{}
		err := tx.EachLive("", func(g broker.Grant) error { known[g.Lease.ID] = true; return nil })
		ids = slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return known[id] })
		return err
	}); err != nil || len(ids) == 0 {
		return 0, nil, errors.Join(errs[0], err)
	}
	found, err := lister.LookUpLeases(ctx, ids)
	errs = append(errs, err)
	for _, lease := range found {
		if now.Sub(lease.Issued) < s.cfg.MintTimeout+5*time.Second {
			recent = append(recent, lease)
			continue
		}
		if err := s.cfg.Vault.Revoke(ctx, lease.ID); err != nil {
			errs = append(errs, err) // the other leases must end nevertheless
			continue
		}
		n++
		errs = append(errs, s.recordOrphan(ctx, broker.Entry{Detail: "revoked an orphaned lease: " + lease.ID}))
	}
	return n, recent, errors.Join(errs...)
}

// Irrevocable counts the leases of grants that Vault has given up revoking, as of the last sweep. The broker retries
// each of them, and an operator must find the cause.
func (e *Engine) Irrevocable() int { return e.reaper.GivenUp() }

// retryIrrevocable finds the grants with leases that Vault has given up revoking, raises one alarm for each, and ends
// them again. The cause may have gone: a target may have been down for longer than Vault retries.
func (s sweeper) retryIrrevocable(ctx context.Context, lister broker.IrrevocableLister) error {
	ids, err := lister.Irrevocable(ctx)
	if err != nil {
		return err
	}
	listed := make(map[string]bool, len(ids))
	for _, id := range ids {
		listed[id] = true
	}
	ours := map[string]bool{}
	var again []broker.Grant
	if len(listed) > 0 {
		if err := s.view(ctx, "sweep", func(tx *records.Tx) error {
			clear(ours)
			again = nil
			return tx.EachLive("", func(g broker.Grant) error {
				if listed[g.Lease.ID] {
					ours[g.Lease.ID] = true
					again = append(again, g)
				}
				return nil
			})
		}); err != nil {
			return err
		}
	}
	for _, id := range s.reaper.SetGivenUp(ours) {
		s.cfg.Alarm("sweep", broker.Errorf(broker.Internal, "sweep",
			"Vault has given up revoking lease %s: the broker retries, and an operator must find the cause", id))
	}
	s.reaper.EndNow(again...)
	return nil
}

func (s sweeper) sweepBackend(ctx context.Context, name string) (n int, err error) {
	unknown, again, err := s.reaper.Find(ctx, name)
	if err != nil {
		return 0, err
	}
	if n, err = s.reaper.Reopen(ctx, name, again); err != nil || len(unknown) == 0 {
		return n, err
	}
	if err := s.endOrphans(ctx, name, unknown); err != nil {
		return n, err
	}
	for _, id := range unknown {
		if err := s.recordOrphan(ctx, broker.Entry{Grant: id, Detail: "ended an orphaned login at " + name}); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// reconcileOpened reconciles a revocation that was opened while its reconciler was about to end.
func (s sweeper) reconcileOpened(id broker.RevocationID) {
	var rv broker.Revocation
	err := s.view(s.ctx, "sweep", func(tx *records.Tx) (err error) { rv, _, err = tx.Revocation(id); return err })
	if err == nil && rv.ID != "" && s.ctx.Err() == nil {
		s.reconcile(rv)
	}
}

func (s sweeper) endOrphans(ctx context.Context, name string, orphans []broker.GrantID) error {
	if severer, ok := s.cfg.Backends[name].(broker.Severer); ok {
		if err := severer.Sever(ctx, closing.GrantsAt(name, orphans)); err != nil {
			return err
		}
	}
	if remover, ok := s.cfg.Backends[name].(broker.Remover); ok {
		return remover.Remove(ctx, orphans)
	}
	return nil
}

func (s sweeper) recordOrphan(ctx context.Context, entry broker.Entry) error {
	entry.At, entry.Actor, entry.Op = s.cfg.Now(), "pawl", broker.OpOrphan
	s.cfg.Alarm("sweep", broker.Errorf(broker.Internal, "sweep", "%s", entry.Detail))
	return s.update(ctx, "sweep", func(tx *records.Tx) error { _, err := tx.Enter(entry); return err })
}

// sweepAfter is step 4 of Revoke for mints with a lost answer. The caller has waited until none of them can complete.
// It sweeps the paths of the grants, or all paths when there are no grants, as after a restart. done reports that no
// lease of these mints is left.
func (s sweeper) sweepAfter(ctx context.Context, grants []broker.Grant, fenced time.Time) (done bool, err error) {
	var tools []broker.Tool
	backends := map[string]bool{}
	for _, g := range grants {
		same := func(t broker.Tool) bool { return t.Backend == g.Backend && t.Path == g.Path }
		if !slices.ContainsFunc(tools, same) {
			tools = append(tools, records.ToolOf(g))
		}
		backends[g.Backend] = true
	}
	var errs []error
	done = true
	if lister, ok := s.cfg.Vault.(broker.LeaseLister); ok {
		_, recent, err := s.sweepLeases(ctx, lister, tools)
		errs = append(errs, err)
		last := lastMint(s.cfg, fenced) // the mints were sent before the fence
		done = !slices.ContainsFunc(recent, func(l broker.FoundLease) bool { return l.Issued.Before(last) })
	}
	for name := range s.cfg.Backends {
		if grants == nil || backends[name] {
			_, err := s.sweepBackend(ctx, name)
			errs = append(errs, err)
		}
	}
	err = errors.Join(errs...)
	return done && err == nil, err
}

// runSweeps sweeps on a schedule until the engine stops. It lists the leases in every tenth sweep, and in each one while
// there is a suspicion: after the start, after a mint with a lost answer, and after a sweep that found an orphan or
// failed.
func (e *Engine) runSweeps() {
	if e.cfg.SweepEvery < 0 {
		return
	}
	tick := time.NewTicker(e.cfg.SweepEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-e.ctx.Done():
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(e.ctx, e.cfg.SweepEvery)
		if _, err := (sweeper{e}).sweep(ctx, n%leasesEvery == 0 || e.suspicion.Raised()); err != nil && e.ctx.Err() == nil {
			e.cfg.Alarm("sweep", err)
		}
		cancel()
	}
}
