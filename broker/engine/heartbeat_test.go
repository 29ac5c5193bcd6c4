package engine_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

// follows has policy answer a lost heartbeat with a consequence.
func (w *world) onMissedHeartbeat(what broker.Consequence) {
	w.policy.Answer = func(q broker.Question) broker.Decision {
		if q.Action == broker.ActionReport && q.Violation == broker.ViolationHeartbeat {
			return broker.Decision{Consequence: what}
		}
		return broker.Decision{Allow: true}
	}
}

// raised fails unless so many violations are in the log, and gives their times.
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
		w.t.Fatalf("%d lost heartbeats are on record, want %d", len(at), want)
	}
	return at
}

const interval = 30 * time.Second

// TestMissedHeartbeat: a holder who is not heard for its interval is reported once, and again only
// after it was heard again. Without a word of policy nothing else follows.
func TestMissedHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Heartbeat: interval})
		w.open("other", broker.OpenRequest{})
		last := time.Now()
		for range 5 {
			pass(interval - time.Millisecond)
			if last = time.Now(); w.Heartbeat(ctx, as("root"), root.ID) != nil {
				t.Fatal("a sign of life was refused")
			}
		}
		w.wantMissed(0)
		pass(interval + time.Millisecond)
		if at := w.wantMissed(1); at[0].Sub(last) != interval {
			t.Errorf("raised %s after the last sign of life, want %s", at[0].Sub(last), interval)
		}
		pass(10 * interval)
		w.wantMissed(1)
		w.issue("root", step(root, "db.read")) // nothing was revoked, and it is heard again
		pass(interval + time.Millisecond)
		w.wantMissed(2)
	})
}

// TestRequestsAreHeartbeats: any request of the holder's under the delegation is a sign of life; somebody
// else's, or the broker's own look for an open stream, is not.
func TestRequestsAreHeartbeats(t *testing.T) {
	for name, row := range map[string]struct {
		request func(*world, broker.Delegation, broker.Grant) error
		heard   bool
	}{
		"heard": {func(w *world, d broker.Delegation, _ broker.Grant) error { return w.Heartbeat(ctx, as("root"), d.ID) }, true},
		"issue": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			w.issue("root", step(d, "db.read"))
			return nil
		}, true},
		"standing": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Status(ctx, as("root"), d.ID)
			return err
		}, true},
		"close": {func(w *world, _ broker.Delegation, g broker.Grant) error {
			_, err := w.Close(ctx, as("root"), g.ID)
			return err
		}, true},
		"delegate": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: d.ID, To: as("sub").ID, Rights: use("db.read")})
			return err
		}, true},
		"report": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Report(ctx, as("root"), broker.ReportRequest{Delegation: d.ID, Violation: "odd"})
			return err
		}, true},
		"under a freeze": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			if _, err := w.Revoke(ctx, responder, selector.Request{Selector: selecting(w.t, "chain:%s", d.Chain), Reason: "a look", Freeze: true}); err != nil {
				return err
			}
			if err := w.Heartbeat(ctx, as("root"), d.ID); !errors.Is(err, broker.Revoked) {
				return errors.New("a freeze was not told")
			}
			return nil
		}, true},
		"look": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			_, err := w.Peek(ctx, as("root"), d.ID)
			return err
		}, false},
		"somebody else": {func(w *world, d broker.Delegation, _ broker.Grant) error {
			if err := w.Heartbeat(ctx, as("thief"), d.ID); !errors.Is(err, broker.NotFound) {
				return errors.New("a thief was heard")
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
				w.wantMissed(map[bool]int{true: 0, false: 1}[row.heard])
				pass(interval / 2)
				w.wantMissed(1)
			})
		})
	}
}

