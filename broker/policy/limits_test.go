package policy_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/policy"
)

func elsewhere(window time.Duration, tool broker.ToolName, n int, last time.Duration) change {
	return func(q *broker.Question) {
		if q.CallerHistory == nil {
			q.CallerHistory = map[time.Duration]map[broker.ToolName]broker.Past{}
		}
		q.CallerHistory[window] = map[broker.ToolName]broker.Past{tool: {Count: n, First: noon.Add(-last), Last: noon.Add(-last)}}
	}
}

// TestLimits checks which limits a decision carries, and that a permit that counts by a label permits nothing without
// the label in an envelope.
func TestLimits(t *testing.T) {
	const use1 = ` permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.read")`
	team := signed(broker.Envelope{Labels: map[string]string{"team": "x"}})
	byTeam := `@id("t") @limit("3 per 24h") @per("caller label:team")` + use1 + ";"
	for _, tt := range []struct {
		name, cedar string
		q           broker.Question
		allow       bool
		want        []broker.Limit
	}{
		{"none", use1 + ";", use("db.read"), true, nil},
		{"one", `@id("p") @limit("10 per hour")` + use1 + ";", use("db.read"), true, []broker.Limit{{Policy: "p", Steps: 10, Window: time.Hour}}},
		{"each of several", `@id("b") @limit("10 per hour") @per("caller")` + use1 + `; @id("a") @limit("100 per week")` + use1 + `; @id("c") @limit("1 per minute")` + use1 + ` when { false };`,
			use("db.read"), true, []broker.Limit{{Policy: "a", Steps: 100, Window: 168 * time.Hour}, {Policy: "b", Steps: 10, Window: time.Hour}}},
		{"by label", byTeam, use("db.read", team), true, []broker.Limit{{Policy: "t", Steps: 3, Window: 24 * time.Hour, Label: "team", Value: "x"}}},
		{"annotations in another order", strings.Replace(byTeam, `@limit("3 per 24h") @per("caller label:team")`, `@per("caller label:team") @limit("3 per 24h")`, 1),
			use("db.read", team), true, []broker.Limit{{Policy: "t", Steps: 3, Window: 24 * time.Hour, Label: "team", Value: "x"}}},
		{"by a label that is not signed", byTeam, use("db.read", label("team", "x")), false, nil},
		{"by a label that is not there", byTeam, use("db.read", signed(broker.Envelope{})), false, nil},
		{"beside a permit without", byTeam + use1 + ";", use("db.read"), true, nil},
	} {
		if got := load(t, tt.cedar).Decide(tt.q); got.Allow != tt.allow || !reflect.DeepEqual(got.Limits, tt.want) {
			t.Errorf("%s: Decide = %+v, want %v with %v", tt.name, got, tt.allow, tt.want)
		}
	}
}

// TestCallerHistoryIsSeen checks that each policy sees the caller's history in its own window, and no other.
func TestCallerHistoryIsSeen(t *testing.T) {
	const permit = `@id("ok") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.write");`
	never := func(window string) string {
		return `@id("never") @window("` + window + `") forbid(principal, action == Action::"use", resource == Tool::"db.write") when { context.caller.history has "db.read" };`
	}
	for _, tt := range []struct {
		name, cedar string
		q           broker.Question
		allow       bool
	}{
		{"never used", permit + never("24h"), use("db.write"), true},
		{"used", permit + never("24h"), use("db.write", elsewhere(24*time.Hour, "db.read", 1, time.Hour)), false},
		{"used in another window", permit + never("1h"), use("db.write", elsewhere(24*time.Hour, "db.read", 1, 2*time.Hour)), true},
		{"two windows", permit + never("1h") + strings.Replace(never("24h"), `"never"`, `"day"`, 1), use("db.write", elsewhere(24*time.Hour, "db.read", 1, 2*time.Hour)), false},
		{"the chain's history is another", permit + never("24h"), use("db.write", past("db.read", 1, 0)), true},
		{"a cool-down", permit + `@window("2h") forbid(principal, action == Action::"use", resource) when { context.caller.history has "db.write" && context.caller.history["db.write"].since_last_seconds < 600 };`,
			use("db.write", elsewhere(2*time.Hour, "db.write", 1, 9*time.Minute)), false},
		{"a cool-down that has passed", permit + `@window("2h") forbid(principal, action == Action::"use", resource) when { context.caller.history has "db.write" && context.caller.history["db.write"].since_last_seconds < 600 };`,
			use("db.write", elsewhere(2*time.Hour, "db.write", 1, 11*time.Minute)), true},
		{"the set of names", permit + `@window("2h") forbid(principal, action == Action::"use", resource) when { context.caller.used.contains("mail") };`,
			use("db.write", elsewhere(2*time.Hour, "mail", 1, 0)), false},
		{"a permit", `@id("p") @window("2h") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.write") unless { context.caller.used.contains("mail") };`,
			use("db.write", elsewhere(2*time.Hour, "mail", 1, 0)), false},
		{"a forbid of another window wins", `@id("p") @window("2h") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.write") unless { context.caller.used.contains("mail") };` + never("24h"),
			use("db.write", elsewhere(24*time.Hour, "db.read", 1, 0)), false},
	} {
		if got := load(t, tt.cedar).Decide(tt.q); got.Allow != tt.allow || got.Failed {
			t.Errorf("%s: Decide = %+v, want %v", tt.name, got, tt.allow)
		}
	}
	if got := load(t, permit+never("1h")+strings.Replace(never("24h"), `"never"`, `"day"`, 1)).CallerWindows(); len(got) != 2 {
		t.Errorf("CallerWindows = %v, want both", got)
	}
}

func TestLimitsAreWellFormed(t *testing.T) {
	const permit = ` permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.read");`
	reads := strings.TrimSuffix(permit, ";") + ` when { context.caller.history has "db.read" };`
	for _, tt := range []struct{ cedar, want string }{
		{`@limit("10 per hour")` + permit, "@limit: needs an @id"},
		{`@id("p") @limit("10")` + permit, `"10" is not like "10 per hour"`},
		{`@id("p") @limit("0 per hour")` + permit, `"0" is not a whole number`},
		{`@id("p") @limit("10 per 90m")` + permit, `"90m" is not whole minutes up to 1h, or whole hours up to 168h`},
		{`@id("p") @limit("10 per 30s")` + permit, `"30s" is not whole minutes`},
		{`@id("p") @limit("10 per 169h")` + permit, `"169h" is not whole minutes`},
		{`@id("p") @per("caller")` + permit, "@per: there is no @limit"},
		{`@id("p") @limit("10 per hour") @per("chain")` + permit, `@per: must be "caller" or "caller label:NAME"`},
		{`@id("p") @limit("10 per hour") @per("caller label:")` + permit, `@per: must be "caller"`},
		{`@id("p") @limit("10 per hour")` + strings.Replace(permit, `== Action::"use"`, `in [Action::"use", Action::"delegate"]`, 1), `apply to Action::"use" only`},
		{`@id("p") @limit("10 per hour")` + strings.Replace(permit, "permit", "forbid", 1), "@limit: belongs on a permit"},
		{`@id("p") @window("24h")` + permit, "@window: the conditions do not read context.caller"},
		{reads, "reads context.caller; say over which time"},
		{`@window("24h")` + strings.Replace(reads, `== Action::"use"`, `in [Action::"use", Action::"delegate"]`, 1), `apply to Action::"use" only`},
		{`@window("24h")` + reads, ""},
	} {
		_, err := policy.Build(sources(tt.cedar))
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("Build of %s = %v, want %q", tt.cedar, err, tt.want)
		}
	}
}
