package policy_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/policy"
)

func one[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// randomCedar generates n policies with overlapping scopes and conditions, some of which fail.
func randomCedar(r *rand.Rand, n int) string {
	var b strings.Builder
	for i := range n {
		principal, pAny := one(r, `principal == Agent::"spiffe://a.example/ci/x"`, `principal in AgentGroup::"spiffe://a.example/ci"`,
			`principal in AgentGroup::"spiffe://a.example/ci/x"`, `principal in TrustDomain::"a.example"`, `principal in Agent::"spiffe://b.example/y"`,
			`principal is Agent in TrustDomain::"b.example"`, `principal`, `principal is Agent`, `principal == AgentGroup::"spiffe://a.example/ci"`,
			`principal is AgentGroup`, `principal is AgentGroup in TrustDomain::"a.example"`), false
		pAny = principal == "principal" || principal == "principal is Agent" || principal == "principal is AgentGroup"
		action := one(r, `action == Action::"use"`, `action == Action::"open"`, `action in [Action::"use", Action::"delegate"]`, `action in Action::"report"`, `action`)
		resource := one(r, `resource == Tool::"db.read"`, `resource in ToolGroup::"db"`, `resource is Tool in ToolGroup::"db"`, `resource == Tool::"mail"`, `resource`, `resource is Tool`,
			`resource == ToolGroup::"db"`, `resource is ToolGroup in ToolGroup::"db"`)
		when := one(r, ``, ``, ` when { context.args.env == "prod" }`, ` when { context.args has env && context.args.env == "prod" }`,
			` unless { context.used.contains("mail") }`, ` when { context.chain.depth < 2 }`, ` when { context.receiver in AgentGroup::"spiffe://a.example/ci" }`,
			` when { context.history has mail && context.history.mail.count > 1 }`,
			` when { context.args == {env: "prod"} }`, ` when { {all: context.history}.all has mail }`, ` unless { {all: context}.all.chain.depth < 2 }`,
			` when { context.claimed.task == "a" }`, ` when { context.claimed.labels has team && context.claimed == {task: "a", labels: {team: "x"}} }`,
			` when { context has labels && context.labels has team }`, ` when { context.labels.team == "x" && context.task == "a" }`,
			` when { context has on_behalf_of && context.on_behalf_of == "ana" && context.issuer != "x" }`, ` unless { context.labels == {team: "x"} }`,
			` when { context.open.depth < 2 }`, ` when { context has open && context.open has steps && context.open.steps < 9 }`,
			` when { context.used.containsAny(["mail"]) }`, ` when { {u: context.used}.u.contains("mail") }`, ` when { context.used == ["mail"] }`,
			` when { context.used.contains("db.write") || context.used.containsAny(["mail"]) }`,
			` unless { context.used.contains(context.args.tool) }`, ` when { context.used.contains("db.read") || context.used.contains("mail") }`,
			` when { context has now && context.now.hour == 12 && context.proof != "x" }`)
		var notes string
		effect := one(r, "permit", "permit", "forbid")
		if effect == "permit" {
			var open []string
			for part, is := range map[string]bool{"principal": pAny, "action": action == "action", "tool": !strings.Contains(resource, `"`)} {
				if is {
					open = append(open, part)
				}
			}
			if len(open) > 0 {
				notes = fmt.Sprintf("@any(%q) ", strings.Join(open, " "))
			}
			if action == `action == Action::"use"` {
				notes += one(r, "", `@ttl("10s") `, `@approval("1 of oncall") `, `@narrowing("proxy") `,
					`@limit("3 per hour") `, `@limit("9 per 24h") @per("caller label:team") `)
			}
			if strings.Contains(when, "all: context}") || strings.Contains(when, "context.claimed") {
				notes += "@trusts_claims "
			}
			if action == `action == Action::"open"` {
				notes += one(r, "", `@max_steps("5") `, `@max_steps("9") @max_depth("1") `, `@labels("team") `, `@max_ttl("1m") @requires_labels("env") `)
			}
		} else {
			notes = one(r, "", `@violation("revoke-step") `, `@violation("freeze-caller") `)
		}
		if action == `action == Action::"use"` && r.IntN(4) == 0 {
			notes += one(r, `@window("1h") `, `@window("24h") `)
			when += one(r, ` when { context.caller.history has mail }`, ` unless { context.caller.used.contains("mail") }`,
				` when { context.caller.history.mail.count > 1 }`)
		}
		fmt.Fprintf(&b, "@id(\"p%d\") %s%s(%s, %s, %s)%s;\n", i, notes, effect, principal, action, resource, when)
	}
	return b.String()
}

func randomQuestion(r *rand.Rand) broker.Question {
	q := broker.Question{
		Action:    one(r, broker.ActionOpen, broker.ActionUse, broker.ActionUse, broker.ActionDelegate, broker.ActionReport, "other"),
		Caller:    broker.Caller{ID: id(one(r, "spiffe://a.example/ci/x", "spiffe://a.example/ci/x/y", "spiffe://a.example/ci", "spiffe://b.example/y", "spiffe://a.example"))},
		Tool:      broker.Tool{Name: one[broker.ToolName](r, "db.read", "db.write", "mail", "", "gone")},
		Receiver:  id(one(r, "spiffe://a.example/ci/z", "spiffe://b.example/y")),
		Violation: one[broker.ViolationCode](r, "canary", "outside_scope", "x"),
		Depth:     r.IntN(4),
		Now:       noon,
	}
	q.Chain.Task = one(r, "a", "b")
	q.CallerHistory = map[time.Duration]map[broker.ToolName]broker.Past{
		time.Hour:      {"mail": {Count: r.IntN(3), First: noon, Last: noon}},
		24 * time.Hour: {"mail": {Count: r.IntN(3), First: noon, Last: noon}}}
	if r.IntN(2) == 0 {
		q.Chain.Labels = map[string]string{"team": one(r, "x", "y")}
	}
	if r.IntN(2) == 0 {
		q.Chain.Envelope = &broker.Envelope{Issuer: "i", Task: one(r, "", "a", "b"), Behalf: one(r, "", "ana")}
		if r.IntN(2) == 0 {
			q.Chain.Envelope.Labels = map[string]string{"team": one(r, "x", "y"), "env": "prod"}
		}
	}
	if q.Action == broker.ActionOpen {
		q.Open = &broker.OpenRequest{Depth: r.IntN(4), Budget: broker.Budget{Steps: r.IntN(12)}}
	}
	if r.IntN(2) == 0 {
		q.Args, _ = args.New(map[string]args.Value{"env": args.String(one(r, "prod", "test")), "tool": args.String("mail")})
	}
	if r.IntN(2) == 0 {
		q.History = map[broker.ToolName]broker.Past{"mail": {Count: r.IntN(3), First: noon.Add(-time.Hour), Last: noon}}
	}
	return q
}

// TestSlicedIsUnsliced checks that leaving out policies with a scope that cannot match changes no decision.
func TestSlicedIsUnsliced(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	allowed, failed, deniedAnyway := 0, 0, 0
	for range 400 {
		text := randomCedar(r, 1+r.IntN(12))
		p := load(t, text)
		for range 40 {
			q := randomQuestion(r)
			got, want := p.Decide(q), p.DecideUnsliced(q)
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("Decide(%+v) = %+v, unsliced %+v, with\n%s", q, got, want, text)
			}
			switch {
			case got.Allow:
				allowed++
			case got.Failed:
				failed++
			default:
				deniedAnyway++
			}
		}
	}
	if min(allowed, failed, deniedAnyway) < 500 {
		t.Errorf("%d allowed, %d failed, %d denied: the random questions test too little of one kind", allowed, failed, deniedAnyway)
	}
}

