package engine_test

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

// sharedTarget makes secrets without a lease. Its target ends them.
type sharedTarget struct{ *brokertest.Target }

func (b sharedTarget) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := b.Target.Prepare(ctx, t, g)
	m.Leased, m.NoLease = false, true
	return m, name, err
}

// newShared is a world in which steps need no token of their own. It counts the acts at Vault.
func newShared(t *testing.T) (w *world, acts *actCounter) {
	w = newWorld(t)
	w.Stop()
	w.backend = sharedTarget{w.target}
	w.start(w.ledger)
	acts = &actCounter{}
	w.onAct(acts, nil)
	return w, acts
}

// actCounter counts the acts at Vault.
type actCounter struct {
	mu sync.Mutex // guards n
	n  map[string]int
}

func (c *actCounter) of(point string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[point]
}

func (c *actCounter) all() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.n)
}

// onAct counts the acts at Vault from now on, and runs f at each.
func (w *world) onAct(acts *actCounter, f func(point string) error) {
	acts.mu.Lock()
	acts.n = map[string]int{}
	acts.mu.Unlock()
	w.vault.Fail(func(point string) error {
		acts.mu.Lock()
		acts.n[point]++
		acts.mu.Unlock()
		if f == nil {
			return nil
		}
		return f(point)
	})
}

// TestNoTokenWithoutALease holds that a step without a lease costs Vault one request, and its end none. Before the mint
// the ledger has the intent, and the delegation's token with it.
func TestNoTokenWithoutALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, acts := newShared(t)
		root := w.open("planner", broker.OpenRequest{})
		for n, want := range []map[string]int{
			{"branch": 1, "branch done": 1, "mint": 1, "mint done": 1}, // the first step makes the delegation's token
			{"mint": 1, "mint done": 1}, {"mint": 1, "mint done": 1},
		} {
			w.onAct(acts, func(point string) error {
				if point == "mint" {
					w.wantRecordedToken(root)
				}
				return nil
			})
			issued := w.issue("planner", step(root, "db.read"))
			if _, err := w.Close(ctx, as("planner"), issued.Grant.ID); err != nil {
				t.Fatalf("Close = %v", err)
			}
			if got := acts.all(); !maps.Equal(got, want) {
				t.Errorf("step %d and its end cost Vault %v, want %v", n, got, want)
			}
			g := w.grantIn(root.Chain, issued.Grant.ID)
			if g.State != broker.StateClosed || g.Outcome != broker.OutcomeDead || g.Token.Accessor != "" || g.Lease.Request == "" {
				t.Errorf("the grant = %+v, want it CLOSED and dead, without a token, with the id of Vault's request", g)
			}
			for _, e := range g.Evidence {
				if e.Check == "vault: revoke the step's token" {
					t.Errorf("the evidence has %+v, and the step had no token", e)
				}
			}
		}
		w.wantAllClosed()
	})
}

// wantRecordedToken fails the test unless the last durable record is a HANDLE that names a recorded token of the
// delegation.
func (w *world) wantRecordedToken(d broker.Delegation) {
	w.t.Helper()
	entries, err := w.ledger.Entries(ctx, 0, 10_000)
	if n := len(entries); err != nil || entries[n-1].Op != broker.OpHandle {
		w.t.Fatalf("the last durable entry before the mint = %+v, %v; want the handle", entries[len(entries)-1], err)
	}
	v, err := w.Chain(ctx, d.Chain)
	if err != nil {
		w.t.Fatal(err)
	}
	g := v.Grants[slices.IndexFunc(v.Grants, func(g broker.Grant) bool { return g.ID == entries[len(entries)-1].Grant })]
	named := func(h broker.Handle) bool { return h.Accessor == g.DelegationToken.Accessor }
	if g.State != broker.StateHandle || g.MintDeadline.IsZero() || !slices.ContainsFunc(v.Delegations[0].Tokens, named) {
		w.t.Errorf("before the mint the grant = %+v, want a HANDLE with a deadline and one of the tokens %v", g,
			v.Delegations[0].Tokens)
	}
}

