package audit_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/selector"
)

// selectorScene has two chains, "nightly" of root with a delegation to sub, and "other" of root, with one live grant each
// under nightly's root, nightly's sub and other's root.
type selectorScene struct {
	world
	nightly, sub, other    broker.Delegation
	inRoot, inSub, inOther broker.Grant
	leaked                 string // the password of inSub
	between                time.Time
}

func newSelectorScene(t *testing.T) *selectorScene {
	w := newWorld(t)
	s := &selectorScene{world: w}
	open := func(task, env string) broker.Delegation {
		d, err := w.Open(t.Context(), as("root"), broker.OpenRequest{Task: task, Depth: 1, Labels: map[string]string{"env": env},
			Rights: []broker.Right{{Tool: "db", Use: true, Delegate: true}}})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	step := func(holder string, d broker.Delegation, table string) broker.Issued {
		given, err := args.New(map[string]args.Value{"table": args.String(table)})
		if err != nil {
			t.Fatal(err)
		}
		got, err := w.Issue(t.Context(), as(holder), broker.StepRequest{Delegation: d.ID, Tool: "db", Args: given})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	s.nightly = open("nightly", "prod")
	s.sub = w.delegate(s.nightly, "workers/sub")
	s.inRoot = step("root", s.nightly, "orders").Grant
	got := step("workers/sub", s.sub, "items")
	s.inSub = got.Grant
	var secret struct{ Password string }
	if err := json.Unmarshal(got.Secret.Reveal(), &secret); err != nil || secret.Password == "" {
		t.Fatalf("the secret has no password: %v", err)
	}
	s.leaked = secret.Password
	s.between = time.Now()
	s.other = open("other", "test")
	s.inOther = step("root", s.other, "orders").Grant
	return s
}

// TestSelectorsAgree: the plan of a revocation, its fence, its counts and its signed report are about the same grants,
// whatever selector it has.
func TestSelectorsAgree(t *testing.T) {
	type scene = *selectorScene
	root, sub, other := func(s scene) broker.GrantID { return s.inRoot.ID }, func(s scene) broker.GrantID { return s.inSub.ID }, func(s scene) broker.GrantID { return s.inOther.ID }
	for name, row := range map[string]struct {
		selector func(s scene) string
		want     []func(scene) broker.GrantID
	}{
		"chain":         {func(s scene) string { return "chain:" + string(s.nightly.Chain) }, []func(scene) broker.GrantID{root, sub}},
		"subtree":       {func(s scene) string { return "subtree:" + string(s.sub.ID) }, []func(scene) broker.GrantID{sub}},
		"grant":         {func(s scene) string { return "grant:" + string(s.inRoot.ID) }, []func(scene) broker.GrantID{root}},
		"spiffe":        {func(scene) string { return "spiffe:spiffe://example.org/workers/sub" }, []func(scene) broker.GrantID{sub}},
		"spiffe prefix": {func(scene) string { return "spiffe:spiffe://example.org/workers/*" }, []func(scene) broker.GrantID{sub}},
		"task":          {func(scene) string { return "task:other" }, []func(scene) broker.GrantID{other}},
		"label":         {func(scene) string { return "label.env:prod" }, []func(scene) broker.GrantID{root, sub}},
		"since":         {func(s scene) string { return "since:" + s.between.UTC().Format(time.RFC3339Nano) }, []func(scene) broker.GrantID{other}},
		"until":         {func(s scene) string { return "until:" + s.between.UTC().Format(time.RFC3339Nano) }, []func(scene) broker.GrantID{root, sub}},
		"tool":          {func(scene) string { return "tool:db" }, []func(scene) broker.GrantID{root, sub, other}},
		"argument":      {func(scene) string { return "arg.table:orders" }, []func(scene) broker.GrantID{root, other}},
		"vault":         {func(scene) string { return "vault:target/*" }, []func(scene) broker.GrantID{root, sub, other}},
		"bundle":        {func(scene) string { return "bundle:test" }, []func(scene) broker.GrantID{root, sub, other}},
		"leaked":        {func(s scene) string { return selector.ForLeaked(s.leaked).String() }, []func(scene) broker.GrantID{sub}},
		"and":           {func(scene) string { return "tool:db and label.env:prod and not arg.table:items" }, []func(scene) broker.GrantID{root}},
		"or":            {func(s scene) string { return "task:other or grant:" + string(s.inSub.ID) }, []func(scene) broker.GrantID{sub, other}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSelectorScene(t)
			signer, key := newSigner(t)
			var want []broker.GrantID
			for _, id := range row.want {
				want = append(want, id(s))
			}
			slices.Sort(want)
			sel, err := selector.Parse(row.selector(s))
			if err != nil {
				t.Fatal(err)
			}
			plan, err := s.Plan(t.Context(), broker.Operator{Name: "ann"}, sel)
			if err != nil || plan.Grants != len(want) {
				t.Errorf("the plan has %d grants, %v; want %d", plan.Grants, err, len(want))
			}
			rv := s.revoke(sel.String())
			if rv.Closure != broker.ClosureClosed || rv.Grants != len(want) || rv.Dead != len(want) {
				t.Errorf("the revocation is %s with %d of %d dead, want CLOSED with %d", rv.Closure, rv.Dead, rv.Grants, len(want))
			}
			var fenced []broker.GrantID
			for _, g := range []broker.Grant{s.inRoot, s.inSub, s.inOther} {
				if active, err := s.Active(t.Context(), g.ID); err != nil {
					t.Fatal(err)
				} else if !active {
					fenced = append(fenced, g.ID)
				}
			}
			if slices.Sort(fenced); !slices.Equal(fenced, want) {
				t.Errorf("the fence covers %v, want %v", fenced, want)
			}
			jws, err := s.notary(signer).Report(t.Context(), rv.ID)
			if err != nil {
				t.Fatal(err)
			}
			r, err := audit.VerifyReport(jws, key)
			if err != nil {
				t.Fatal(err)
			}
			reported := grantIDs(r.Grants)
			if slices.Sort(reported); !slices.Equal(reported, want) {
				t.Errorf("the report has the grants %v, want %v", reported, want)
			}
			chains := map[broker.ChainID]bool{}
			for _, g := range r.Grants {
				chains[g.Chain] = true
			}
			if len(r.Chains) < len(chains) {
				t.Errorf("the report has %s, want the %d chains of its grants", fmt.Sprint(r.Chains), len(chains))
			}
		})
	}
}
