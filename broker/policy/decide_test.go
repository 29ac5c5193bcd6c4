package policy_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/policy"
)

type change = func(*broker.Question)

func caller(s string) change { return func(q *broker.Question) { q.Caller.ID = id(s) } }
func given(a args.Args) change {
	return func(q *broker.Question) { q.Args = a }
}
func label(k, v string) change {
	return func(q *broker.Question) { q.Chain.Labels = map[string]string{k: v} }
}
func claims(task string) change { return func(q *broker.Question) { q.Chain.Task = task } }
func signed(e broker.Envelope) change {
	return func(q *broker.Question) { q.Chain.Envelope = &e }
}
func past(tool broker.ToolName, n int, last time.Duration) change {
	return func(q *broker.Question) {
		if q.History == nil {
			q.History = map[broker.ToolName]broker.Past{}
		}
		q.History[tool] = broker.Past{Count: n, First: noon.Add(-last - time.Minute), Last: noon.Add(-last)}
	}
}
func delegate(to string) change {
	return func(q *broker.Question) { q.Action, q.Receiver = broker.ActionDelegate, id(to) }
}
func report(code broker.ViolationCode) change {
	return func(q *broker.Question) { q.Action, q.Violation = broker.ActionReport, code }
}
func action(a broker.Action) change { return func(q *broker.Question) { q.Action = a } }

