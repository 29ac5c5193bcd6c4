package main

import (
	"context"
	"fmt"
	"strings"
	"testing/fstest"
	"time"

	"github.com/cedar-policy/cedar-go"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// measurePolicy times decisions over bundles of 10, 100 and 1,000 policies, sliced by scope, and compares them with
// Cedar evaluating every policy. The question is about the end of a chain of depth 8 that has used ten tools. Each
// policy reads the arguments, the depth and the history.
func measurePolicy(_ context.Context, b *bench) error {
	for _, c := range []struct {
		name string
		n    int
		one  bool // every policy matches the question's agent and tool
	}{{"10", 10, false}, {"100", 100, false}, {"1000", 1000, false}, {"1000_all_apply", 1000, true}} {
		if !b.wants("policy." + c.name + ".") {
			continue
		}
		against := "the bundle unsliced: cedar-go over all of its policies"
		text := manyPolicies(c.n, c.one)
		ours, err := decisions(text)
		if err != nil {
			return err
		}
		theirs, err := authorizations(text)
		if err != nil {
			return err
		}
		count := pick(b, 20_000, 4000)
		if c.one {
			count /= 10
		}
		took := [2]report.Samples{}
		for range count {
			for i, f := range []func() bool{ours, theirs} {
				began := time.Now()
				allowed := f()
				took[i] = append(took[i], float64(time.Since(began))/float64(time.Microsecond))
				if !allowed {
					return fmt.Errorf("policy.%s: the question was denied, want allowed", c.name)
				}
			}
		}
		note := ""
		if c.one {
			note = "the worst case: every policy is in scope"
		}
		b.report.AddQuantile(report.Row{Name: "policy." + c.name + ".p99_us", Unit: "µs", Against: against, Note: note},
			0.99, took[0], took[1])
		b.report.AddQuantile(report.Row{Name: "policy." + c.name + ".p50_us", Unit: "µs", Against: against, Note: note},
			0.5, took[0], took[1])
	}
	return nil
}

// manyPolicies gives n policies for 10 teams and 20 tools, or all for one team and one tool.
func manyPolicies(n int, one bool) string {
	var b strings.Builder
	for i := range n {
		team, tool := i%10, i/10%20
		if one {
			team, tool = 0, 0
		}
		fmt.Fprintf(&b, `@id("p%d")
permit (principal in AgentGroup::"spiffe://pawl.dev/agent/team-%d", action == Action::"use", resource == Tool::"tool.t%d")
when { context.args.env == "e%d" && context.chain.depth <= 8 && !context.used.contains("tool.t19") };
`, i, team, tool, i)
	}
	return b.String()
}

// depth is the depth of the question below its chain's root.
const depth = 8

// used lists the tools that the chain has used.
func used() (names []string) {
	for i := range 10 {
		names = append(names, fmt.Sprintf("tool.t%d", i))
	}
	return names
}

const decider = "spiffe://pawl.dev/agent/team-0/writer"

// decisions returns a function that asks Pawl the question that the first policy allows.
func decisions(text string) (func() bool, error) {
	var declared strings.Builder
	declared.WriteString("tools:\n")
	for i := range 20 {
		fmt.Fprintf(&declared, "  - {name: tool.t%d, backend: any, narrowing: native, arguments: {env: {kind: string}}, vault: {policy: pawl-tool-t%d, path: a/b}}\n", i, i)
	}
	source, err := policy.Build(fstest.MapFS{"bundle.yaml": {Data: []byte("name: bench\nversion: 1\n")},
		"tools.yaml": {Data: []byte(declared.String())}, "many.cedar": {Data: []byte(text)}})
	if err != nil {
		return nil, err
	}
	p, err := policy.Load(source.Unsigned())
	if err != nil {
		return nil, err
	}
	args, err := args.New(map[string]args.Value{"env": args.String("e0")})
	if err != nil {
		return nil, err
	}
	t, _ := p.Tool("tool.t0") // the zero Tool is denied, which fails the run
	c := caller()
	if c.ID, err = c.ID.TrustDomain().ID().AppendPath("/agent/team-0/writer"); err != nil {
		return nil, err
	}
	q := broker.Question{Action: broker.ActionUse, Caller: c, Tool: t, Args: args, Now: time.Now(), Depth: depth,
		Chain: broker.Chain{Task: "bench", Opened: time.Now()}, History: map[broker.ToolName]broker.Past{}}
	for _, name := range used() {
		q.History[broker.ToolName(name)] = broker.Past{Count: 3, First: q.Now.Add(-time.Minute), Last: q.Now}
	}
	return func() bool { return p.Decide(q).Allow }, nil
}

// authorizations returns a function that asks Cedar the same question with every policy.
func authorizations(text string) (func() bool, error) {
	set, err := cedar.NewPolicySetFromBytes("many.cedar", []byte(text))
	if err != nil {
		return nil, err
	}
	uid := func(kind, id string) cedar.EntityUID {
		return cedar.NewEntityUID(cedar.EntityType(kind), cedar.String(id))
	}
	entities := cedar.EntityMap{uid("Agent", decider): {UID: uid("Agent", decider), Parents: cedar.NewEntityUIDSet(
		uid("AgentGroup", "spiffe://pawl.dev/agent/team-0"), uid("AgentGroup", "spiffe://pawl.dev/agent"))}}
	var past []cedar.Value
	for _, name := range used() {
		past = append(past, cedar.String(name))
	}
	request := cedar.Request{Principal: uid("Agent", decider), Action: uid("Action", "use"), Resource: uid("Tool", "tool.t0"),
		Context: cedar.NewRecord(cedar.RecordMap{"args": cedar.NewRecord(cedar.RecordMap{"env": cedar.String("e0")}),
			"chain": cedar.NewRecord(cedar.RecordMap{"depth": cedar.Long(depth)}), "used": cedar.NewSet(past...)})}
	return func() bool {
		decision, _ := cedar.Authorize(set, entities, request)
		return decision == cedar.Allow
	}, nil
}
