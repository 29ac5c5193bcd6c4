package policy_test

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/policy"
)

func TestExplain(t *testing.T) {
	const rules = `
@id("read") @remedy("name your tables") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.read") when { context.args has tables };
@id("read-other") permit(principal in TrustDomain::"other.example", action == Action::"use", resource == Tool::"db.read") when { false };
@id("write") @approval("2 of oncall") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.write");
@id("mail") @narrowing("proxy") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"mail");
@id("mail-on") permit(principal in TrustDomain::"acme.example", action == Action::"delegate", resource == Tool::"mail");
@id("never") @remedy("do not") forbid(principal == Agent::"spiffe://acme.example/bad", action, resource);
@id("lock") forbid(principal, action, resource == Tool::"db.read") when { context.chain.depth > 7 };
@id("odd") forbid(principal == Agent::"spiffe://acme.example/odd", action, resource) when { context.args.env == "x" };`
	p := load(t, rules)
	for _, tt := range []struct {
		name    string
		q       broker.Question
		granted bool
		unmet   []string
		missing []string
		remedy  string
	}{
		{"granted", use("db.read", given(list("a"))), true, nil, nil, ""},
		{"condition", use("db.read"), false, []string{"read"}, []string{"permit:use:db.read"}, "name your tables"},
		{"no permit", use("db.read", action(broker.ActionOpen)), false, nil, []string{"permit:open:db.read"}, "ask the platform team for a permit for spiffe://acme.example/ci/runner to open"},
		{"approval", use("db.write"), false, nil, []string{"approval:2 of oncall"}, "ask 2 of oncall to approve"},
		{"narrowing", use("mail"), false, nil, []string{"narrowing:proxy"}, "stronger narrowing"},
		{"domains", use("mail", delegate("spiffe://b.example/x")), false, nil, []string{"domains:acme.example b.example"}, "names both trust domains"},
		{"forbidden", use("db.read", given(list("a")), caller("spiffe://acme.example/bad")), false, nil, nil, "do not"},
		{"failed", use("db.read", given(list("a")), caller("spiffe://acme.example/odd")), false, nil, nil, "give every argument"},
		{"unknown tool", use("gone"), false, nil, []string{"tool:gone"}, "declare the tool"},
	} {
		e := p.Explain(tt.q)
		if e.Granted != tt.granted || !slices.Equal(e.Unmet, tt.unmet) || !slices.Equal(e.Missing, tt.missing) || !strings.Contains(e.Remedy, tt.remedy) || e.Why == "" {
			t.Errorf("%s: Explain = %+v, want granted %v, unmet %v, missing %v, remedy %q", tt.name, e, tt.granted, tt.unmet, tt.missing, tt.remedy)
		}
		if d := p.Decide(tt.q); !reflect.DeepEqual(e.Decision, d) {
			t.Errorf("%s: Explain decides %+v, Decide %+v", tt.name, e.Decision, d)
		}
		if text := e.Why + e.Remedy + strings.Join(e.Unmet, ""); strings.Contains(text, "context") || strings.Contains(text, "read-other") {
			t.Errorf("%s: Explain shows policy text or another caller's policy: %+v", tt.name, e)
		}
	}
}

// TestExplainLimits compares the steps of the caller's history with the limits. A step with another tool counts under a
// limit when its permit is for that tool too.
func TestExplainLimits(t *testing.T) {
	p := load(t, `
@id("reads") @any("tool") @limit("3 per hour") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource) when { ["db.read", "mail"].contains(resource.name) };
@id("mails") @limit("2 per 24h") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"mail");
@id("writes") permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.write");`)
	did := func(ago time.Duration, counts map[broker.ToolName]int) change {
		return func(q *broker.Question) {
			history := map[broker.ToolName]broker.Past{}
			for tool, n := range counts {
				history[tool] = broker.Past{Count: n, First: noon.Add(-ago), Last: noon.Add(-ago)}
			}
			q.CallerHistory = policy.InWindows(history, noon)
		}
	}
	for _, tt := range []struct {
		name            string
		q               broker.Question
		granted         bool
		limits, missing []string
	}{
		{"none used", use("db.read"), true, []string{"reads: 0 of 3 in 1h0m0s"}, nil},
		{"some used", use("db.read", did(time.Minute, map[broker.ToolName]int{"db.read": 2})), true, []string{"reads: 2 of 3 in 1h0m0s"}, nil},
		{"reached", use("db.read", did(time.Minute, map[broker.ToolName]int{"db.read": 3})), false, []string{"reads: 3 of 3 in 1h0m0s"}, []string{"limit:reads"}},
		{"reached by another tool of the permit", use("db.read", did(time.Minute, map[broker.ToolName]int{"db.read": 1, "mail": 2})), false,
			[]string{"reads: 3 of 3 in 1h0m0s"}, []string{"limit:reads"}},
		{"not by a tool of another permit", use("db.read", did(time.Minute, map[broker.ToolName]int{"db.write": 9})), true, []string{"reads: 0 of 3 in 1h0m0s"}, nil},
		{"each in its window", use("mail", did(2*time.Hour, map[broker.ToolName]int{"mail": 2})), false,
			[]string{"mails: 2 of 2 in 24h0m0s", "reads: 0 of 3 in 1h0m0s"}, []string{"limit:mails"}},
		{"no limit", use("db.write", did(time.Minute, map[broker.ToolName]int{"db.write": 9})), true, nil, nil},
	} {
		e := p.Explain(tt.q)
		if e.Granted != tt.granted || !slices.Equal(e.Limits, tt.limits) || !slices.Equal(e.Missing, tt.missing) {
			t.Errorf("%s: Explain = %+v, want granted %v, limits %q, missing %q", tt.name, e, tt.granted, tt.limits, tt.missing)
		}
	}
}

