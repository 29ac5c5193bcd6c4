package engine_test

import (
	"crypto/rand"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
)

// TestFailedLookupRaisesAnAlarm lets Vault fail the question whether leases are gone. The broker raises an alarm, and
// the revocation is not CLOSED before Vault has answered.
func TestFailedLookupRaisesAnAlarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("root", broker.OpenRequest{})
		w.issue("root", step(root, "db.read"))
		w.vault.Fail(func(point string) error {
			if point == "gone" {
				return errors.New("an audit device of Vault fails")
			}
			return nil
		})
		rv := w.revoke("chain:%s", root.Chain)
		pass(10 * time.Second)
		w.wantClosure(rv, broker.ClosureUnknown)
		if w.countAlarms("looking leases up in Vault: an audit device of Vault fails") == 0 {
			t.Error("no alarm about the look-up of leases, want one with Vault's error")
		}
		w.vault.Fail(nil)
		pass(time.Minute)
		w.wantClosure(rv, broker.ClosureClosed)
	})
}

// TestRefusedKillRaisesAnAlarm lets Vault refuse to revoke tokens. The broker raises an alarm, and the revocation is
// not CLOSED before Vault has revoked them.
func TestRefusedKillRaisesAnAlarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := errors.New("permission denied, 403")
		target, tools := brokertest.NewTarget(), brokertest.AllowAll("db.read")
		vault := brokertest.NewVault(target)
		var mu sync.Mutex // guards alarms
		var alarms []string
		b, err := engine.New(engine.Config{Ledger: brokertest.NewMemory(), Vault: vault,
			Policy:   func() broker.Policy { return tools },
			Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1,
			Alarm: func(op string, err error) {
				mu.Lock()
				defer mu.Unlock()
				if errors.Is(err, refused) {
					alarms = append(alarms, op)
				}
			}})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Stop)
		root, err := b.Open(ctx, as("agent"), broker.OpenRequest{Task: "t", Rights: use("db.read")})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Issue(ctx, as("agent"), step(root, "db.read")); err != nil {
			t.Fatal(err)
		}
		vault.Fail(func(point string) error {
			if point == "kill" {
				return refused
			}
			return nil
		})
		sel, err := selector.Parse("chain:" + string(root.Chain))
		if err != nil {
			t.Fatal(err)
		}
		rv, err := b.Revoke(ctx, broker.Operator{Name: "ann"}, selector.Request{Selector: sel, Reason: "test"})
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(30 * time.Second)
		if rv, err = b.Revocation(ctx, rv.ID); err != nil || rv.Closure == broker.ClosureClosed {
			t.Errorf("Revocation while Vault refuses = %s, %v, want it not CLOSED", rv.Closure, err)
		}
		mu.Lock()
		for _, op := range []string{"revoking tokens in Vault", "revoking the tokens of " + string(rv.ID)} {
			if !slices.ContainsFunc(alarms, func(a string) bool { return strings.HasPrefix(a, op) }) {
				t.Errorf("alarms = %q, want one about %s", alarms, op)
			}
		}
		mu.Unlock()
		vault.Fail(nil)
		<-time.After(10 * time.Minute)
		if rv, err = b.Revocation(ctx, rv.ID); err != nil || rv.Closure != broker.ClosureClosed {
			t.Errorf("Revocation once Vault revokes tokens = %s, %v, want CLOSED", rv.Closure, err)
		}
	})
}
