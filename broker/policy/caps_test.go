package policy_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/policy"
)

func asks(r broker.OpenRequest) change {
	return func(q *broker.Question) { q.Action, q.Open = broker.ActionOpen, &r }
}

// TestCaps checks which caps a decision carries: of several permits the tightest in each respect.
func TestCaps(t *testing.T) {
	const open = ` permit(principal in TrustDomain::"acme.example", action == Action::"open", resource == Tool::"db.read")`
	depth := func(n int) *int { return &n }
	for _, tt := range []struct {
		name, cedar string
		want        broker.Caps
	}{
		{"none", open + ";", broker.Caps{}},
		{"all", `@max_steps("50") @max_depth("0") @max_ttl("15m") @labels("team env") @requires_labels("team")` + open + ";",
			broker.Caps{Steps: 50, Depth: depth(0), TTL: 15 * time.Minute, Labels: []string{"env", "team"}, Required: []string{"team"}}},
		{"no label at all", `@labels("")` + open + ";", broker.Caps{Labels: []string{}}},
		{"the tightest of several permits", `@max_steps("50") @max_depth("1") @labels("team env")` + open + `;
			@max_steps("60") @max_depth("3") @max_ttl("15m") @labels("team site") @requires_labels("site")` + open + `;
			@max_steps("7") @requires_labels("env")` + open + ` when { context.open.depth > 5 };
			@max_ttl("20m") @requires_labels("team site")` + open + ";",
			broker.Caps{Steps: 50, Depth: depth(1), TTL: 15 * time.Minute, Labels: []string{"team"}, Required: []string{"site", "team"}}},
	} {
		q := use("db.read", asks(broker.OpenRequest{Depth: 2, TTL: time.Hour}))
		if got := load(t, tt.cedar).Decide(q); !got.Allow || !reflect.DeepEqual(got.Caps, tt.want) {
			t.Errorf("%s: Caps = %+v, want %+v", tt.name, got.Caps, tt.want)
		}
	}
}

// TestCapsAreWellFormed checks the refusals at load, also where caps have no effect and are therefore refused.
func TestCapsAreWellFormed(t *testing.T) {
	const open = ` permit(principal in TrustDomain::"acme.example", action == Action::"open", resource == Tool::"db.read");`
	for _, tt := range []struct{ cedar, want string }{
		{`@max_steps("0")` + open, `@max_steps: "0" is not a whole number from 1 to`},
		{`@max_steps("+5")` + open, `@max_steps: "+5" is not a whole number`},
		{`@max_depth("9")` + open, `@max_depth: "9" is not a whole number from 0 to 8`},
		{`@max_ttl("15")` + open, `@max_ttl: "15" is not a whole number of seconds up to 24h0m0s, like "15m"`},
		{`@max_ttl("25h")` + open, `@max_ttl: "25h" is not`},
		{`@labels("Team")` + open, `@labels: "Team": `},
		{`@labels("team team")` + open, `@labels: "team" is named twice`},
		{`@requires_labels("")` + open, `@requires_labels: names no label`},
		{`@max_steps("5")` + strings.Replace(open, `== Action::"open"`, `in [Action::"open", Action::"use"]`, 1), `apply to Action::"open" only`},
		{`@labels("team")` + strings.Replace(open, "open", "use", 1), `apply to Action::"open" only`},
		{`@max_ttl("15m")` + strings.Replace(open, "permit", "forbid", 1), "@max_ttl: belongs on a permit"},
	} {
		if _, err := policy.Build(sources(tt.cedar)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Build of %s = %v, want %q", tt.cedar, err, tt.want)
		}
	}
}

// TestOpenIsSeen checks that policy sees the request to open, and only at open.
func TestOpenIsSeen(t *testing.T) {
	permit := func(action, when string) string {
		return `permit(principal in TrustDomain::"acme.example", action == Action::"` + action + `", resource == Tool::"db.read") when { ` + when + " };"
	}
	asked := asks(broker.OpenRequest{Budget: broker.Budget{Steps: 50, Live: 2, PerMinute: 9}, Depth: 2, TTL: 15 * time.Minute, Heartbeat: 5 * time.Second})
	for _, tt := range []struct {
		name, cedar string
		q           broker.Question
		allow       bool
	}{
		{"each member", permit("open", `context.open == {steps: 50, live: 2, per_minute: 9, depth: 2, ttl_seconds: 900, heartbeat_seconds: 5}`), use("db.read", asked), true},
		{"one member", permit("open", `context.open.steps <= 50`), use("db.read", asked), true},
		{"no limit asked is no number", permit("open", `context.open has steps`), use("db.read", asks(broker.OpenRequest{})), false},
		{"a missing number denies", permit("open", `context.open.steps <= 50`), use("db.read", asks(broker.OpenRequest{})), false},
		{"the default life is seen", permit("open", `context.open.ttl_seconds == 3600 && context.open.depth == 0`), use("db.read", asks(broker.OpenRequest{})), true},
		{"not at use", permit("use", `context has open`), use("db.read", asked, action(broker.ActionUse)), false},
	} {
		if got := load(t, tt.cedar).Decide(tt.q); got.Allow != tt.allow {
			t.Errorf("%s: Decide = %+v, want %v", tt.name, got, tt.allow)
		}
	}
}
