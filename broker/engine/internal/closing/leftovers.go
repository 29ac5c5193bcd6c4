package closing

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// leftovers are the leases that Vault has still to remove although their grants are CLOSED. The target has shown that
// their secrets are dead for good, so they are housekeeping. The ledger lists them, and this is the schedule of their
// look-ups. Safe for concurrent use.
type leftovers struct {
	wake sched.Signal // a lease was added

	mu      sync.Mutex // guards the fields below
	by      map[broker.GrantID]leftover
	went    time.Time // when the last one was gone, or the process began
	alarmed bool      // an alarm was raised since the last time that none was stuck
}

type leftover struct {
	chain   broker.ChainID
	grant   broker.GrantID
	lease   string
	since   time.Time // its grant was closed
	due     time.Time
	attempt int // look-ups before this one
}

func newLeftovers(now time.Time) leftovers {
	return leftovers{wake: sched.NewSignal(), by: map[broker.GrantID]leftover{}, went: now}
}

// A leftover lease is stuck when it has waited for stuckAfter while Vault removed no other, or for stuckAnyway. Vault
// removes the leases of one database one by one, and takes minutes for ten thousand.
const (
	stuckAfter  = time.Minute
	stuckAnyway = 10 * time.Minute
)

// leftoverRetry is the series of the delays between the look-ups of one lease. Vault has usually only queued its
// revocation.
var leftoverRetry = backoff.Exponential{First: time.Second, Most: 10 * time.Second}

// removedAtOnce is the number of leases that one transaction takes off the list.
const removedAtOnce = 100

// leftoverPause is the least time between two look-ups. Leases that were left one after the other are looked up
// together, which costs Vault one list.
const leftoverPause = time.Second

// addLeftovers schedules the look-ups of the leases of those grants that were closed while Vault had still to remove
// them.
func (r *Reaper) addLeftovers(grants []broker.Grant) {
	now := r.cfg.Now()
	r.left.mu.Lock()
	defer r.left.mu.Unlock()
	for i := range grants {
		if g := &grants[i]; isLeftover(g) {
			r.left.by[g.ID] = leftover{chain: g.Chain, grant: g.ID, lease: g.Lease.ID, since: g.Ended,
				due: now.Add(leftoverRetry.At(0)), attempt: 1}
			r.left.wake.Notify()
		}
	}
}

// forgetLeftovers drops the leases of grants that were made live again.
func (r *Reaper) forgetLeftovers(grants []broker.Grant) {
	ids := make([]broker.GrantID, len(grants))
	for i, g := range grants {
		ids[i] = g.ID
	}
	r.left.remove(ids)
	r.removed(ids)
}

func (l *leftovers) remove(ids []broker.GrantID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		delete(l.by, id)
	}
}

// removed notifies the followers of closed grants that these have no leftover lease any more.
func (r *Reaper) removed(ids []broker.GrantID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range ids {
		for _, p := range r.progress[id] {
			p.Removed(id)
		}
		delete(r.progress, id)
	}
}

func (l *leftovers) stuckLocked(now time.Time) (n int) {
	for _, one := range l.by {
		if age := now.Sub(one.since); age > stuckAnyway || age > stuckAfter && now.Sub(l.went) > stuckAfter {
			n++
		}
	}
	return n
}