// TestHeartbeatConsequences: what policy names follows, as the holder's breach.
func TestHeartbeatConsequences(t *testing.T) {
	for what := broker.ConsequenceDeny; what <= broker.ConsequenceFreezeCaller; what++ {
		t.Run(what.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.draw("root -> writer -> helper")
				w.onMissedHeartbeat(what)
				silent, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: d["root"].ID, To: as("silent").ID, Rights: use("db.read"), Heartbeat: interval})
				if err != nil {
					t.Fatal(err)
				}
				apart := w.open("silent", broker.OpenRequest{})
				secrets := map[string]broker.Issued{"root": w.issue("root", step(d["root"], "db.read")), "silent": w.issue("silent", step(silent, "db.read"))}
				pass(interval + time.Second)
				w.wantMissed(1)
				dead := map[string]bool{"silent": what >= broker.ConsequenceRevokeStep, "root": what >= broker.ConsequenceRevokeChain}
				for name, s := range secrets {
					if works := w.target.Login(s.Secret.Reveal()); works == dead[name] {
						t.Errorf("after %s the secret of %s works: %v", what, name, works)
					}
				}
				_, err = w.Issue(ctx, as("silent"), step(apart, "db.read"))
				if frozen := what == broker.ConsequenceFreezeCaller; frozen != errors.Is(err, broker.Revoked) {
					t.Errorf("after %s a step elsewhere = %v, want it frozen: %v", what, err, frozen)
				}
				all, err := w.Revocations(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for _, rv := range all {
					if rv.By != "pawl" || rv.Reason != "violation: lost_heartbeat" || !rv.Freeze && rv.Closure != broker.ClosureClosed {
						t.Errorf("revocation %+v, want pawl's, for the lost heartbeat, and CLOSED", rv)
					}
				}
				if want := []int{0, 1, 1, 1, 2}[what]; len(all) != want {
					t.Errorf("%d revocations after %s, want %d", len(all), what, want)
				}
				pass(10 * interval)
				w.wantMissed(1)
			})
		})
	}
}

// TestHeartbeatIsDelegated: a child promises as much as its parent or more, and its holder is
// watched from its first request on.
func TestHeartbeatIsDelegated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Heartbeat: interval, Depth: 1})
		share := func(beat time.Duration) (broker.Delegation, error) {
			return w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as("sub").ID, Rights: use("db.read"), Heartbeat: beat})
		}
		_, err := share(interval + time.Second)
		refused(t, "a longer heartbeat", err, broker.Denied, broker.CodeDelegationWider)
		var e *broker.Error
		if errors.As(err, &e); len(e.Missing) != 1 || e.Missing[0] != "heartbeat" {
			t.Errorf("missing %q, want the heartbeat", e.Missing)
		}
		for _, beat := range []time.Duration{-1, time.Millisecond, broker.MaxChainTTL + 1} {
			_, err = share(beat)
			refused(t, "a heartbeat of "+beat.String(), err, broker.Malformed, "")
			_, err = w.Open(ctx, as("root"), broker.OpenRequest{Task: "t", Rights: use("db.read"), Heartbeat: beat})
			refused(t, "a chain with a heartbeat of "+beat.String(), err, broker.Malformed, "")
		}
		same, err := share(0)
		if err != nil || same.Heartbeat != interval {
			t.Fatalf("a child without a heartbeat of its own has %s, %v; want its parent's", same.Heartbeat, err)
		}
		beats := func(d time.Duration) { // root stays in touch
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

// TestHeartbeatAfterRestart: everybody has a whole interval from then on, whatever is over is not
// expected to be heard, and a violation that could not be recorded is recorded later.
func TestHeartbeatAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{Heartbeat: interval, Depth: 1})
		w.open("short", broker.OpenRequest{Heartbeat: interval, TTL: interval + time.Second})
		gone := w.open("gone", broker.OpenRequest{Heartbeat: interval})
		for _, name := range []string{"used", "unused"} {
			d, err := w.Delegate(ctx, as("root"), broker.DelegateRequest{From: root.ID, To: as(name).ID, Rights: use("db.read")})
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
		w.wantMissed(2) // root and the one that was used
	})
}