func TestDecide(t *testing.T) {
	const ci = `@id("ci") permit(principal in AgentGroup::"spiffe://acme.example/ci", action == Action::"use", resource == Tool::"db.read")`
	const all = `@id("all") @any("principal action tool") permit(principal, action, resource);`
	denied, allowed := broker.Decision{}, broker.Decision{Allow: true, Policies: []string{"ci"}}
	forbidden := func(c broker.Consequence, ids ...string) broker.Decision {
		return broker.Decision{Policies: ids, Consequence: c}
	}
	for _, tt := range []struct {
		name, cedar string
		q           broker.Question
		want        broker.Decision
	}{
		{"no policy denies", ``, use("db.read"), denied},
		{"group", ci + ";", use("db.read"), allowed},
		{"group is not the agent of its name", ci + ";", use("db.read", caller("spiffe://acme.example/ci")), denied},
		{"group is not a text prefix", ci + ";", use("db.read", caller("spiffe://acme.example/cicd/x")), denied},
		{"group of another domain", ci + ";", use("db.read", caller("spiffe://evil.example/ci/runner")), denied},
		{"only agents are in groups", ci + ` when { User::"spiffe://acme.example/ci/x" in AgentGroup::"spiffe://acme.example/ci" };`, use("db.read"), denied},
		{"other tool", ci + ";", use("db.write"), denied},
		{"other action", ci + ";", use("db.read", action(broker.ActionOpen)), denied},
		{"unknown tool", all, use("db.drop"), denied},
		{"unknown action", all, use("db.read", action("become-root")), denied},
		{"no caller", all, use("db.read", func(q *broker.Question) { q.Caller = broker.Caller{} }), denied},
		{"trust domain", `@id("ci") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource in ToolGroup::"db");`,
			use("db.read"), allowed},
		{"set of strings", ci + ` when { ["a", "b"].containsAll(context.args.tables) };`, use("db.read", given(list("a", "b"))), allowed},
		{"set of strings, one outside", ci + ` when { ["a", "b"].containsAll(context.args.tables) };`, use("db.read", given(list("a", "c"))), denied},
		{"label", ci + ` when { context has labels && context.labels has env && context.labels.env == "prod" };`,
			use("db.read", signed(broker.Envelope{Labels: map[string]string{"env": "prod", "site": "x"}})), allowed},
		{"no label", ci + ` when { context has labels && context.labels has env && context.labels.env == "prod" };`,
			use("db.read", signed(broker.Envelope{})), denied},
		{"a label that the agent claims is no label", ci + ` when { context has labels && context.labels has env && context.labels.env == "prod" };`,
			use("db.read", label("env", "prod")), denied},
		{"a label without a check denies", ci + ` when { context.labels.env == "prod" };`, use("db.read", label("env", "prod")),
			broker.Decision{Failed: true, Policies: []string{"ci"}}},
		{"task", ci + ` when { context has task && context.task == "urgent" };`, use("db.read", signed(broker.Envelope{Task: "urgent"})), allowed},
		{"a task that the agent claims is no task", ci + ` when { context has task && context.task == "urgent" };`, use("db.read", claims("urgent")), denied},
		{"an envelope without a task", ci + ` when { context has task };`, use("db.read", claims("urgent"), signed(broker.Envelope{Behalf: "x"})), denied},
		{"on whose behalf, and who says so", ci + ` when { context has on_behalf_of && context.on_behalf_of == "ana" && context.issuer == "https://hr.example" };`,
			use("db.read", signed(broker.Envelope{Behalf: "ana", Issuer: "https://hr.example"})), allowed},
		{"claims may be trusted by name", `@trusts_claims ` + ci + ` when { context.claimed.task == "urgent" && context.claimed.labels has env && context.claimed.labels.env == "prod" };`,
			use("db.read", claims("urgent"), label("env", "prod")), allowed},
		{"an envelope does not replace a claim", `@trusts_claims ` + ci + ` when { context.claimed == {task: "nightly", labels: {}} };`,
			use("db.read", signed(broker.Envelope{Task: "urgent", Labels: map[string]string{"env": "prod"}})), allowed},
		{"a forbid may read claims", ci + `; @id("no") forbid(principal, action, resource) when { context.claimed.labels has env };`,
			use("db.read", label("env", "prod")), forbidden(0, "no")},
		{"required label of the tool", ci + ` when { resource.narrowing == "native" && resource.backend == "postgres" };`, use("db.read"), allowed},
		{"office hours", ci + ` when { context.now.hour >= 8 && context.now.hour < 18 && context.now.weekday <= 5 };`, use("db.read"), allowed},
		{"after hours", ci + ` when { context.now.hour >= 13 };`, use("db.read"), denied},
		{"age, depth and opener", ci + ` when { context.chain.age_seconds == 60 && context.chain.depth == 0 && context.chain.opener in AgentGroup::"spiffe://acme.example/ci" };`,
			use("db.read"), allowed},
		{"Sunday is the seventh", ci + ` when { context.now.weekday == 7 };`, use("db.read", func(q *broker.Question) { q.Now = noon.AddDate(0, 0, 4) }), allowed},
		{"Monday is the first", ci + ` when { context.now.weekday == 1 };`, use("db.read", func(q *broker.Question) { q.Now = noon.AddDate(0, 0, 5) }), allowed},
		{"a count of zero is no use", ci + ` unless { context.history has "mail" };`, use("db.read", past("mail", 0, 0)), allowed},
		{"a member as a whole", ci + ` when { context.chain == {opener: Agent::"spiffe://acme.example/ci/runner", depth: 0, age_seconds: 60} };`,
			use("db.read"), allowed},
		{"a member as a whole beside its parts", ci + ` when { context.args has limit || context.args == {tables: ["a"]} };`, use("db.read", given(list("a"))), allowed},
		{"parts in one policy, the whole in another", `@id("x") forbid(principal, action, resource) when { context.args has limit }; @trusts_claims ` + ci + ` when { {a: context}.a.args == {tables: ["a"]} };`,
			use("db.read", given(list("a"))), allowed},
		{"age never counts backwards", ci + ` when { context.chain.age_seconds == 0 };`, use("db.read", func(q *broker.Question) { q.Chain.Opened = noon.Add(time.Hour) }), allowed},
		{"whole context", "@trusts_claims " + ci + ` when { {c: context}.c.used.contains("mail") };`, use("db.read", past("mail", 1, 0)), allowed},

		{"forbid wins", ci + `; @id("no") forbid(principal, action, resource);`, use("db.read"), forbidden(0, "no")},
		{"most severe forbid", `@id("a") @violation("revoke-step") forbid(principal, action, resource);
			@id("b") @violation("revoke-chain") forbid(principal, action, resource == Tool::"db.read");
			@id("c") @violation("freeze-caller") forbid(principal, action, resource == Tool::"mail");`,
			use("db.read"), forbidden(broker.ConsequenceRevokeChain, "a", "b")},
		{"failing forbid denies", ci + `; @id("no") @violation("revoke-chain") forbid(principal, action, resource) when { context.args.env == "x" };`,
			use("db.read"), broker.Decision{Failed: true, Policies: []string{"ci", "no"}}},
		{"failing permit denies", ci + `; @id("odd") permit(principal == Agent::"spiffe://acme.example/ci/runner", action == Action::"use", resource == Tool::"db.read") when { context.args.env == "x" };`,
			use("db.read"), broker.Decision{Failed: true, Policies: []string{"ci", "odd"}}},
		{"a failing policy with another scope is not evaluated", ci + `; @id("no") forbid(principal, action, resource == Tool::"mail") when { context.nothing };`,
			use("db.read"), allowed},

		{"tightest limits", `@id("a") @ttl("30s") @approval("1 of oncall") @any("tool") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource);
			@id("b") @ttl("10s") @approval("2 of oncall") @narrowing("proxy") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.read");
			@id("c") @narrowing("native") @approval("1 of owners") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.read");`,
			use("db.read"), broker.Decision{Allow: true, Policies: []string{"a", "b", "c"}, TTL: 10 * time.Second,
				Narrowing: broker.NarrowNative, Approval: "2 of oncall and 1 of owners"}},

		{"delegate within the domain", all, use("db.read", delegate("spiffe://acme.example/x")), broker.Decision{Allow: true, Policies: []string{"all"}}},
		{"delegate across with no domain named", all, use("db.read", delegate("spiffe://b.example/x")), broker.Decision{Allow: true, Policies: []string{"all"}}},
		{"delegate across with both named", all + `@id("x") @domains("acme.example b.example") permit(principal in TrustDomain::"acme.example", action == Action::"delegate", resource == Tool::"db.read");`,
			use("db.read", delegate("spiffe://b.example/x")),
			broker.Decision{Allow: true, Policies: []string{"x"}, Domains: []string{"acme.example", "b.example"}}},
		{"delegate across with others named", all + `@id("x") @domains("c.example b.example") permit(principal in TrustDomain::"acme.example", action == Action::"delegate", resource == Tool::"db.read");`,
			use("db.read", delegate("spiffe://b.example/x")), broker.Decision{Allow: true, Policies: []string{"all", "x"}}},
		{"receiver", `@id("ci") permit(principal in TrustDomain::"acme.example", action == Action::"delegate", resource == Tool::"db.read") when { context.receiver in AgentGroup::"spiffe://acme.example/ci" };`,
			use("db.read", delegate("spiffe://acme.example/ci/sub")), allowed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := load(t, tt.cedar).Decide(tt.q); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("Decide(%v %v) = %+v, want %+v", tt.q.Action, tt.q.Tool.Name, got, tt.want)
			}
		})
	}
}

