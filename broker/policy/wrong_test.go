package policy_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/policy"
)

// when is a permit of a step with db.read, with a condition.
func when(condition string) string {
	return `@id("p") permit(principal == Agent::"spiffe://acme.example/x", action == Action::"use", resource == Tool::"db.read") when { ` +
		condition + ` };`
}

// wrongPolicies are legal Cedar, and wrong: each with a part of its refusal. Cedar's validator finds some of them against
// the schema that the product writes; the rest is found by the product itself.
var wrongPolicies = []struct{ cedar, why string }{
	// A condition that always fails denies everything in its scope.
	{when(`context.args.env in ["prod", "test"]`), `condition always fails`},
	{when(`"read" in context.used`), `condition always fails`},
	{when(`context.args.env > "a"`), `condition always fails`},
	{when(`context.args.limit + 1`), `condition always fails`},
	{when(`context.args.env.contains("prod")`), `condition always fails`},
	{when(`context.args.tables like "*"`), `condition always fails`},
	{when(`!context.args.env`), `condition always fails`},
	{when(`context.task && true`), `condition always fails`},
	{when(`context.now.time < 5`), `condition always fails`},
	{when(`context.used.count > 1`), `condition always fails`},
	{when(`ip("10.0.0.1").isInRange("10.0.0.0/8")`), `condition always fails`},
	{when(`if context.chain.depth then true else false`), `condition always fails`},
	{when(`principal.groups.contains("x")`), `principal never has a member "groups"`},
	{when(`context.receiver == principal`), `receiver`},
	{`@id("p") @any("tool") permit(principal == Agent::"spiffe://acme.example/x", action in [Action::"open", Action::"use"], resource) when { context.args.env == "x" };`,
		`for Action::"open" on Tool::"db.read" the condition always fails`},
	{`forbid(principal, action == Action::"use", resource in ToolGroup::"db") when { context.args.env == "x" };`,
		`for Action::"use" on Tool::"db.write" the condition always fails`},
	{`forbid(principal, action, resource == Tool::"db.read") when { context.violation == "canary" };`, `Action::"open"`},

	// Nothing can match.
	{when(`context.args.limit == "5"`), `the types Long and String are not compatible`},
	{when(`context.proof == 1`), `not compatible`},
	{when(`context.args.tables.contains(1)`), `not compatible`},
	{when(`false`), `its condition never holds`},
	{when(`1 == 2`), `its condition never holds`},
	{when(`true`)[:len(when(`true`))-1] + ` unless { true };`, `its condition never holds`},
	{`forbid(principal, action == Action::"sue", resource);`, `no such action`},
	{`forbid(principal, action in [Action::"use", Action::"sue"], resource);`, `no such action`},
	{`forbid(principal == Agent::"acme/x", action, resource);`, `Agent::"acme/x" does not exist`},
	{`forbid(principal == AgentGroup::"spiffe://acme.example/x", action, resource);`, `principal cannot be AgentGroup`},
	{`forbid(principal is User, action, resource);`, `principal is always Agent, never User`},
	{`forbid(principal, action, resource is Tol in ToolGroup::"db");`, `resource is always Tool, never Tol`},
	{`forbid(principal, action, resource == Agent::"spiffe://acme.example/x");`, `resource cannot be Agent`},

	// A group, a tool or a member does not exist.
	{`forbid(principal, action, resource == Tool::"db.raed");`, `main.cedar:1: policy "main.cedar#1": can match nothing: Tool::"db.raed" does not exist`},
	{`forbid(principal, action, resource in ToolGroup::"dv");`, `ToolGroup::"dv" does not exist`},
	{`forbid(principal in AgentGroup::"spiffe://acme.example", action, resource);`, `AgentGroup::"spiffe://acme.example" does not exist`},
	{`forbid(principal in TrustDomain::"spiffe://acme.example", action, resource);`, `does not exist`},
	{when(`context.chain.opener in AgentGroup::"ci"`), `AgentGroup::"ci" does not exist`},
	{when(`resource in [Tool::"db.raed"]`), `Tool::"db.raed" does not exist`},
	{when(`context.args.tabels == ["x"]`), `context.args never has a member "tabels"`},
	{when(`context.arg.env == "x"`), `context never has a member "arg"`},
	{when(`context.history has "db.raed"`), `context.history never has a member "db.raed"`},
	{when(`context.history["db.read"].counts > 1`), `context.history.db.read never has a member "counts"`},
	{when(`context.used.contains("db.raed")`), `context.used never has "db.raed"`},
	{when(`context.chain.label has x`), `context.chain never has a member "label"`},
	{when(`resource.narowing == "native"`), `resource never has a member "narowing"`},

	// An annotation enforces nothing.
	{`@id("p") @ttl("30s") permit(principal == Agent::"spiffe://acme.example/x", action == Action::"open", resource == Tool::"db.read");`, `apply to Action::"use" only`},
	{`@id("p") @domains("a.example b.example") permit(principal == Agent::"spiffe://acme.example/x", action == Action::"use", resource == Tool::"db.read");`, `does not include Action::"delegate"`},
	{`@id("p") @violation("deny") permit(principal == Agent::"spiffe://acme.example/x", action == Action::"use", resource == Tool::"db.read");`, `belongs on a forbid`},
	{`@id("p") @ttl("30s") forbid(principal, action == Action::"use", resource);`, `belongs on a permit`},
	{`@id("p") @expires("2030") forbid(principal, action == Action::"use", resource);`, `unknown annotation`},
}

