package engine_test

import (
	"context"
	"hash/crc32"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

// answerCanary has policy say what follows a canary.
func (w *world) onCanary(what broker.Consequence) {
	w.policy.Answer = func(q broker.Question) broker.Decision {
		if q.Action == broker.ActionReport && q.Violation == broker.ViolationCanary {
			return broker.Decision{Consequence: what}
		}
		return broker.Decision{Allow: q.Action != broker.ActionReport}
	}
}

func (w *world) plant(r broker.PlantRequest) (broker.Canary, string) {
	w.t.Helper()
	c, value, err := w.Plant(ctx, responder, r)
	if err != nil {
		w.t.Fatal(err)
	}
	return c, value
}

// touched is how the list shows a canary; the zero Canary: it does not.
func (w *world) listedCanary(id broker.CanaryID) broker.Canary {
	w.t.Helper()
	list, err := w.Canaries(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, c := range list {
		if c.ID == id {
			return c
		}
	}
	return broker.Canary{}
}

// blamed counts the audit's violations by a canary.
func (w *world) canaryViolations(id broker.CanaryID) (n int) {
	w.t.Helper()
	entries, err := w.ledger.Entries(ctx, 0, 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if e.Op == broker.OpViolation && e.Code == broker.Code(broker.ViolationCanary) && strings.Contains(e.Detail, string(id)) {
			n++
		}
	}
	return n
}

// TestCanaryIsPresented: whoever presents a canary's value sets off what policy says, in the chain in which it was
// planted and in no other, and after a restart too; a value that was pulled, or never planted, nothing.
func TestCanaryIsPresented(t *testing.T) {
	for what := broker.ConsequenceDeny; what <= broker.ConsequenceFreezeCaller; what++ {
		t.Run(what.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.onCanary(what)
				root, other := w.open("root", broker.OpenRequest{}), w.open("other", broker.OpenRequest{})
				held, apart := w.issue("root", step(root, "db.read")), w.issue("other", step(other, "db.read"))
				again := w.open("root", broker.OpenRequest{})
				k, value := w.plant(broker.PlantRequest{Chain: root.Chain, Note: "the home directory"})
				pulled, gone := w.plant(broker.PlantRequest{Chain: other.Chain})
				if _, err := w.Pull(ctx, responder, pulled.ID); err != nil {
					t.Fatal(err)
				}
				w.Stop()
				w.start(w.ledger)
				for _, nobodys := range []string{gone, "hvs.nobody", value + "x", ""} {
					w.Present(ctx, as("mail"), nobodys)
				}
				w.Present(ctx, as("mail"), value+"\n")
				pass(time.Second)
				for id, want := range map[broker.GrantID]bool{held.Grant.ID: what == broker.ConsequenceDeny, apart.Grant.ID: true} {
					if got, err := w.Active(ctx, id); err != nil || got != want {
						t.Errorf("Active(%s) = %v, %v; want %v", id, got, err, want)
					}
				}
				if c := w.listedCanary(k.ID); c.Touches != 1 || c.Touched.IsZero() || c.Chain != root.Chain || c.Note != "the home directory" || c.By != responder.Name {
					t.Errorf("it is listed as %+v, want it touched once", c)
				}
				if n, m := w.canaryViolations(k.ID), w.canaryViolations(pulled.ID); n != 1 || m != 0 || w.countAlarms(string(k.ID)) != 1 || w.countAlarms("canary") != 1 {
					t.Errorf("%d violations by it and %d by the one that was pulled, alarms %v; want one of each by it alone", n, m, w.alarms)
				}
				_, err := w.Issue(ctx, as("root"), step(again, "db.read"))
				if frozen := what == broker.ConsequenceFreezeCaller; frozen != (broker.KindOf(err) == broker.Revoked) || !frozen && err != nil {
					t.Errorf("a step of the opener elsewhere = %v, want it frozen: %v", err, frozen)
				}
				w.Present(ctx, as("mail"), value)
				pass(time.Second)
				if all, err := w.Revocations(ctx); err != nil || w.listedCanary(k.ID).Touches != 2 || what == broker.ConsequenceRevokeChain && len(all) != 1 {
					t.Errorf("presented again: %+v and %d revocations, %v; want it on record, and no other revocation", w.listedCanary(k.ID), len(all), err)
				}
			})
		})
	}
}

// TestCanaryWithoutChain: it is an alarm and a line of the audit, and stops nobody.
func TestCanaryWithoutChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.onCanary(broker.ConsequenceFreezeCaller)
		root := w.open("root", broker.OpenRequest{})
		k, value := w.plant(broker.PlantRequest{})
		w.Present(ctx, as("mail"), value)
		pass(time.Second)
		if all, err := w.Revocations(ctx); err != nil || len(all) != 0 || w.canaryViolations(k.ID) != 1 || w.countAlarms("of no chain") != 1 {
			t.Errorf("%d revocations, %v, %d violations, alarms %v; want one violation, one alarm and nothing else", len(all), err, w.canaryViolations(k.ID), w.alarms)
		}
		w.issue("root", step(root, "db.read"))
		_, err := w.Plan(ctx, responder, selector.ForLeaked(value))
		refused(t, "Plan of it", err, broker.NotFound, broker.CodeCanaryValue)
		if w.canaryViolations(k.ID) != 1 {
			t.Error("a plan has it touched, and plans change nothing")
		}
		_, err = w.Revoke(ctx, responder, selector.Request{Selector: selector.ForLeaked(value), Reason: "found in a log"})
		refused(t, "Revoke of it", err, broker.NotFound, broker.CodeCanaryValue)
		if w.canaryViolations(k.ID) != 2 {
			t.Errorf("%d violations by it, want another by the operator who found it", w.canaryViolations(k.ID))
		}
	})
}