// TestRemedy checks that the policies that block a request supply the remedy, within bounds. Others do not.
func TestRemedy(t *testing.T) {
	const read = `permit(principal == Agent::"spiffe://acme.example/ci/runner", action == Action::"use", resource == Tool::"db.read")`
	long := func(c string) string { return strings.Repeat(c, 256) }
	for _, tt := range []struct{ name, cedar, want string }{
		{"allowed", `@remedy("no need") ` + read + ";", ""},
		{"no policy", "", ""},
		{"conditions not met", `@id("a") @remedy("name your tables") ` + read + ` when { context.args has tables };
			@id("b") @remedy("not yours") permit(principal == Agent::"spiffe://acme.example/x", action == Action::"use", resource == Tool::"db.read");`, "name your tables"},
		{"forbidden", `@id("a") @remedy("no need") ` + read + `; @id("b") @remedy("wait for Monday") forbid(principal, action, resource);`, "wait for Monday"},
		{"approval", `@id("a") @approval("1 of oncall") @remedy("ask in #oncall") ` + read + `; @id("b") @remedy("no need") ` + read + ";", "ask in #oncall"},
		{"failed", `@id("a") @remedy("unused") ` + read + ` when { context.args.env == "x" };`, ""},
		{"as much as fits", `@id("a") @remedy("` + long("a") + `") ` + read + ` when { false }; @id("b") @remedy("` + long("b") + `") ` + read + ` when { false };
			@id("c") @remedy("c") ` + read + ` when { false };`, long("a") + "; c"},
	} {
		if got := load(t, tt.cedar).Decide(use("db.read")).Remedy; got != tt.want || len(got) > broker.MaxRemedy {
			t.Errorf("%s: Remedy = %q, want %q", tt.name, got, tt.want)
		}
	}
}