func TestShadow(t *testing.T) {
	live := load(t, someCedar)
	candidate := load(t, strings.Replace(someCedar, `"ci"`, `"renamed"`, 1)+`@id("fewer") @violation("revoke-chain") forbid(principal, action, resource == Tool::"db.read") when { context.chain.depth > 1 };`)
	found := make(chan policy.Difference, 9)
	shadow := policy.NewShadow(policy.ShadowReport{Differs: func(d policy.Difference) { found <- d },
		Missed: func(err error) { t.Errorf("missed: %v", err) }})
	defer shadow.Close()
	if s := shadow.Beside(live); s != broker.Policy(live) {
		t.Errorf("Beside without a candidate = %T, want the live bundle itself", s)
	}
	shadow.Try(candidate)
	s := shadow.Beside(live)
	deep := use("db.read", func(q *broker.Question) { q.Depth = 2 })
	last := use("db.read", func(q *broker.Question) { q.Depth = 3 })
	for _, q := range []broker.Question{use("db.read"), deep, use("mail"), last} {
		if got, want := s.Decide(q), live.Decide(q); !reflect.DeepEqual(got, want) {
			t.Errorf("Decide = %+v, want the live bundle's %+v", got, want)
		}
	}
	want := `spiffe://acme.example/ci/runner use "db.read": live allow by ["ci"], candidate deny (revoke-chain) by ["fewer"]`
	for depth := 2; depth <= 3; depth++ { // in the order of the questions, so nothing else was reported
		if d := <-found; d.Question.Depth != depth || d.String() != want {
			t.Errorf("reported %v at depth %d, want %s at %d", d, d.Question.Depth, want, depth)
		}
	}
	if got := policy.Diff(live, candidate, use("db.read"), deep); len(got) != 1 || got[0].Question.Depth != 2 {
		t.Errorf("Diff = %v, want the deep question", got)
	}
	if tool, ok := s.Tool("mail"); !ok || tool.Backend != "kv" {
		t.Errorf("Tool(mail) = %+v, %v", tool, ok)
	}
	if s.Digest() != live.Digest() {
		t.Errorf("Digest() = %s, want the live bundle's", s.Digest())
	}
}

// TestShadowDoesNotAffectLive checks that a candidate changes no answer and blocks no caller, even if it panics or is
// slower than the questions.
func TestShadowDoesNotAffectLive(t *testing.T) {
	live := load(t, someCedar)
	want := live.Decide(use("db.read"))
	missed := make(chan error, 1<<16)
	held := make(chan struct{})
	shadow := policy.NewShadow(policy.ShadowReport{Missed: func(err error) { missed <- err }, Differs: func(policy.Difference) { <-held }})
	defer shadow.Close()
	ask := func(candidate *policy.Policy) {
		t.Helper()
		shadow.Try(candidate)
		if got := shadow.Beside(live).Decide(use("db.read")); !reflect.DeepEqual(got, want) {
			t.Fatalf("Decide = %+v, want the live bundle's %+v", got, want)
		}
	}
	ask(policy.Broken())
	if err := <-missed; !strings.Contains(err.Error(), "the candidate panicked") {
		t.Errorf("missed because of %v, want a panic of the candidate", err)
	}
	forbids := load(t, `@id("no") forbid(principal, action, resource);`)
	for range 3000 { // more than the queue holds
		ask(forbids)
	}
	close(held)
	select {
	case err := <-missed:
		if !errors.Is(err, policy.ErrShadowBusy) {
			t.Errorf("missed because of %v, want %v", err, policy.ErrShadowBusy)
		}
	default:
		t.Error("no question was missed while the candidate was blocked")
	}
}

func TestChanges(t *testing.T) {
	dir := sources(`// only a comment is new here
@id("ci") permit(principal in AgentGroup::"spiffe://acme.example/ci",
  action == Action::"use", resource == Tool::"db.read");
@id("new") forbid(principal, action, resource == Tool::"mail");`)
	dir["bundle.yaml"] = &fstest.MapFile{Data: []byte("name: acme\nversion: 4\n")}
	dir["tools.yaml"] = &fstest.MapFile{Data: []byte(strings.Replace(strings.Split(toolsYAML, "  - name: mail")[0], "ttl: 60s", "ttl: 30s", 1) +
		"  - {name: chat, backend: kv, narrowing: none, vault: {policy: p, path: kv/chat}}\n  - {name: mail, backend: kv, narrowing: none, vault: {policy: pawl-mail, path: kv/mail}}\n")}
	delete(dir, "violations.yaml")
	to, err := policy.Load(build(t, dir).Unsigned())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range policy.Changes(load(t, someCedar), to) {
		got = append(got, c.String())
	}
	want := []string{"changed version ", "added tool chat", "changed tool db.read", "added policy new", "removed violation canary", "removed violation outside_scope"}
	if !slices.Equal(got, want) {
		t.Errorf("Changes = %q, want %q", got, want)
	}
}
