package closing

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// kill revokes the steps' tokens concurrently. After one failed call it sends Vault no more calls in this pass, and none
// before the time that Vault named. A token with a confirmation is not revoked again by this process, since a revoked
// token does not come back.
func (w *worker) kill(pass []broker.Grant) []killAnswer {
	answers := make([]killAnswer, len(pass))
	var ask []int
	w.mu.Lock()
	for i, g := range pass {
		at, confirmed := w.killed[g.Token.Accessor]
		switch {
		case confirmed:
			answers[i].at = at
		case g.Token.Accessor != "":
			ask = append(ask, i)
		default:
			answers[i].at = w.r.cfg.Now()
		}
	}
	w.mu.Unlock()
	var mu sync.Mutex // guards lastErr
	_, lastErr := w.r.Limited()
	for batch := range slices.Chunk(ask, batchSize) {
		ctx, cancel := context.WithTimeout(w.r.cfg.Context, time.Minute)
		w.r.parallel(len(batch), func(k int) {
			i := batch[k]
			mu.Lock()
			answers[i].err = lastErr
			mu.Unlock()
			if answers[i].err != nil {
				return
			}
			if answers[i] = w.killOne(ctx, pass[i]); answers[i].err != nil {
				mu.Lock()
				first := lastErr == nil
				lastErr = answers[i].err
				mu.Unlock()
				if first {
					w.alarm("revoking tokens in Vault", answers[i].err)
				}
			}
		})
		cancel()
		w.mu.Lock()
		for _, i := range batch {
			if answers[i].err == nil {
				w.killed[pass[i].Token.Accessor] = answers[i].at
			}
		}
		w.mu.Unlock()
	}
	return answers
}

func (w *worker) killOne(ctx context.Context, g broker.Grant) killAnswer {
	ctx, cancel := context.WithTimeout(ctx, w.r.cfg.CallTimeout)
	defer cancel()
	if err := w.r.cfg.Vault.Kill(ctx, g.Token.Accessor); err != nil {
		w.r.Limit(err)
		return killAnswer{err: err}
	}
	return killAnswer{at: w.r.cfg.Now()}
}

// parallel runs f for 0 to n-1, at most Config.Workers at once.
func (r *Reaper) parallel(n int, f func(i int)) {
	var group errgroup.Group
	group.SetLimit(r.cfg.Workers)
	for i := range n {
		group.Go(func() error { f(i); return nil })
	}
	_ = group.Wait() // f returns no error
}

func (w *worker) probes() bool {
	_, ok := w.r.cfg.Backends[w.backend].(broker.Prover)
	return ok
}

// prove asks the target whether the secrets still work. A target that does not answer proves nothing.
func (w *worker) prove(ctx context.Context, pass []broker.Grant) []broker.Evidence {
	found := make([]broker.Evidence, len(pass))
	p, ok := w.r.cfg.Backends[w.backend].(broker.Prover)
	if !ok {
		return found
	}
	answers, err := p.Prove(ctx, pass)
	if err != nil || len(answers) != len(pass) {
		for i := range found {
			found[i] = broker.Evidence{At: w.r.cfg.Now(), Check: w.backend, Answer: "the target did not answer"}
		}
		return found
	}
	return answers
}

// leasesGone asks Vault about the leases of a pass, but not about those of secrets that are dead for good. Such a secret
// is one that its target alone shows dead, and whose token was revoked before that was asked: nothing can mint for it.
func (w *worker) leasesGone(
	ctx context.Context, pass []broker.Grant, killed []killAnswer, found []broker.Evidence,
) []goneAnswer {
	answers := make([]goneAnswer, len(pass))
	var leases []string
	var at []int
	for i, g := range pass {
		final := found[i].Final && found[i].Outcome == broker.OutcomeDead && killed[i].err == nil
		if g.Lease.ID != "" && !final {
			answers[i].asked = true
			leases, at = append(leases, g.Lease.ID), append(at, i)
		}
	}
	gone, ok := w.r.leasesGone(ctx, leases)
	for k, i := range at {
		answers[i].answered, answers[i].gone = ok, ok && gone[k]
	}
	return answers
}

// leasesGone reports for each lease whether Vault no longer knows it. ok is false if Vault has not answered.
func (r *Reaper) leasesGone(ctx context.Context, leases []string) (gone []bool, ok bool) {
	if len(leases) == 0 {
		return nil, true
	}
	gone, err := r.cfg.Vault.LeasesGone(ctx, leases)
	if err != nil {
		r.alarm("looking leases up in Vault", err)
	}
	return gone, err == nil && len(gone) == len(leases)
}

// checksBeforeRevoke is the number of checks, over more than a second, in which Vault may end a lease after its token.
// After them the worker revokes the lease by name.
const checksBeforeRevoke = 7

// revokeLeft revokes the leases that outlived their token. Vault writes a lease without checking the token again, so a
// lease that it wrote during the kill is in no queue of Vault's. A lease that Vault has given up revoking is revoked by
// name at each check. Every sweep resets its number of checks, which would never reach checksBeforeRevoke.
func (w *worker) revokeLeft(ctx context.Context, pass []broker.Grant, gone []goneAnswer, taken map[broker.GrantID]Due) {
	w.r.parallel(len(pass), func(i int) {
		if !gone[i].answered || gone[i].gone {
			return
		}
		if taken[pass[i].ID].attempt < checksBeforeRevoke && !w.r.isGivenUp(pass[i].Lease.ID) {
			return
		}
		gone[i].gone = w.r.revokeLease(ctx, pass[i].Lease.ID) == nil
	})
}

// revokeLease revokes a lease by name.
func (r *Reaper) revokeLease(ctx context.Context, lease string) error {
	one, cancel := context.WithTimeout(ctx, r.cfg.CallTimeout)
	defer cancel()
	err := r.cfg.Vault.Revoke(one, lease)
	if err != nil {
		r.Limit(err)
		r.alarm("revoking a lease that outlived its token", err)
	}
	return err
}