func FuzzDecide(f *testing.F) {
	f.Add(uint64(1), uint64(2), "spiffe://a.example/ci/x", "db.read", []byte(`{"env":"prod"}`))
	f.Fuzz(func(t *testing.T, a, b uint64, caller, tool string, given []byte) {
		r := rand.New(rand.NewPCG(a, b))
		p, err := policy.LoadUnchecked(sources(randomCedar(r, 8)))
		if err != nil {
			t.Fatal(err)
		}
		q := randomQuestion(r)
		q.Tool.Name, q.Chain.Task = broker.ToolName(tool), caller
		if parsed, err := args.Parse(given); err == nil {
			q.Args = parsed
		}
		if got, want := p.Decide(q), p.DecideUnsliced(q); !reflect.DeepEqual(got, want) {
			t.Errorf("Decide = %+v, unsliced %+v", got, want)
		}
	})
}

// BenchmarkDecide decides for a chain of depth 8 that has used ten tools. Most policies are about other tools and
// agents, as in a real bundle. Ten of each hundred apply to any principal.
func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		p := benchPolicy(b, n)
		q := use("t0.read", given(list("orders", "customers")), label("env", "prod"), func(q *broker.Question) {
			q.Depth = 8
			q.History = map[broker.ToolName]broker.Past{}
			for i := range 10 {
				q.History[broker.ToolName(fmt.Sprintf("t%d.read", i))] = broker.Past{Count: 3, First: noon.Add(-time.Minute), Last: noon}
			}
		})
		if d := p.Decide(q); !d.Allow {
			b.Fatalf("Decide = %+v, want allow", d)
		}
		for _, way := range []struct {
			name   string
			decide func(broker.Question) broker.Decision
		}{{"sliced", p.Decide}, {"unsliced", p.Unsliced()}} {
			b.Run(fmt.Sprintf("policies=%d/%s", n, way.name), func(b *testing.B) {
				b.ReportAllocs()
				took := make([]time.Duration, 0, 1<<20)
				for b.Loop() {
					start := time.Now()
					way.decide(q)
					if len(took) < cap(took) {
						took = append(took, time.Since(start))
					}
				}
				b.ReportMetric(float64(quantile(took, 0.99).Nanoseconds()), "p99-ns")
				b.ReportMetric(float64(p.Relevant(q)), "evaluated")
			})
		}
	}
}