// TestStepTokenOnDemand holds that a tool can ask for a token of each step's own.
func TestStepTokenOnDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, acts := newShared(t)
		tool := w.policy.Tools["db.read"]
		tool.StepToken = true
		w.policy.Tools["db.read"] = tool
		root := w.open("planner", broker.OpenRequest{})
		w.issue("planner", step(root, "db.read"))
		w.issue("planner", step(root, "db.write"))
		if acts.of("child") != 1 || acts.of("mint") != 2 {
			t.Errorf("Vault made %d step tokens for %d mints, want 1 for 2", acts.of("child"), acts.of("mint"))
		}
	})
}

// TestUnknownWithoutALease loses the answer of a mint. The secret is ended at its target, the grant stays open until no
// mint can be under way, and the delegation's token goes on: it is neither killed nor made again.
func TestUnknownWithoutALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, acts := newShared(t)
		root := w.open("planner", broker.OpenRequest{})
		w.issue("planner", step(root, "db.read"))
		w.onAct(acts, func(point string) error {
			if point == "mint done" {
				return errors.New("no answer")
			}
			return nil
		})
		_, err := w.Issue(ctx, as("planner"), step(root, "db.write"))
		refused(t, "Issue with a lost answer", err, broker.Unavailable, broker.CodeOutcomeUnknown)
		w.onAct(acts, nil)
		pass(time.Second)
		v, err := w.Chain(ctx, root.Chain)
		at := slices.IndexFunc(v.Grants, func(g broker.Grant) bool { return g.Tool == "db.write" })
		if err != nil || v.Grants[at].State != broker.StateHandle {
			t.Fatalf("a second later = %+v, %v; want a HANDLE", v.Grants[at], err)
		}
		if alive := w.target.Alive(); slices.Contains(alive, v.Grants[at].ID) {
			t.Error("a second later the secret works")
		}
		w.issue("planner", step(root, "db.read"))
		if acts.of("kill")+acts.of("branch") > 0 {
			t.Errorf("acts at Vault: %v; the delegation's token was killed or made again", acts.all())
		}
		pass(2 * time.Minute)
		w.wantAllClosed()
		if acts.of("kill") > 0 {
			t.Errorf("acts at Vault: %v; want no kill without a fence", acts.all())
		}
	})
}

// TestFenceUnderASharedMint fences while the mint of a step without a token of its own is under way. Nothing is handed
// out. A fence over the chain kills the delegation's token, one over the step alone leaves it.
func TestFenceUnderASharedMint(t *testing.T) {
	for _, at := range []string{"mint", "mint done"} {
		for _, whole := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				w, acts := newShared(t)
				root := w.open("planner", broker.OpenRequest{})
				w.issue("planner", step(root, "db.read"))
				var rv broker.Revocation
				w.onAct(acts, func(point string) error {
					if point == at && rv.ID == "" {
						if rv = w.revoke("chain:%s and tool:db.write", root.Chain); whole {
							rv = w.revoke("chain:%s", root.Chain)
						}
						pass(10 * time.Second) // the broker carries the revocation out
					}
					return nil
				})
				got, err := w.Issue(ctx, as("planner"), step(root, "db.write"))
				refused(t, "Issue under a fence", err, broker.Revoked, broker.CodeFenced)
				if !got.Secret.Empty() {
					t.Error("a secret was handed out after the acknowledgement")
				}
				if killed := acts.of("kill") > 0; killed != whole {
					t.Errorf("fence over the chain %v: killed a token: %v", whole, killed)
				}
				if !whole {
					w.issue("planner", step(root, "db.read"))
				}
				pass(2 * time.Minute)
				w.wantClosure(rv, broker.ClosureClosed)
				w.wantAllClosed()
			})
		}
	}
}