// TestWrongPolicies checks that no wrong policy is built, and that none that was signed is loaded.
func TestWrongPolicies(t *testing.T) {
	key := signingKey(t)
	for _, tt := range wrongPolicies {
		_, err := policy.Build(sources(tt.cedar))
		if err == nil || !strings.Contains(err.Error(), tt.why) || !strings.HasPrefix(err.Error(), "main.cedar:1: ") {
			t.Errorf("Build of %s = %v, want main.cedar:1 and %q", tt.cedar, err, tt.why)
		}
		unchecked, err := policy.ReadUnchecked(sources(tt.cedar)) // as an earlier build built it
		if err != nil {
			t.Errorf("reading %s: %v", tt.cedar, err)
			continue
		}
		if _, err := policy.Sign(unchecked, key); err == nil || !strings.Contains(err.Error(), tt.why) {
			t.Errorf("Sign of %s = %v, want %q", tt.cedar, err, tt.why)
		}
		jws := policy.SignRaw(unchecked.Payload(), key)
		if _, err := policy.Cosign(jws, key); err == nil || !strings.Contains(err.Error(), tt.why) {
			t.Errorf("Cosign of %s = %v, want %q", tt.cedar, err, tt.why)
		}
		bundle, err := policy.Verify(jws, policy.Trust{Keys: []jose.JSONWebKey{key.Public()}, Need: 1})
		if err != nil {
			t.Errorf("Verify of %s = %v", tt.cedar, err)
		} else if _, err := policy.Load(bundle); err == nil || !strings.Contains(err.Error(), tt.why) {
			t.Errorf("Load of a signed %s = %v, want %q", tt.cedar, err, tt.why)
		}
	}
	if len(wrongPolicies) < 30 {
		t.Errorf("%d wrong policies, want at least 30", len(wrongPolicies))
	}
}

// rightPolicies are what authors write, and must not be refused.
var rightPolicies = []string{
	when(`context.args.env == "prod"`), when(`context.args.limit > 0 && context.args.limit <= 500`),
	when(`["prod", "test"].contains(context.args.env)`), when(`["a", "b"].containsAll(context.args.tables)`),
	when(`context.args.tables == []`), when(`context.args has env && context.args.env like "prod-*"`),
	when(`!(context.args has env) && context.chain.depth == 0`), when(`context.args == {tables: ["a"]}`),
	when(`if context.args has env then context.args.env == "x" else true`), when(`true`),
	when(`context.labels has env && context.labels.env == "prod"`), when(`context.labels.whatever == "x"`),
	when(`context.args.env == context.labels.env`), when(`context.chain.opener == principal`),
	when(`context.chain.opener in AgentGroup::"spiffe://acme.example/ci"`), when(`principal.id like "spiffe://*"`),
	when(`principal in [AgentGroup::"spiffe://acme.example/ci", TrustDomain::"acme.example"]`),
	when(`principal is Agent && resource is Tool`), when(`resource.narrowing == "native" && resource.backend == "postgres"`),
	when(`context.used.contains("mail")`), when(`context.used.containsAny(["mail", "db.write"])`), when(`context.used.isEmpty()`),
	when(`context.history has mail && context.history.mail.count < 3`),
	when(`context.now.hour >= 8 && context.now.hour < 18 && context.now.weekday <= 5`),
	when(`context.now.time < datetime("2030-01-01")`), when(`context.now.time.toTime() < duration("18h")`),
	when(`context.proof == "x509-svid"`), when(`context has receiver || context.chain.depth < 2`),
	"@trusts_claims " + when(`{c: context}.c.used.contains("mail")`),
	when(`context.chain.age_seconds < 600 || context.task == "nightly"`),
	`forbid(principal, action, resource) when { context.args has env && context.args.env == "prod" };`,
	`forbid(principal, action, resource) when { context has violation && context.violation == "canary" };`,
	`forbid(principal, action == Action::"delegate", resource) unless { context.receiver in TrustDomain::"acme.example" };`,
	`forbid(principal, action == Action::"report", resource == Tool::"mail") when { context.violation == "canary" };`,
	`forbid(principal, action == Action::"use", resource == Tool::"db.write") unless { context.used.contains("db.read") };`,
}

// TestRightPolicies checks that none of them is refused.
func TestRightPolicies(t *testing.T) {
	for _, cedar := range rightPolicies {
		if s, err := policy.Build(sources(cedar)); err != nil {
			t.Errorf("Build of %s = %v, want none", cedar, err)
		} else if p, err := policy.Load(s.Unsigned()); err != nil || len(p.Warnings()) > 0 {
			t.Errorf("Load of %s = %v, warnings %q", cedar, err, p.Warnings())
		}
	}
}

// TestVocabulary asks a question with each word of the table, so that a word without a value does not stay.
func TestVocabulary(t *testing.T) {
	for _, name := range policy.Words() {
		cedar := `@id("p") @any("principal action tool") permit(principal, action, resource) when { context has ` + name + ` };`
		switch name {
		case "claimed":
			cedar = "@trusts_claims " + cedar
		case "caller":
			cedar = `@window("24h") @any("principal tool") permit(principal, action == Action::"use", resource) when { context has caller };`
		}
		p := load(t, cedar)
		has := p.Decide(use("db.read")).Allow || p.Decide(use("db.read", delegate("spiffe://acme.example/x"))).Allow ||
			p.Decide(use("db.read", report("canary"))).Allow || p.Decide(use("db.read", asks(broker.OpenRequest{}))).Allow ||
			p.Decide(use("db.read", func(q *broker.Question) {
				q.Chain.Envelope = &broker.Envelope{Task: "t", Behalf: "b", Issuer: "i"}
			})).Allow
		if !has {
			t.Errorf("no question has context.%s", name)
		}
	}
}

func signingKey(t *testing.T) jose.JSONWebKey {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: private}
}
