package wire_test

import (
	"crypto/rand"
	"errors"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestMetrics holds that the metrics count committed entries, also after a restart, and that no label has a
// name that an agent made up.
func TestMetrics(t *testing.T) {
	ctx := t.Context()
	ledger, target, tools := brokertest.NewMemory(), brokertest.NewTarget(), brokertest.AllowAll("db")
	start := func() (*engine.Engine, func() string) {
		parts := engine.Config{Ledger: ledger, Policy: func() broker.Policy { return tools },
			Vault: brokertest.NewVault(target), Backends: map[string]broker.Backend{"target": target},
			Now: time.Now, Random: rand.Reader, SweepEvery: -1, Alarm: func(string, error) {}}
		known := func(name broker.ToolName) bool { return name == "db" }
		m := wire.Counting(&parts, known, func() error { return errors.New("no session") })
		b, err := engine.New(parts)
		if err != nil {
			t.Fatal(err)
		}
		if err := wire.Seed(m, ctx, b); err != nil {
			t.Fatal(err)
		}
		if err := b.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Stop)
		return b, func() string {
			w := httptest.NewRecorder()
			m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
			return w.Body.String()
		}
	}
	b, scrape := start()
	agent := broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/agent"),
		Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := b.Open(ctx, agent, broker.OpenRequest{Task: "t", Rights: []broker.Right{{Tool: "db", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := b.Issue(ctx, agent, broker.StepRequest{Delegation: root.ID, Tool: "db"}); err != nil {
			t.Fatal(err)
		}
	}
	_, err = b.Issue(ctx, agent, broker.StepRequest{Delegation: root.ID, Tool: "made-up"})
	if !errors.Is(err, broker.Denied) {
		t.Fatalf("Issue with an unknown tool = %v, want denied", err)
	}
	lines(t, scrape(), `pawl_steps_total{outcome="issued",tool="db"} 2`,
		`pawl_steps_total{outcome="denied",tool="other"} 1`,
		`pawl_live_grants 2`, `pawl_vault_ready 0`, `pawl_irrevocable_leases 0`,
		`pawl_leftover_leases{state="removing"} 0`, `pawl_leftover_leases{state="stuck"} 0`, `pawl_closure_lag_seconds 0`)
	b.Stop()

	b, scrape = start()
	lines(t, scrape(), `pawl_live_grants 2`)
	sel, err := selector.Parse("chain:" + string(root.Chain))
	if err != nil {
		t.Fatal(err)
	}
	rv, err := b.Revoke(ctx, broker.Operator{Name: "ann"}, selector.Request{Selector: sel, Reason: "test"})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for rv.Settled.IsZero() {
		woken, cancel := b.Watch("")
		if rv, err = b.Revocation(ctx, rv.ID); err != nil {
			t.Fatal(err)
		}
		if rv.Settled.IsZero() {
			select {
			case <-woken:
			case <-deadline:
				t.Fatalf("%+v did not settle within 10 s", rv)
			}
		}
		cancel()
	}
	b.Stop() // waits until every entry is counted
	page := scrape()
	lines(t, page, `pawl_live_grants 0`, `pawl_fences_total{kind="revoke"} 1`, `pawl_closure_seconds_count 1`,
		`pawl_closure_lag_seconds 0`)
	if found := regexp.MustCompile(`(ch|dl|gr|rv)[0-9a-z]{24}|spiffe:|marker|made-up`).FindString(page); found != "" {
		t.Errorf("the metrics have %q", found)
	}
}

func lines(t *testing.T, page string, want ...string) {
	t.Helper()
	for _, line := range want {
		if !strings.Contains("\n"+page, "\n"+line+"\n") {
			t.Errorf("the metrics lack %q:\n%s", line, regexp.MustCompile(`(?m)^pawl_.*$`).FindAllString(page, -1))
		}
	}
}

// TestStuckLeasesAreAFault holds that leases that Vault does not remove are a fault of the broker that stops no issue,
// and that leases on their way are none.
func TestStuckLeasesAreAFault(t *testing.T) {
	if found := wire.Leftovers(1000, 0); len(found) != 0 {
		t.Errorf("the faults for leases on their way are %v, want none", found)
	}
	found := wire.Leftovers(5, 2)
	if len(found) != 1 || found[0].Code != broker.CodeLeasesLeft || found[0].Blocks ||
		!strings.Contains(found[0].Text, "leases still being removed: 5, of which Vault has left 2") {
		t.Errorf("the faults for stuck leases are %+v, want one with both numbers that blocks nothing", found)
	}
}
