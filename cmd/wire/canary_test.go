package wire_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestCanaryToolIsSeen asks for a canary tool in a chain, and when opening one. The log, a metric, the audit log and a
// security event name each.
func TestCanaryToolIsSeen(t *testing.T) {
	s := newSite(t, "example.org")
	s.identify()
	soc := newSOC(t, s)
	subscriber := soc.subscriber(s)
	subscriber.Events = []string{"canary"}
	s.config.Subscribers = map[string]wire.Subscriber{"soc": subscriber}
	var log syncBuffer
	w := s.startLogging(&log)
	root := s.open(w, nil)
	caller := broker.Caller{ID: root.Holder, Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	ctx := t.Context()
	if _, err := w.Broker.Issue(ctx, caller, broker.StepRequest{Delegation: root.ID, Tool: "keys.root"}); !errors.Is(err, broker.Denied) {
		t.Fatalf("Issue with a canary tool = %v, want denied", err)
	}
	if _, err := w.Broker.Open(ctx, caller, broker.OpenRequest{Task: "t",
		Rights: []broker.Right{{Tool: "keys.root", Use: true}}}); !errors.Is(err, broker.Denied) {
		t.Fatalf("Open with a canary tool = %v, want denied", err)
	}
	for _, chain := range []string{string(root.Chain), ""} {
		var token string
		select {
		case token = <-soc.events:
		case <-time.After(20 * time.Second):
			t.Fatal("no event came")
		}
		jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.EdDSA})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := jws.Verify(s.public)
		if err != nil {
			t.Fatal(err)
		}
		var c struct {
			Jti   string
			SubID struct {
				Format, URI string
				Session     struct{ ID string }
			} `json:"sub_id"`
			Events map[string]struct{ Tool, Chain, By string }
		}
		if err := json.Unmarshal(raw, &c); err != nil {
			t.Fatal(err)
		}
		e := c.Events["https://pawl.dev/secevent/event-type/canary"]
		if c.Jti == "" || e.Tool != "keys.root" || e.Chain != chain || e.By != caller.ID.String() ||
			c.SubID.Session.ID != chain || chain == "" && c.SubID.URI != caller.ID.String() {
			t.Errorf("the token is %s, want the canary tool, chain %q and the agent", raw, chain)
		}
	}
	if n := strings.Count(log.String(), `asked for the canary tool \"keys.root\"`); n != 2 {
		t.Errorf("the log names the canary tool %d times, want 2:\n%s", n, log.String())
	}
	if page := scrape(t, s); !strings.Contains(page, "\npawl_canary_touches_total{tool=\"keys.root\"} 2\n") ||
		strings.Contains(page, "\npawl_alarms_total 0\n") {
		t.Error("the metrics lack two touches of the canary tool, or the alarms")
	}
	entries, err := w.Broker.Entries(ctx, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	violations := 0
	for _, e := range entries {
		if e.Op == broker.OpViolation && e.Code == "canary" && e.Tool == "keys.root" {
			violations++
		}
	}
	if violations != 2 {
		t.Errorf("the audit log has %d violations, want 2", violations)
	}
}