func quantile(took []time.Duration, q float64) time.Duration {
	slices.Sort(took)
	return took[int(q*float64(len(took)-1))]
}

func benchPolicy(b *testing.B, n int) *policy.Policy {
	b.Helper()
	var tools, text strings.Builder
	tools.WriteString("tools:\n")
	for i := range max(10, n/10) {
		fmt.Fprintf(&tools, "  - {name: t%d.read, backend: postgres, narrowing: native, arguments: {tables: {kind: list}}, vault: {policy: p, path: a/b}}\n", i)
	}
	for i := range n {
		switch {
		case i%10 == 0:
			fmt.Fprintf(&text, "@id(\"f%d\") forbid(principal, action == Action::\"use\", resource == Tool::\"t%d.read\") when { context.claimed.labels has env && context.claimed.labels.env == \"lab%d\" };\n", i, i/100, i)
		default:
			fmt.Fprintf(&text, "@id(\"p%d\") permit(principal in AgentGroup::\"spiffe://acme.example/team%d\", action == Action::\"use\", resource == Tool::\"t%d.read\") when { [\"orders\"].containsAll(context.args.tables) };\n", i, i, i%max(10, n/10))
		}
	}
	text.WriteString(`@id("mine") permit(principal in AgentGroup::"spiffe://acme.example/ci", action == Action::"use", resource == Tool::"t0.read") when { ["orders", "customers"].containsAll(context.args.tables) };
@id("often") forbid(principal, action == Action::"use", resource) when { context.history has "t1.read" && context.history["t1.read"].count > 9 };`)
	dir := sources(text.String())
	dir["tools.yaml"].Data = []byte(tools.String())
	p, err := policy.Load(build(b, dir).Unsigned())
	if err != nil {
		b.Fatal(err)
	}
	return p
}