// RemoveLeftovers looks the leftover leases up until Vault has removed each, and revokes by name those that stay. It
// begins with the ones that the ledger lists, and ends with the engine.
func (r *Reaper) RemoveLeftovers() {
	retry := backoff.Exponential{First: 100 * time.Millisecond, Most: 10 * time.Second}
	for {
		err := r.listLeftovers(r.cfg.Context)
		if err == nil {
			break
		}
		r.alarm("reading the leases that Vault has still to remove", err)
		if backoff.Sleep(r.cfg.Context, retry.Next()) != nil {
			return
		}
	}
	for r.cfg.Context.Err() == nil {
		next := r.lookUpLeftovers(r.left.takeDue(r.cfg.Now()))
		if backoff.Sleep(r.cfg.Context, leftoverPause) != nil {
			return
		}
		timer := time.NewTimer(next)
		select {
		case <-r.cfg.Context.Done():
		case <-r.left.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (r *Reaper) listLeftovers(ctx context.Context) error {
	var list []broker.Grant
	err := r.cfg.View(ctx, "resume", func(tx *records.Tx) error {
		list = nil
		return tx.EachLeftover(records.Everywhere, func(g broker.Grant) error {
			list = append(list, g)
			return nil
		})
	})
	if err == nil {
		r.addLeftovers(list)
	}
	return err
}

// takeDue returns the leases to look up now. Each is scheduled again, for the case that Vault still has it.
func (l *leftovers) takeDue(now time.Time) (due []leftover) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, one := range l.by {
		if wait := one.due.Sub(now); wait > 0 && wait <= leftoverRetry.Most { // more: the clock was set back
			continue
		}
		due = append(due, one)
		one.due = now.Add(leftoverRetry.At(one.attempt))
		one.attempt++
		l.by[id] = one
	}
	return due
}

// lookUpLeftovers asks Vault about leases, revokes by name those that stay, and records those that are gone. It returns
// the time until the next one is due.
func (r *Reaper) lookUpLeftovers(due []leftover) time.Duration {
	ctx, cancel := context.WithTimeout(r.cfg.Context, time.Minute)
	defer cancel()
	ids := make([]string, len(due))
	for i, one := range due {
		ids[i] = one.lease
	}
	if gone, ok := r.leasesGone(ctx, ids); ok {
		r.revokeLeftovers(ctx, due, gone)
		var removed []leftover
		for i, one := range due {
			if gone[i] {
				removed = append(removed, one)
			}
		}
		for part := range slices.Chunk(removed, removedAtOnce) {
			if err := r.dropLeftovers(ctx, part); err != nil {
				r.alarm("recording leases that Vault has removed", err)
				break
			}
		}
	}
	return r.leftoversDue()
}

// revokeLeftovers revokes by name the leases that stayed for many checks, and those that Vault has given up. One that
// fails does not hold up the others.
func (r *Reaper) revokeLeftovers(ctx context.Context, due []leftover, gone []bool) {
	r.parallel(len(due), func(i int) {
		if gone[i] || due[i].attempt < checksBeforeRevoke && !r.isGivenUp(due[i].lease) {
			return
		}
		if _, limited := r.Limited(); limited != nil || ctx.Err() != nil {
			return
		}
		gone[i] = r.revokeLease(ctx, due[i].lease) == nil
	})
}

// dropLeftovers records that Vault has removed leases, and notifies the followers of their grants.
func (r *Reaper) dropLeftovers(ctx context.Context, removed []leftover) error {
	var listed []leftover // not those of grants that were made live again
	err := r.cfg.Update(ctx, "close", func(tx *records.Tx) error {
		listed = nil
		for _, one := range removed {
			was, err := tx.DropLeftover(one.chain, one.grant)
			if err != nil {
				return err
			}
			if was {
				listed = append(listed, one)
			}
		}
		if len(listed) == 0 {
			return nil
		}
		_, err := tx.Enter(broker.Entry{At: r.cfg.Now(), Actor: "pawl", Op: broker.OpEnd,
			Detail: fmt.Sprintf("Vault has removed the leases of %d closed grants", len(listed))})
		return err
	})
	if err != nil {
		return err
	}
	ids := make([]broker.GrantID, len(listed))
	for i, one := range listed {
		ids[i] = one.grant
	}
	r.left.remove(ids)
	r.left.mu.Lock()
	r.left.went = r.cfg.Now()
	r.left.mu.Unlock()
	r.removed(ids)
	return nil
}

// leftoversDue returns the time until the next look-up, and raises an alarm once when leases are stuck.
func (r *Reaper) leftoversDue() time.Duration {
	now, next := r.cfg.Now(), maxWait
	r.left.mu.Lock()
	for _, one := range r.left.by {
		next = min(next, max(one.due.Sub(now), 0))
	}
	stuck, alarmed := r.left.stuckLocked(now), r.left.alarmed
	r.left.alarmed = stuck > 0
	r.left.mu.Unlock()
	if stuck > 0 && !alarmed {
		r.alarm("removing leases", broker.Errorf(broker.Internal, "close", "Vault does not remove the leases of %d closed "+
			"grants. Their secrets are dead at the target. The broker retries, and an operator must find the cause", stuck).
			With(broker.CodeLeasesLeft))
	}
	return next
}
