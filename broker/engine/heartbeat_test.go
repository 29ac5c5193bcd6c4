package engine_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// onMissedHeartbeat lets policy answer a missed heartbeat with a consequence.
func (w *world) onMissedHeartbeat(consequence broker.Consequence) {
	w.policy.Answer = func(q broker.Question) broker.Decision {
		if q.Action == broker.ActionReport && q.Violation == broker.ViolationHeartbeat {
			return broker.Decision{Consequence: consequence}
		}
		return broker.Decision{Allow: true}
	}
}

// wantMissed fails the test unless the audit log has so many missed heartbeats. It returns their times.
func (w *world) wantMissed(want int) (at []time.Time) {
	w.t.Helper()
	all, err := w.Entries(ctx, 0, 10000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range all {
		if e.Op == broker.OpViolation && e.Code == broker.Code(broker.ViolationHeartbeat) {
			at = append(at, e.At)
		}
	}
	if len(at) != want {
		w.t.Fatalf("the audit log has %d missed heartbeats, want %d", len(at), want)
	}
	return at
}

const interval = 30 * time.Second

// TestMissedHeartbeat holds that a holder with a late heartbeat has one violation, and another only after it has sent a
// heartbeat again. Without a consequence in policy, nothing else happens.
func TestMissedHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Heartbeat: interval})
		w.open("other", broker.OpenRequest{})
		last := time.Now()
		for range 5 {
			pass(interval - time.Millisecond)
			if last = time.Now(); w.Heartbeat(ctx, as("root"), root.ID) != nil {
				t.Fatal("a heartbeat was refused")
			}
		}
		w.wantMissed(0)
		pass(interval + time.Millisecond)
		if at := w.wantMissed(1); at[0].Sub(last) != interval {
			t.Errorf("the violation came %s after the last heartbeat, want %s", at[0].Sub(last), interval)
		}
		pass(10 * interval)
		w.wantMissed(1)
		w.issue("root", step(root, "db.read")) // nothing was revoked, and this is a heartbeat
		pass(interval + time.Millisecond)
		w.wantMissed(2)
	})
}

// TestRequestsAreHeartbeats holds that every request by the holder under the delegation is a heartbeat. A request by
// another caller is none, and neither is the Peek by which the broker serves an open stream.
func TestRequestsAreHeartbeats(t *testing.T) {
	for name, row := range map[string]struct {
		request   func(*world, broker.Delegation, broker.Grant) error
		heartbeat bool
	}{
		"heartbeat": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			return w.Heartbeat(ctx, as("root"), d.ID)
		}, true},
		"issue": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			w.issue("root", step(d, "db.read"))
			return nil
		}, true},
		"status": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Status(ctx, as("root"), d.ID)
			return err
		}, true},
		"close": {func(w *world, _ broker.Delegation, g broker.Grant) error {
			_, err := w.Close(ctx, as("root"), g.ID)
			return err
		}, true},
		"delegate": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: d.ID, To: as("sub").ID,
				Rights: use("db.read")})
			return err
		}, true},
		"report": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Report(ctx, as("root"), broker.ReportRequest{Delegation: d.ID, Violation: "odd"})
			return err
		}, true},
		"heartbeat under a freeze": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			if _, err := w.tryRevoke(true, "chain:%s", d.Chain); err != nil {
				return err
			}
			if err := w.Heartbeat(ctx, as("root"), d.ID); !errors.Is(err, broker.Revoked) {
				return fmt.Errorf("Heartbeat under a freeze = %v, want Revoked", err)
			}
			return nil
		}, true},
		"peek": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Peek(ctx, as("root"), d.ID)
			return err
		}, false},
		"heartbeat by another caller": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			if err := w.Heartbeat(ctx, as("thief"), d.ID); !errors.Is(err, broker.NotFound) {
				return fmt.Errorf("Heartbeat by another caller = %v, want NotFound", err)
			}
			return nil
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{Heartbeat: interval, Depth: 1})
				g := w.issue("root", step(root, "db.read")).Grant
				pass(interval / 2)
				if err := row.request(w, root, g); err != nil {
					t.Fatal(err)
				}
				pass(interval/2 + time.Millisecond)
				w.wantMissed(map[bool]int{true: 0, false: 1}[row.heartbeat])
				pass(interval / 2)
				w.wantMissed(1)
			})
		})
	}
}

