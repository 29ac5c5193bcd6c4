// Package sweeping compares the leases and logins of Vault and the targets with the ledger, and ends those that it does not know.
package sweeping

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/closing"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

// Config configures a [Sweeper]. All fields are required.
type Config struct {
	Vault    broker.Vault
	Backends map[string]broker.Backend
	Reaper   *closing.Reaper
	Policy   func() broker.Policy
	Now      func() time.Time
	Alarm    func(op string, err error) // must not block

	// View and Update run one transaction for the procedure op.
	View   func(ctx context.Context, op string, f func(*records.Tx) error) error
	Update func(ctx context.Context, op string, f func(*records.Tx) error) error

	Retire func(context.Context) error // drops the keys in the ledger's index of chains that ended long ago

	MintTimeout time.Duration // of one mint
	MintBound   time.Duration // how long Vault may take to complete a request after the client gave it up
	Every       time.Duration // between two scheduled sweeps; negative: there are none
}

// Sweeper ends orphans. An orphan has our name, and the ledger does not know it as alive. A mint with a lost answer
// leaves an orphan, and so does a mint that bypasses the broker. [New] makes a Sweeper.
type Sweeper struct {
	cfg       Config
	suspicion volatile.Suspicion // of orphaned leases
}

// New returns a Sweeper that suspects orphans of the mints that were sent so far.
func New(cfg Config) *Sweeper {
	s := &Sweeper{cfg: cfg}
	s.Suspect()
	return s
}

// Suspect says that a mint that was sent so far may have left a lease that the ledger does not know.
func (s *Sweeper) Suspect() { s.suspicion.Raise(s.lastMint(s.cfg.Now())) }

// Orphans counts the orphaned leases and logins that a sweep ended.
type Orphans struct {
	Leases int
	Logins int
}

// leasesEvery is how many scheduled sweeps come to one that lists the leases without a suspicion.
const leasesEvery = 10

// lastMint returns when the last mint that was sent before a time can complete. EndTolerance allows for Vault's clock.
func (s *Sweeper) lastMint(sent time.Time) time.Time {
	return sent.Add(s.cfg.MintTimeout + s.cfg.MintBound + broker.EndTolerance)
}

// Sweep ends the orphans, and drops the rules that are spent. It lists the leases only if that is asked for: a list
// writes each id to each audit device of Vault.
func (s *Sweeper) Sweep(ctx context.Context, leases bool) (ended Orphans, err error) {
	if err := cmp.Or(s.dropSpentRules(ctx), s.cfg.Retire(ctx)); err != nil {
		return ended, err
	}
	var errs []error
	began := s.cfg.Now()
	if lister, ok := s.cfg.Vault.(broker.LeaseLister); ok && leases {
		former := []broker.Tool{}
		err := s.cfg.View(ctx, "sweep", func(tx *records.Tx) (err error) {
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
func (s *Sweeper) dropSpentRules(ctx context.Context) error {
	now := s.cfg.Now()
	var spent []broker.RevocationID
	if err := s.cfg.View(ctx, "sweep", func(tx *records.Tx) (err error) {
		spent, err = tx.SpentRules(now)
		return err
	}); err != nil || len(spent) == 0 {
		return err
	}
	return s.cfg.Update(ctx, "sweep", func(tx *records.Tx) error {
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
func (s *Sweeper) sweepLeases(ctx context.Context, lister broker.LeaseLister, tools []broker.Tool,
) (n int, recent []broker.FoundLease, err error) {
	ids, err := lister.Leases(ctx, tools)
	if len(ids) == 0 {
		return 0, nil, err
	}
	errs := []error{err}
	now := s.cfg.Now() // a lease that is young now may be recorded during the look-ups
	if err := s.cfg.View(ctx, "sweep", func(tx *records.Tx) error {
		known := map[string]bool{}
		know := func(g broker.Grant) error { known[g.Lease.ID] = true; return nil }
		err := cmp.Or(tx.EachLive(records.Everywhere, know), tx.EachLeftover(records.Everywhere, know))
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

// retryIrrevocable finds the grants with leases that Vault has given up revoking, raises one alarm for each, and ends
// them again. The cause may have gone: a target may have been down for longer than Vault retries.
func (s *Sweeper) retryIrrevocable(ctx context.Context, lister broker.IrrevocableLister) error {
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
		if err := s.cfg.View(ctx, "sweep", func(tx *records.Tx) error {
			clear(ours)
			again = nil
			if err := tx.EachLive(records.Everywhere, func(g broker.Grant) error {
				if listed[g.Lease.ID] {
					ours[g.Lease.ID] = true
					again = append(again, g)
				}
				return nil
			}); err != nil {
				return err
			}
			return tx.EachLeftover(records.Everywhere, func(g broker.Grant) error { // their next look-up revokes them
				if listed[g.Lease.ID] {
					ours[g.Lease.ID] = true
				}
				return nil
			})
		}); err != nil {
			return err
		}
	}
	for _, id := range s.cfg.Reaper.SetGivenUp(ours) {
		s.cfg.Alarm("sweep", broker.Errorf(broker.Internal, "sweep",
			"Vault has given up revoking lease %s: the broker retries, and an operator must find the cause", id))
	}
	s.cfg.Reaper.EndNow(again...)
	return nil
}

func (s *Sweeper) sweepBackend(ctx context.Context, name string) (n int, err error) {
	unknown, again, err := s.cfg.Reaper.Find(ctx, name)
	if err != nil {
		return 0, err
	}
	if n, err = s.cfg.Reaper.Reopen(ctx, name, again); err != nil || len(unknown) == 0 {
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

func (s *Sweeper) endOrphans(ctx context.Context, name string, orphans []broker.GrantID) error {
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

func (s *Sweeper) recordOrphan(ctx context.Context, entry broker.Entry) error {
	entry.At, entry.Actor, entry.Op = s.cfg.Now(), "pawl", broker.OpOrphan
	s.cfg.Alarm("sweep", broker.Errorf(broker.Internal, "sweep", "%s", entry.Detail))
	return s.cfg.Update(ctx, "sweep", func(tx *records.Tx) error { _, err := tx.Enter(entry); return err })
}

// After is step 4 of Revoke for mints with a lost answer. The caller has waited until none of them can complete.
// It sweeps the paths of the grants, or all paths when there are no grants, as after a restart. done reports that no
// lease of these mints is left.
func (s *Sweeper) After(ctx context.Context, grants []broker.Grant, fenced time.Time) (done bool, err error) {
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
		last := s.lastMint(fenced) // the mints were sent before the fence
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

// Run sweeps on a schedule until ctx ends. It lists the leases in every tenth sweep, and in each one while there is a
// suspicion: after the start, after a mint with a lost answer, and after a sweep that found an orphan or failed.
func (s *Sweeper) Run(ctx context.Context) {
	if s.cfg.Every < 0 {
		return
	}
	tick := time.NewTicker(s.cfg.Every)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		one, cancel := context.WithTimeout(ctx, s.cfg.Every)
		if _, err := s.Sweep(one, n%leasesEvery == 0 || s.suspicion.Raised()); err != nil && ctx.Err() == nil {
			s.cfg.Alarm("sweep", err)
		}
		cancel()
	}
}
