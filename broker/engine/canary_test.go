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

// onCanary lets policy answer a touched canary with a consequence.
func (w *world) onCanary(consequence broker.Consequence) {
	w.policy.Answer = func(q broker.Question) broker.Decision {
		if q.Action == broker.ActionReport && q.Violation == broker.ViolationCanary {
			return broker.Decision{Consequence: consequence}
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

// listedCanary returns a canary as Canaries lists it; the zero Canary: it does not.
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

// canaryViolations counts the violations in the audit log that name a canary.
func (w *world) canaryViolations(id broker.CanaryID) (n int) {
	w.t.Helper()
	entries, err := w.ledger.Entries(ctx, 0, 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if e.Op == broker.OpViolation && e.Code == broker.Code(broker.ViolationCanary) &&
			strings.Contains(e.Detail, string(id)) {
			n++
		}
	}
	return n
}

// TestCanaryIsPresented presents a canary's value after a restart. The broker applies policy's consequence to the chain
// of the canary, and to no other. A value that was pulled or never planted has no consequence.
func TestCanaryIsPresented(t *testing.T) {
	for consequence := broker.ConsequenceDeny; consequence <= broker.ConsequenceFreezeCaller; consequence++ {
		t.Run(consequence.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.onCanary(consequence)
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
				for _, unknown := range []string{gone, "hvs.unknown", value + "x", ""} {
					w.Present(ctx, as("mail"), unknown)
				}
				w.Present(ctx, as("mail"), value+"\n")
				pass(time.Second)
				for id, want := range map[broker.GrantID]bool{
					held.Grant.ID: consequence == broker.ConsequenceDeny, apart.Grant.ID: true,
				} {
					if got, err := w.Active(ctx, id); err != nil || got != want {
						t.Errorf("Active(%s) = %v, %v; want %v", id, got, err, want)
					}
				}
				c := w.listedCanary(k.ID)
				if c.Touches != 1 || c.Touched.IsZero() || c.Chain != root.Chain || c.Note != "the home directory" ||
					c.By != responder.Name {
					t.Errorf("the canary is listed as %+v, want it touched once", c)
				}
				if n, m := w.canaryViolations(k.ID), w.canaryViolations(pulled.ID); n != 1 || m != 0 {
					t.Errorf("%d violations name the canary and %d the pulled one, want 1 and 0", n, m)
				}
				if w.countAlarms(string(k.ID)) != 1 || w.countAlarms("canary") != 1 {
					t.Errorf("alarms = %q, want one about the canary", w.alarms)
				}
				_, err := w.Issue(ctx, as("root"), step(again, "db.read"))
				frozen := consequence == broker.ConsequenceFreezeCaller
				if frozen != (broker.KindOf(err) == broker.Revoked) || !frozen && err != nil {
					t.Errorf("a step in the opener's other chain = %v, want it frozen: %v", err, frozen)
				}
				w.Present(ctx, as("mail"), value)
				pass(time.Second)
				c = w.listedCanary(k.ID)
				all, err := w.Revocations(ctx)
				if err != nil || c.Touches != 2 || consequence == broker.ConsequenceRevokeChain && len(all) != 1 {
					t.Errorf("after another Present: %+v and %d revocations, %v; want 2 touches and no new revocation",
						c, len(all), err)
				}
			})
		})
	}
}

// TestCanaryWithoutChain holds that a canary of no chain raises an alarm and is in the audit log, and fences nothing.
func TestCanaryWithoutChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.onCanary(broker.ConsequenceFreezeCaller)
		root := w.open("root", broker.OpenRequest{})
		k, value := w.plant(broker.PlantRequest{})
		w.Present(ctx, as("mail"), value)
		pass(time.Second)
		all, err := w.Revocations(ctx)
		if n := w.canaryViolations(k.ID); err != nil || len(all) != 0 || n != 1 || w.countAlarms("of no chain") != 1 {
			t.Errorf("%d revocations, %v, %d violations, alarms %q; want only one violation and one alarm",
				len(all), err, n, w.alarms)
		}
		w.issue("root", step(root, "db.read"))
		_, err = w.Plan(ctx, responder, selector.ForLeaked(value))
		refused(t, "Plan of the value", err, broker.NotFound, broker.CodeCanaryValue)
		if w.canaryViolations(k.ID) != 1 {
			t.Error("the plan touched the canary, want plans to change nothing")
		}
		_, err = w.Revoke(ctx, responder, selector.Request{Selector: selector.ForLeaked(value),
			Reason: "found in a log"})
		refused(t, "Revoke of the value", err, broker.NotFound, broker.CodeCanaryValue)
		if n := w.canaryViolations(k.ID); n != 2 {
			t.Errorf("%d violations name the canary, want another for the operator's Revoke", n)
		}
	})
}

