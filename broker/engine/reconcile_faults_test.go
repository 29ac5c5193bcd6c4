package engine_test

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

// TestRevocationsCloseThroughFaults fails each commit of a revocation in turn, before and after it is applied. Without
// a restart, the chain is dead and every revocation in the ledger is CLOSED. An operator repeats a command that failed.
// An agent that broke policy does not repeat its request.
func TestRevocationsCloseThroughFaults(t *testing.T) {
	for name, revoke := range map[string]revoking{
		"operator": func(w *world, root broker.Delegation) (err error) {
			s, err := selector.Parse("chain:" + string(root.Chain))
			for range 2 {
				if _, err = w.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "a test"}); err == nil {
					break
				}
			}
			return err
		},
		"violation": func(w *world, root broker.Delegation) error {
			w.policy.Answer = func(q broker.Question) broker.Decision {
				return broker.Decision{Consequence: broker.ConsequenceRevokeChain,
					Policies: []string{"no-" + string(q.Tool.Name)}}
			}
			if _, err := w.Issue(ctx, as("root"), step(root, "db.write")); err == nil {
				return errors.New("a step with a forbidden tool got a secret")
			}
			return nil
		},
	} {
		for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
			for n, failed := 1, true; failed; n++ {
				t.Run(fmt.Sprintf("%s/%d/commit %d", name, fault, n), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { failed = closesThrough(t, revoke, fault, n) })
				})
			}
		}
	}
}

// revoking revokes the chain of a root.
type revoking func(w *world, root broker.Delegation) error

// closesThrough fails the n-th commit. It reports whether there was one.
func closesThrough(t *testing.T, revoke revoking, fault brokertest.Fault, n int) (failed bool) {
	w := newWorld(t)
	root := w.open("root", broker.OpenRequest{})
	w.issue("root", step(root, "db.read"))
	// Vault refuses once to revoke a token. The tokens of steps and of delegations are revoked at the same time.
	var refused atomic.Bool
	w.vault.Fail(func(point string) error {
		if point == "kill" && !refused.Swap(true) {
			return errors.New("sealed")
		}
		return nil
	})
	// The fence of a violation was not committed, and no request repeats it. It fails with the ISSUED before it, too.
	lost := false
	w.ledger.Fail(func(i int, entries []broker.Entry) brokertest.Fault {
		if i != n {
			return brokertest.None
		}
		failed = true
		lost = fault == brokertest.NotCommitted && (entries[0].Op == broker.OpViolation || entries[0].Op == broker.OpIssued)
		return fault
	})
	if err := revoke(w, root); err != nil {
		t.Fatal(err)
	}
	pass(30 * time.Second) // half of the secret's TTL
	all, err := w.Revocations(ctx)
	if err != nil || len(all) == 0 && !lost {
		t.Fatalf("Revocations() = %v, %v; want at least one", all, err)
	}
	for _, rv := range all {
		if rv.Closure != broker.ClosureClosed || rv.Settled.IsZero() || rv.Dead != rv.Grants {
			t.Errorf("revocation = %+v, want it CLOSED and all grants dead", rv)
		}
	}
	if !lost {
		w.wantAllClosed()
	}
	return failed
}