// TestRevokeCanaryValue: an operator who looks for the grant of a value that is a canary's is given what it set off.
func TestRevokeCanaryValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.onCanary(broker.ConsequenceRevokeChain)
		root := w.open("root", broker.OpenRequest{})
		held := w.issue("root", step(root, "db.read"))
		_, value := w.plant(broker.PlantRequest{Chain: root.Chain, Like: broker.GuiseGitHub})
		rv, err := w.Revoke(ctx, responder, selector.Request{Selector: selector.ForLeaked(value), Reason: "found in a log"})
		if err != nil || rv.Chain != root.Chain || rv.Node != root.ID || !strings.Contains(rv.Reason, "canary") {
			t.Fatalf("Revoke = %+v, %v; want the revocation of its chain", rv, err)
		}
		if got, err := w.Active(ctx, held.Grant.ID); err != nil || got {
			t.Errorf("Active = %v, %v; want the chain's secret fenced", got, err)
		}
		pass(time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
	})
}

// TestCanaryIsNotLost: while the ledger fails, or whoever presents the value hangs up, it is remembered until it
// can be recorded; meanwhile the one who presents it is kept waiting no longer than anybody.
func TestCanaryIsNotLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.onCanary(broker.ConsequenceRevokeChain)
		root := w.open("root", broker.OpenRequest{})
		held := w.issue("root", step(root, "db.read"))
		k, value := w.plant(broker.PlantRequest{Chain: root.Chain})
		w.ledger.Fail(func(int, []broker.Entry) brokertest.Fault { return brokertest.NotCommitted })
		hungUp, cancel := context.WithCancel(ctx)
		cancel()
		for range 3 {
			before := time.Now()
			w.Present(hungUp, as("mail"), value)
			if time.Since(before) != 0 {
				t.Error("the one who presents it waits for the ledger")
			}
		}
		pass(15 * time.Second)
		if w.countAlarms("recording that a canary was touched") == 0 || w.canaryViolations(k.ID) != 0 {
			t.Errorf("alarms %v and %d violations, want it said and not recorded", w.alarms, w.canaryViolations(k.ID))
		}
		w.ledger.Fail(nil)
		pass(11 * time.Second)
		if got, err := w.Active(ctx, held.Grant.ID); err != nil || got || w.canaryViolations(k.ID) != 1 {
			t.Errorf("Active = %v, %v with %d violations; want the chain fenced, for one", got, err, w.canaryViolations(k.ID))
		}
	})
}

// TestPlant: values look like what they are said to, are all different, and are kept nowhere.
func TestPlant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		seen := map[string]bool{}
		for like, form := range map[broker.Guise]string{"": `^hvs\.[\w-]{92}$`, broker.GuiseVault: `^hvs\.CAES[\w-]{88}$`, broker.GuiseGitHub: `^ghp_[0-9A-Za-z]{36}$`} {
			for range 20 {
				_, value := w.plant(broker.PlantRequest{Like: like})
				if !regexp.MustCompile(form).MatchString(value) || seen[value] {
					t.Errorf("a value like %q does not look like %s, or is not new", like, form)
				}
				seen[value] = true
				if like == broker.GuiseGitHub && value[34:] != checksum(value[4:34]) {
					t.Error("the checksum of a value like a GitHub token is wrong")
				}
			}
		}
		held := 0
		if err := w.ledger.View(ctx, func(tx broker.Tx) error {
			return tx.Scan("", "", func(key string, raw []byte) bool {
				held++
				for value := range seen {
					if strings.Contains(key+string(raw), value) {
						t.Errorf("the record %s holds a value", key)
					}
				}
				return true
			})
		}); err != nil || held < len(seen) {
			t.Errorf("%d records, %v", held, err)
		}
		_, _, err := w.Plant(ctx, responder, broker.PlantRequest{Like: "aws"})
		refused(t, "Plant like aws", err, broker.Malformed, "")
		_, _, err = w.Plant(ctx, responder, broker.PlantRequest{Chain: "ch0123456789abcdefghjkmnpq"})
		refused(t, "Plant in no chain", err, broker.NotFound, "")
		_, _, err = w.Plant(ctx, responder, broker.PlantRequest{Note: "a\nb"})
		refused(t, "Plant with a line break", err, broker.Malformed, "")
		_, _, err = w.Plant(ctx, broker.Operator{}, broker.PlantRequest{})
		refused(t, "Plant by nobody", err, broker.Unauthenticated, "")
		_, err = w.Pull(ctx, responder, "cn0123456789abcdefghjkmnpq")
		refused(t, "Pull of none", err, broker.NotFound, broker.CodeCanaryUnknown)
	})
}

// checksum is what GitHub ends its tokens with, worked out otherwise than the broker does.
func checksum(text string) string {
	const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	out := ""
	for n := uint64(crc32.ChecksumIEEE([]byte(text))); n > 0; n /= 62 {
		out = string(digits[n%62]) + out
	}
	return strings.Repeat("0", 6-len(out)) + out
}