// TestRevokeCanaryValue holds that Revoke of a canary's value returns the revocation that the value has triggered.
func TestRevokeCanaryValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.onCanary(broker.ConsequenceRevokeChain)
		root := w.open("root", broker.OpenRequest{})
		held := w.issue("root", step(root, "db.read"))
		_, value := w.plant(broker.PlantRequest{Chain: root.Chain, Like: broker.CanaryGitHubToken})
		rv, err := w.Revoke(ctx, responder, selector.Request{Selector: selector.ForLeaked(value),
			Reason: "found in a log"})
		if err != nil || rv.Chain != root.Chain || rv.Node != root.ID || !strings.Contains(rv.Reason, "canary") {
			t.Fatalf("Revoke = %+v, %v; want the revocation of the canary's chain", rv, err)
		}
		if got, err := w.Active(ctx, held.Grant.ID); err != nil || got {
			t.Errorf("Active = %v, %v; want the chain's grant fenced", got, err)
		}
		pass(time.Second)
		w.wantClosure(rv, broker.ClosureClosed)
	})
}

// TestCanaryIsNotLost presents a canary while the ledger fails, on a request that is cancelled. The broker retries
// until it can record the violation. Present returns at once, so the caller cannot tell a canary by the time.
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
			if waited := time.Since(before); waited != 0 {
				t.Errorf("Present returned after %v, want at once", waited)
			}
		}
		pass(15 * time.Second)
		if n := w.canaryViolations(k.ID); w.countAlarms("recording that a canary was touched") == 0 || n != 0 {
			t.Errorf("alarms %q and %d violations, want an alarm and none", w.alarms, n)
		}
		w.ledger.Fail(nil)
		pass(11 * time.Second)
		got, err := w.Active(ctx, held.Grant.ID)
		if n := w.canaryViolations(k.ID); err != nil || got || n != 1 {
			t.Errorf("Active = %v, %v with %d violations; want the chain fenced, for one violation", got, err, n)
		}
	})
}

// TestPlant holds that the values have the form of their guise, are all different, and are stored nowhere.
func TestPlant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		seen := map[string]bool{}
		for like, form := range map[broker.CanaryKind]string{
			"":                       `^hvs\.[\w-]{92}$`,
			broker.CanaryVaultToken:  `^hvs\.CAES[\w-]{88}$`,
			broker.CanaryGitHubToken: `^ghp_[0-9A-Za-z]{36}$`,
		} {
			for range 20 {
				_, value := w.plant(broker.PlantRequest{Like: like})
				if !regexp.MustCompile(form).MatchString(value) || seen[value] {
					t.Errorf("a value like %q does not match %s, or is not new", like, form)
				}
				seen[value] = true
				if like == broker.CanaryGitHubToken && value[34:] != checksum(value[4:34]) {
					t.Error("the checksum of a value like a GitHub token is wrong")
				}
			}
		}
		records := 0
		if err := w.ledger.View(ctx, func(tx broker.Tx) error {
			return tx.Scan("", "", func(key string, raw []byte) bool {
				records++
				for value := range seen {
					if strings.Contains(key+string(raw), value) {
						t.Errorf("the record %s contains a value", key)
					}
				}
				return true
			})
		}); err != nil || records < len(seen) {
			t.Errorf("the ledger has %d records, %v; want one for each canary", records, err)
		}
		_, _, err := w.Plant(ctx, responder, broker.PlantRequest{Like: "aws"})
		refused(t, "Plant like aws", err, broker.Malformed, "")
		_, _, err = w.Plant(ctx, responder, broker.PlantRequest{Chain: "ch0123456789abcdefghjkmnpq"})
		refused(t, "Plant in an unknown chain", err, broker.NotFound, "")
		_, _, err = w.Plant(ctx, responder, broker.PlantRequest{Note: "a\nb"})
		refused(t, "Plant with a line break", err, broker.Malformed, "")
		_, _, err = w.Plant(ctx, broker.Operator{}, broker.PlantRequest{})
		refused(t, "Plant without an operator", err, broker.Unauthenticated, "")
		_, err = w.Pull(ctx, responder, "cn0123456789abcdefghjkmnpq")
		refused(t, "Pull of an unknown canary", err, broker.NotFound, broker.CodeCanaryUnknown)
	})
}

// checksum computes the end of a GitHub token from its start, by another algorithm than the broker's.
func checksum(text string) string {
	const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	out := ""
	for n := uint64(crc32.ChecksumIEEE([]byte(text))); n > 0; n /= 62 {
		out = string(digits[n%62]) + out
	}
	return strings.Repeat("0", 6-len(out)) + out
}