// TestHeartbeatConsequences holds that the broker applies the consequence that policy attaches to a missed heartbeat,
// as for any breach by the holder.
func TestHeartbeatConsequences(t *testing.T) {
	for consequence := broker.ConsequenceDeny; consequence <= broker.ConsequenceFreezeCaller; consequence++ {
		t.Run(consequence.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.draw("root -> writer -> helper")
				w.onMissedHeartbeat(consequence)
				silent, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: d["root"].ID,
					To: as("silent").ID, Rights: use("db.read"), Heartbeat: interval})
				if err != nil {
					t.Fatal(err)
				}
				apart := w.open("silent", broker.OpenRequest{})
				secrets := map[string]broker.Issued{
					"root":   w.issue("root", step(d["root"], "db.read")),
					"silent": w.issue("silent", step(silent, "db.read")),
				}
				pass(interval + time.Second)
				w.wantMissed(1)
				dead := map[string]bool{
					"silent": consequence >= broker.ConsequenceRevokeStep,
					"root":   consequence >= broker.ConsequenceRevokeChain,
				}
				for name, s := range secrets {
					if works := w.target.Login(s.Secret.Reveal()); works == dead[name] {
						t.Errorf("after %s the secret of %s works: %v", consequence, name, works)
					}
				}
				_, err = w.Issue(ctx, as("silent"), step(apart, "db.read"))
				if frozen := consequence == broker.ConsequenceFreezeCaller; frozen != errors.Is(err, broker.Revoked) {
					t.Errorf("after %s a step in another chain = %v, want it frozen: %v", consequence, err, frozen)
				}
				all, err := w.Revocations(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for _, rv := range all {
					if rv.By != "pawl" || rv.Reason != "violation: lost_heartbeat" ||
						!rv.Freeze && rv.Closure != broker.ClosureClosed {
						t.Errorf("revocation = %+v, want it by pawl, for the lost heartbeat, and CLOSED", rv)
					}
				}
				if want := []int{0, 1, 1, 1, 2}[consequence]; len(all) != want {
					t.Errorf("after %s there are %d revocations, want %d", consequence, len(all), want)
				}
				pass(10 * interval)
				w.wantMissed(1)
			})
		})
	}
}

// TestHeartbeatIsDelegated holds that a child's heartbeat interval is its parent's or shorter. The broker watches the
// child's holder from the holder's first request on.
func TestHeartbeatIsDelegated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Heartbeat: interval, Depth: 1})
		share := func(beat time.Duration) (broker.Delegation, error) {
			return w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as("sub").ID,
				Rights: use("db.read"), Heartbeat: beat})
		}
		_, err := share(interval + time.Second)
		refused(t, "Delegate with a longer heartbeat", err, broker.Denied, broker.CodeDelegationWider)
		var e *broker.Error
		if errors.As(err, &e); len(e.Missing) != 1 || e.Missing[0] != "heartbeat" {
			t.Errorf("the refusal names %q as missing, want the heartbeat", e.Missing)
		}
		for _, beat := range []time.Duration{-1, time.Millisecond, broker.MaxChainTTL + 1} {
			_, err = share(beat)
			refused(t, "Delegate with a heartbeat of "+beat.String(), err, broker.Malformed, "")
			_, err = w.Open(ctx, as("root"), broker.OpenRequest{Task: "t", Rights: use("db.read"), Heartbeat: beat})
			refused(t, "Open with a heartbeat of "+beat.String(), err, broker.Malformed, "")
		}
		same, err := share(0)
		if err != nil || same.Heartbeat != interval {
			t.Fatalf("a child made without a heartbeat has %s, %v; want its parent's", same.Heartbeat, err)
		}
		beats := func(d time.Duration) { // passes time while root sends heartbeats
			for range d / time.Second {
				pass(time.Second)
				_ = w.Heartbeat(ctx, as("root"), root.ID)
			}
		}
		beats(3 * interval)
		w.wantMissed(0)
		if _, err := w.Status(ctx, as("sub"), same.ID); err != nil {
			t.Fatal(err)
		}
		beats(interval + time.Second)
		w.wantMissed(1)
	})
}

// TestHeartbeatAfterRestart holds that each holder has a whole interval from the restart on. The broker expects none
// under an expired or fenced delegation. It records a violation later when the ledger fails at first.
func TestHeartbeatAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Heartbeat: interval, Depth: 1})
		w.open("short", broker.OpenRequest{Heartbeat: interval, TTL: interval + time.Second})
		gone := w.open("gone", broker.OpenRequest{Heartbeat: interval})
		for _, name := range []string{"used", "unused"} {
			d, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as(name).ID,
				Rights: use("db.read")})
			if err != nil {
				t.Fatal(err)
			}
			if name == "used" {
				w.issue(name, step(d, "db.read"))
			}
		}
		w.revoke("chain:%s", gone.Chain)
		pass(interval - time.Second)
		w.Stop()
		pass(time.Hour/2 - interval)
		w.vault = w.vault.Restarted()
		w.start(w.ledger)
		pass(interval - time.Second)
		w.wantMissed(0)
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
		pass(5 * time.Second)
		w.wantMissed(0)
		w.ledger.Fail(nil)
		pass(2 * time.Second)
		w.wantMissed(2) // root, and the child that was used
	})
}
