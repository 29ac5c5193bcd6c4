package closing

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// killAnswer is Vault's answer to the revocation of a step's token.
type killAnswer struct {
	at  time.Time // when it confirmed
	err error
}

// kill revokes the steps' tokens, some at once. After Vault failed to answer for one, it is not asked for more in this pass.
// What it has confirmed is not asked again by this process: a token does not come back.
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
	var mu sync.Mutex // guards silent
	var refusal error
	for batch := range slices.Chunk(ask, batchSize) {
		ctx, cancel := context.WithTimeout(w.r.cfg.Context, time.Minute)
		w.parallel(len(batch), func(k int) {
			i := batch[k]
			mu.Lock()
			answers[i].err = refusal
			mu.Unlock()
			if answers[i].err != nil {
				return
			}
			if answers[i] = w.killOne(ctx, pass[i]); answers[i].err != nil {
				mu.Lock()
				first := refusal == nil
				refusal = answers[i].err
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
		return killAnswer{err: err}
	}
	return killAnswer{at: w.r.cfg.Now()}
}

// each runs f for 0 to n-1, as many at once as is configured.
func (w *worker) parallel(n int, f func(i int)) {
	var group errgroup.Group
	group.SetLimit(w.r.cfg.Workers)
	for i := range n {
		group.Go(func() error { f(i); return nil })
	}
	_ = group.Wait() // f reports its errors itself
}

func (w *worker) probes() bool {
	_, ok := w.r.cfg.Backends[w.backend].(broker.Prover)
	return ok
}

// prove asks the target. A target that does not answer proves nothing.
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

// goneAnswer is Vault's answer about a lease.
type goneAnswer struct{ asked, answered, gone bool }

func (w *worker) leasesGone(ctx context.Context, pass []broker.Grant) []goneAnswer {
	answers := make([]goneAnswer, len(pass))
	var leases []string
	var at []int
	for i, g := range pass {
		if g.Lease.ID != "" {
			answers[i].asked = true
			leases, at = append(leases, g.Lease.ID), append(at, i)
		}
	}
	if len(leases) == 0 {
		return answers
	}
	gone, err := w.r.cfg.Vault.LeasesGone(ctx, leases)
	if err != nil || len(gone) != len(leases) {
		return answers
	}
	for k, i := range at {
		answers[i].answered, answers[i].gone = true, gone[k]
	}
	return answers
}

// patience is how many checks Vault gets to end a lease after its token, more than a second in all, before the lease
// is revoked by name.
const checksBeforeRevoke = 7

// revokeLeft revokes leases that outlived their token. Vault writes a lease without checking the token again, so a lease
// that was written during the kill is in no queue of Vault's. A lease that Vault has given up gets no patience: each
// sweep starts its checks anew, and they would never be enough.
func (w *worker) revokeLeft(ctx context.Context, pass []broker.Grant, gone []goneAnswer, taken map[broker.GrantID]Due) {
	w.parallel(len(pass), func(i int) {
		if !gone[i].answered || gone[i].gone {
			return
		}
		if taken[pass[i].ID].attempt < checksBeforeRevoke && !w.r.isGivenUp(pass[i].Lease.ID) {
			return
		}
		one, cancel := context.WithTimeout(ctx, w.r.cfg.CallTimeout)
		defer cancel()
		if err := w.r.cfg.Vault.Revoke(one, pass[i].Lease.ID); err == nil {
			gone[i].gone = true
		} else {
			w.alarm("revoking a lease that outlived its token", err)
		}
	})
}