// TestSharedTokenIsRevoked revokes the delegation's token under a mint, outside the broker. Vault has made nothing then:
// the step is given back, no mint is sent again, and the next step has a new token.
func TestSharedTokenIsRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, acts := newShared(t)
		root := w.open("planner", broker.OpenRequest{Budget: broker.Budget{Steps: 2}})
		first := w.issue("planner", step(root, "db.read"))
		w.onAct(acts, func(point string) error {
			if point == "mint" && acts.of("mint") == 1 {
				return w.vault.Kill(ctx, first.Grant.DelegationToken.Accessor)
			}
			return nil
		})
		_, err := w.Issue(ctx, as("planner"), step(root, "db.read"))
		refused(t, "Issue with a token that was revoked", err, broker.Unavailable, broker.CodeVaultDown)
		if acts.of("mint") != 1 {
			t.Errorf("%d mints were sent, want 1", acts.of("mint"))
		}
		pass(time.Second)
		w.issue("planner", step(root, "db.read")) // the budget has room for it, and its delegation a new token
		if acts.of("branch") != 1 {
			t.Errorf("acts at Vault: %v; want the delegation's token made again, once", acts.all())
		}
		pass(2 * time.Minute)
		w.wantAllClosed()
	})
}

// blindShared has a target that cannot be asked, and secrets without a lease.
type blindShared struct{ blindBackend }

func (b blindShared) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	return sharedTarget{b.t}.Prepare(ctx, t, g)
}

// TestPerhapsAliveAfterACrash crashes the broker after a hand-over that is not recorded. Until its latest end the secret
// counts as perhaps alive: in the grant, in the closure, and for a leaked value of which the crash took the digest.
func TestPerhapsAliveAfterACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Stop()
		w.backend = blindShared{blindBackend{w.target}}
		w.start(w.ledger)
		root := w.open("planner", broker.OpenRequest{})
		w.issue("planner", step(root, "db.read"))
		untilDurable()
		got := w.issue("planner", step(root, "db.write"))
		w.crash()
		_, err := w.tryRevoke(false, "%s", leakedFrom(t, got))
		refused(t, "Revoke of the value", err, broker.NotFound, broker.CodeSelectorEmpty)
		if !strings.Contains(err.Error(), "1 that may have it are not recorded") {
			t.Errorf("Revoke of the value = %v, want it to name the secret that is not recorded", err)
		}
		pass(time.Second)
		g := w.grantIn(root.Chain, got.Grant.ID)
		if g.State != broker.StateHandle || g.DelegationToken.Accessor == "" || g.LatestEnd().Before(got.Grant.LatestEnd()) {
			t.Fatalf("after the crash = %s, latest end %v; want HANDLE and %v or later", g.State, g.LatestEnd(), got.Grant.LatestEnd())
		}
		_, err = w.tryRevoke(false, "%s", leakedFrom(t, got))
		refused(t, "Revoke of the value, later", err, broker.NotFound, broker.CodeSelectorEmpty)
		if !strings.Contains(err.Error(), "1 that may have it are not recorded") {
			t.Errorf("Revoke of the value, later = %v, want it to name the secret that is not recorded", err)
		}
		rv := w.revoke("chain:%s", root.Chain)
		pass(10 * time.Second)
		now, err := w.Revocation(ctx, rv.ID)
		if err != nil || now.Closure == broker.ClosureClosed || now.LatestEnd.Before(g.LatestEnd()) {
			t.Errorf("Revocation = %+v, %v; want it not CLOSED, until %v", now, err, g.LatestEnd())
		}
		if last := g.MintDeadline.Add(g.Expires.Sub(g.Created)); g.LatestEnd().Before(last) {
			t.Errorf("the latest end is %v, and a mint of the crashed process may give a secret until %v", g.LatestEnd(), last)
		}
		pass(time.Until(g.LatestEnd()) - 2*time.Second)
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if g, err := w.Close(short, as("planner"), got.Grant.ID); err != nil || g.State == broker.StateClosed { // checks it now
			t.Errorf("a second before its latest end the grant is %s, %v; want it not CLOSED", g.State, err)
		}
		pass(20 * time.Minute)
		w.wantClosure(rv, broker.ClosureClosed)
	})
}

// leakedFrom is the selector of the value of a secret.
func leakedFrom(t *testing.T, got broker.Issued) string {
	var secret struct{ Password string }
	if err := json.Unmarshal(got.Secret.Reveal(), &secret); err != nil {
		t.Fatal(err)
	}
	return selector.ForLeaked(secret.Password).String()
}