// TestStepTokenOfATool checks that a tool can ask for a Vault token of each step's own, and that others do not.
func TestStepTokenOfATool(t *testing.T) {
	dir := sources(`@id("all") @any("principal action tool") permit(principal, action, resource);`)
	dir["tools.yaml"].Data = append(dir["tools.yaml"].Data,
		"  - {name: keys.own, backend: kv, narrowing: none, step_token: true, vault: {policy: pawl-tool-keys, path: kv/keys}}\n"+
			"  - {name: keys.shared, backend: kv, narrowing: none, vault: {policy: pawl-tool-keys, path: kv/keys}}\n"...)
	p, err := policy.Load(build(t, dir).Unsigned())
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[broker.ToolName]bool{"keys.own": true, "keys.shared": false} {
		if tool, ok := p.Tool(name); !ok || tool.StepToken != want {
			t.Errorf("Tool(%s).StepToken = %v, %v; want %v", name, tool.StepToken, ok, want)
		}
	}
}

// TestCanary checks that a canary is denied despite any permit, with the consequence in violations.yaml. Without one
// there, the consequence is the end of the whole chain.
func TestCanary(t *testing.T) {
	for table, want := range map[string]broker.Consequence{"": broker.ConsequenceRevokeChain, "canary: freeze-caller\n": broker.ConsequenceFreezeCaller, "canary: deny\n": broker.ConsequenceDeny} {
		dir := sources(`@id("all") @any("principal action tool") permit(principal, action, resource);`)
		dir["tools.yaml"].Data = append(dir["tools.yaml"].Data, "  - {name: vault.root, backend: kv, narrowing: none, canary: true, vault: {policy: pawl-bait, path: kv/bait}}\n"...)
		dir["violations.yaml"].Data = []byte(table + "outside_scope: deny\n")
		p, err := policy.Load(build(t, dir).Unsigned())
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range []broker.Question{use("vault.root"), use("vault.root", action(broker.ActionOpen)), use("vault.root", delegate("spiffe://acme.example/x"))} {
			if d := p.Decide(q); d.Allow || d.Consequence != want || len(d.Policies) > 0 {
				t.Errorf("with %q, Decide(%s) = %+v, want a deny and %v", table, q.Action, d, want)
			}
			if e := p.Explain(q); e.Granted || !strings.Contains(e.Why, "canary") {
				t.Errorf("with %q, Explain(%s) = %+v, want a reason that names the canary", table, q.Action, e)
			}
		}
		if d := p.Decide(use("vault.root", report(broker.ViolationCanary))); !d.Allow || d.Consequence != want {
			t.Errorf("with %q, Decide(report) = %+v, want the permit's answer and %v", table, d, want)
		}
		if d := p.Decide(use("db.read")); !d.Allow {
			t.Errorf("another tool is denied: %+v", d)
		}
	}
}

