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

// TestRevocationsCloseThroughFaults fails each commit of a revocation in turn, before and after it
// was applied: without a restart the chain is dead and every revocation in the ledger CLOSED. An
// operator repeats what was not acknowledged; whoever broke policy does not.
func TestRevocationsCloseThroughFaults(t *testing.T) {
	for name, end := range map[string]func(w *world, root broker.Delegation) error{
		"operator": func(w *world, root broker.Delegation) (err error) {
			s, err := selector.Parse("chain:" + string(root.Chain))
			for range 2 {
				if _, err = w.Revoke(ctx, broker.Operator{Name: "ana"}, selector.Request{Selector: s, Reason: "a test"}); err == nil {
					break
				}
			}
			return err
		},
		"violation": func(w *world, root broker.Delegation) error {
			w.policy.Answer = func(q broker.Question) broker.Decision {
				return broker.Decision{Consequence: broker.ConsequenceRevokeChain, Policies: []string{"no-" + string(q.Tool.Name)}}
			}
			if _, err := w.Issue(ctx, as("root"), step(root, "db.write")); err == nil {
				return errors.New("a forbidden tool was given")
			}
			return nil
		},
	} {
		for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
			for n, came := 1, true; came; n++ {
				t.Run(fmt.Sprintf("%s/%d/commit %d", name, fault, n), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { came = settlesThrough(t, end, fault, n) })
				})
			}
		}
	}
}

// settlesThrough reports whether there was an n-th commit.
func settlesThrough(t *testing.T, end func(*world, broker.Delegation) error, fault brokertest.Fault, n int) (came bool) {
	w := newWorld(t)
	root := w.open("root", broker.OpenRequest{})
	w.issue("root", step(root, "db.read"))
	var refused atomic.Bool // Vault refuses to revoke a token, once; steps' and delegations' are revoked at the same time
	w.vault.Fail(func(point string) error {
		if point == "kill" && !refused.Swap(true) {
			return errors.New("sealed")
		}
		return nil
	})
	lost := false // a fence that was not written, and that nobody asks for again
	w.ledger.Fail(func(i int, entries []broker.Entry) brokertest.Fault {
		if i != n {
			return brokertest.None
		}
		came, lost = true, fault == brokertest.NotCommitted && entries[0].Op == broker.OpViolation
		return fault
	})
	if err := end(w, root); err != nil {
		t.Fatal(err)
	}
	pass(30 * time.Second) // half of the secret's life
	all, err := w.Revocations(ctx)
	if err != nil || len(all) == 0 && !lost {
		t.Fatalf("Revocations() = %v, %v", all, err)
	}
	for _, rv := range all {
		if rv.Closure != broker.ClosureClosed || rv.Settled.IsZero() || rv.Dead != rv.Grants {
			t.Errorf("the revocation is %+v, want it settled as CLOSED", rv)
		}
	}
	if !lost {
		w.wantAllClosed()
	}
	return came
}
