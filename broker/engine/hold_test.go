package engine_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// holdGrace is the time in which a held step must be held again.
const holdGrace = 1500 * time.Millisecond

func (w *world) hold(holder string, id broker.GrantID) (release func()) {
	w.t.Helper()
	release, err := w.Hold(ctx, as(holder), id)
	if err != nil {
		w.t.Fatalf("Hold(%s) = %v, want nil", id, err)
	}
	return release
}

// wantGrant fails the test unless the only grant of a chain has the state and ending.
func (w *world) wantGrant(when string, chain broker.ChainID, state broker.GrantState, ending broker.Ending) {
	w.t.Helper()
	v, err := w.Chain(ctx, chain)
	if err != nil || len(v.Grants) != 1 || v.Grants[0].State != state || v.Grants[0].Ending != ending {
		w.t.Fatalf("%s: the chain is %+v, %v, want one grant, %s and ending %q", when, v.Grants, err, state, ending)
	}
}

// TestHeldStep holds that a held step lives as long as a request of its own holder holds it, and not longer.
func TestHeldStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		r := step(root, "db.read")
		r.Held = true
		g := w.issue("root", r).Grant

		_, err := w.Hold(ctx, as("thief"), g.ID)
		refused(t, "Hold by another caller", err, broker.NotFound, broker.CodeGrantUnknown)
		pass(holdGrace - time.Millisecond)
		first := w.hold("root", g.ID)
		pass(20 * time.Second)
		second := w.hold("root", g.ID) // the next request, before the end of the first
		first()
		pass(10 * time.Second)
		w.wantGrant("held by the second request", root.Chain, broker.StateIssued, "")
		second()
		pass(holdGrace - time.Millisecond)
		third := w.hold("root", g.ID)
		pass(time.Second)
		w.wantGrant("held again", root.Chain, broker.StateIssued, "")
		third()
		pass(holdGrace + 100*time.Millisecond)
		w.wantGrant("released", root.Chain, broker.StateClosed, broker.EndingLost)
		_, err = w.Hold(ctx, as("root"), g.ID)
		refused(t, "Hold after that", err, broker.Expired, broker.CodeExpired)
		w.wantAllClosed()
	})
}

// TestNeverHeld holds that a held step that no request ever holds ends, and that another step does not.
func TestNeverHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root, other := w.open("root", broker.OpenRequest{}), w.open("root", broker.OpenRequest{})
		r := step(root, "db.read")
		r.Held = true
		w.issue("root", r)
		plain := w.issue("root", step(other, "db.read")).Grant
		pass(holdGrace + 100*time.Millisecond)
		w.wantGrant("never held", root.Chain, broker.StateClosed, broker.EndingLost)
		w.wantGrant("not to be held", other.Chain, broker.StateIssued, "")
		_, err := w.Hold(ctx, as("root"), plain.ID)
		refused(t, "Hold of a step that is not to be held", err, broker.Expired, broker.CodeExpired)
	})
}

// TestHeldOverRestart holds that a holder has 30 s to come back to the next process, which ends the step otherwise.
func TestHeldOverRestart(t *testing.T) {
	for _, back := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			root := w.open("root", broker.OpenRequest{})
			r := step(root, "db.read")
			r.Held = true
			g := w.issue("root", r).Grant
			w.hold("root", g.ID) // the process ends before the request
			w.Stop()
			w.start(w.ledger)
			pass(20 * time.Second)
			w.wantGrant("within the grace of a restart", root.Chain, broker.StateIssued, "")
			if back {
				w.hold("root", g.ID)
			}
			pass(11 * time.Second)
			if back {
				w.wantGrant("its holder is back", root.Chain, broker.StateIssued, "")
			} else {
				w.wantGrant("its holder is not back", root.Chain, broker.StateClosed, broker.EndingLost)
			}
		})
	}
}