// TestHistoryRules decides the usual history rules, written as an author writes them.
func TestHistoryRules(t *testing.T) {
	const rules = `
@id("work") permit(principal in AgentGroup::"spiffe://acme.example/ci", action == Action::"use", resource in ToolGroup::"db");
@id("mail") permit(principal in AgentGroup::"spiffe://acme.example/ci", action == Action::"use", resource == Tool::"mail");

@id("never-mail-after-read") @violation("revoke-chain")
forbid(principal, action == Action::"use", resource == Tool::"mail") when { context.used.contains("db.read") };

@id("write-only-after-read")
forbid(principal, action == Action::"use", resource == Tool::"db.write") unless { context.used.contains("db.read") };

@id("at-most-three-writes")
forbid(principal, action == Action::"use", resource == Tool::"db.write")
when { context.history has "db.write" && context.history["db.write"].count >= 3 };

@id("cool-down")
forbid(principal, action == Action::"use", resource == Tool::"db.read")
when { context.history has "db.read" && context.history["db.read"].since_last_seconds < 10 };`
	p := load(t, rules)
	for _, tt := range []struct {
		name  string
		q     broker.Question
		allow bool
		by    string
	}{
		{"mail first", use("mail"), true, "mail"},
		{"mail after read", use("mail", past("db.read", 1, time.Hour)), false, "never-mail-after-read"},
		{"mail after something else", use("mail", past("db.write", 1, time.Hour)), true, "mail"},
		{"write first", use("db.write"), false, "write-only-after-read"},
		{"write after read", use("db.write", past("db.read", 1, 0)), true, "work"},
		{"third write", use("db.write", past("db.read", 1, 0), past("db.write", 2, 0)), true, "work"},
		{"fourth write", use("db.write", past("db.read", 1, 0), past("db.write", 3, 0)), false, "at-most-three-writes"},
		{"read too soon", use("db.read", past("db.read", 1, 9*time.Second)), false, "cool-down"},
		{"read in time", use("db.read", past("db.read", 1, 10*time.Second)), true, "work"},
		{"read after the clock was set back", use("db.read", past("db.read", 1, -time.Hour)), false, "cool-down"},
	} {
		d := p.Decide(tt.q)
		if d.Allow != tt.allow || len(d.Policies) != 1 || d.Policies[0] != tt.by {
			t.Errorf("%s: Decide = %+v, want allow %v by %q", tt.name, d, tt.allow, tt.by)
		}
	}
	if w := p.Warnings(); len(w) != 0 {
		t.Errorf("Warnings() = %q, want none", w)
	}
}

func TestReports(t *testing.T) {
	const rules = `
@id("trusted") @any("tool") permit(principal == Agent::"spiffe://acme.example/siem", action == Action::"report", resource);
@id("writes") @violation("revoke-subtree") forbid(principal, action == Action::"report", resource == Tool::"db.write");
@id("test-chains") @violation("deny") forbid(principal, action == Action::"report", resource == Tool::"mail") when { context.violation == "canary" };
@id("suspended") forbid(principal == Agent::"spiffe://acme.example/suspended", action, resource);
@id("fails") forbid(principal == Agent::"spiffe://acme.example/odd", action, resource) when { context.args.env == "x" };`
	p := load(t, rules)
	for _, tt := range []struct {
		name  string
		q     broker.Question
		allow bool
		want  broker.Consequence
	}{
		{"table", use("", report("canary")), false, broker.ConsequenceFreezeCaller},
		{"table, trusted reporter", use("", report("canary"), caller("spiffe://acme.example/siem")), true, broker.ConsequenceFreezeCaller},
		{"table, unknown tool", use("gone", report("outside_scope")), false, broker.ConsequenceRevokeStep},
		{"unknown code", use("db.read", report("untidy")), false, broker.ConsequenceDeny},
		{"policy overrides table", use("db.write", report("canary")), false, broker.ConsequenceRevokeSubtree},
		{"policy milder than table", use("mail", report("canary")), false, broker.ConsequenceDeny},
		{"a forbid without @violation keeps the table", use("db.read", report("canary"), caller("spiffe://acme.example/suspended")), false, broker.ConsequenceFreezeCaller},
		{"a failed policy keeps the table", use("mail", report("canary"), caller("spiffe://acme.example/odd")), false, broker.ConsequenceFreezeCaller},
	} {
		if d := p.Decide(tt.q); d.Allow != tt.allow || d.Consequence != tt.want {
			t.Errorf("%s: Decide = %+v, want allow %v and %v", tt.name, d, tt.allow, tt.want)
		}
	}
}
