package engine_test

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/args/argstest"
	"github.com/pawlsec/pawl/broker/engine"
)

// samples is a fixed set of constraints and values with the reference's answer for every pair. So checking a call in a
// tree costs nothing.
type samples struct {
	wires       [][]byte
	constraints []args.Constraint
	values      []args.Value
	allowed     [][]bool // by constraint and value, from the reference
	within      [][]int  // by constraint: the values that it allows
	covered     [][]int  // by constraint: the constraints that it covers
}

func newSamples(p argstest.Pick) *samples {
	w := &samples{}
	for len(w.constraints) < 300 {
		wire := argstest.Constraint(p, argstest.OneFrom(p, append(slices.Clone(argstest.Kinds), "all")...))
		if c, err := args.ParseConstraint(wire); err == nil {
			w.wires, w.constraints = append(w.wires, wire), append(w.constraints, c)
		}
	}
	for len(w.values) < 400 {
		w.values = append(w.values, argstest.ValueFor(p, argstest.OneFrom(p, argstest.Kinds...)))
	}
	for i, c := range w.constraints {
		allowed := make([]bool, len(w.values))
		var within, covered []int
		for j, v := range w.values {
			allowed[j] = argstest.Allows(w.wires[i], v)
			if allowed[j] {
				within = append(within, j)
			}
		}
		for j, d := range w.constraints {
			if c.Covers(d) {
				covered = append(covered, j)
			}
		}
		w.allowed = append(w.allowed, allowed)
		w.within, w.covered = append(w.within, within), append(w.covered, covered)
	}
	return w
}

// treeNode is a delegation. Its rights name the constraints by their index in the samples, for the reference.
type treeNode struct {
	parent int
	rights map[broker.ToolName]treeRight
	scope  broker.Scope
	held   broker.Delegation
}

type treeRight struct {
	use, delegate bool
	args          map[string]int
}

var treeTime = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

var treeTools = []broker.ToolName{"deploy", "psql", "ssh"}

func (w *samples) scope(t *testing.T, rights map[broker.ToolName]treeRight) broker.Scope {
	var list []broker.Right
	for tool, r := range rights {
		args := map[string]args.Constraint{}
		for name, c := range r.args {
			args[name] = w.constraints[c]
		}
		list = append(list, broker.Right{Tool: tool, Use: r.use, Delegate: r.delegate, Args: args})
	}
	s, err := broker.NewScope(list)
	if err != nil {
		t.Fatalf("NewScope(%v): %v", list, err)
	}
	return s
}

// randomRights draws the rights of a root (a nil parent) or of a child. A child's rights are mostly narrower than its
// parent's, and sometimes not.
func (w *samples) randomRights(p argstest.Pick, parent map[broker.ToolName]treeRight) map[broker.ToolName]treeRight {
	rights := map[broker.ToolName]treeRight{}
	for len(rights) == 0 {
		for _, tool := range treeTools {
			above, held := parent[tool]
			if p(3) == 0 || !held && parent != nil && p(20) > 0 {
				continue
			}
			r := treeRight{use: p(2) == 0, delegate: p(3) > 0, args: map[string]int{}}
			r.use = r.use || !r.delegate
			for _, name := range []string{"a", "b"} {
				c, limited := above.args[name]
				switch {
				case limited && p(20) == 0: // no constraint, which is wider
				case limited && p(10) > 0 && len(w.covered[c]) > 0:
					r.args[name] = argstest.OneFrom(p, w.covered[c]...)
				case limited || p(2) == 0:
					r.args[name] = p(len(w.constraints))
				}
			}
			rights[tool] = r
		}
	}
	return rights
}

// allows is the reference's answer for a call: the index of each argument's value, or -1 for none.
func (w *samples) allows(r treeRight, call map[string]int) bool {
	for name, c := range r.args {
		if call[name] < 0 || !w.allowed[c][call[name]] {
			return false
		}
	}
	return true
}

// randomCall draws arguments, mostly those that the right allows.
func (w *samples) randomCall(p argstest.Pick, r treeRight) map[string]int {
	call := map[string]int{}
	for _, name := range []string{"a", "b"} {
		call[name] = p(len(w.values)+1) - 1
		if c, limited := r.args[name]; limited && len(w.within[c]) > 0 && p(10) > 0 {
			call[name] = argstest.OneFrom(p, w.within[c]...)
		}
	}
	return call
}

// randomLimits draws the budget, depth and TTL of a delegation. They are mostly within its parent's, and sometimes not.
func (w *samples) randomLimits(p argstest.Pick, above broker.Delegation) (r broker.DelegateRequest) {
	near := func(limit int) int {
		switch n := p(20); {
		case n < 10:
			return 0
		case n == 10:
			return limit + 1
		}
		return 1 + p(max(limit, 1))
	}
	b := above.Budget
	r.Budget = broker.Budget{Steps: near(b.Steps), Live: near(b.Live), PerMinute: near(b.PerMinute),
		Tools: map[broker.ToolName]int{}}
	for _, tool := range treeTools {
		if n := near(b.Tools[tool]); n > 0 {
			r.Budget.Tools[tool] = n
		}
	}
	if r.Depth = above.Depth - 1 - p(2); p(20) == 0 || r.Depth < 0 {
		r.Depth = above.Depth - 1 + p(3)
	}
	r.Depth = max(r.Depth, 0)
	if whole := above.Expires.Sub(above.Created); p(2) == 0 {
		r.TTL = time.Duration(1 + p(max(1, int(whole)+int(whole)/10)))
	}
	return r
}

// checkWithin fails the test unless a delegation's expiry, depth and budgets are within those of its parent.
func checkWithin(t *testing.T, above, d broker.Delegation) {
	t.Helper()
	type limit struct{ above, below int }
	limits := map[string]limit{
		"steps":      {above.Budget.Steps, d.Budget.Steps},
		"live":       {above.Budget.Live, d.Budget.Live},
		"per minute": {above.Budget.PerMinute, d.Budget.PerMinute},
	}
	for _, tool := range treeTools {
		limits[string(tool)] = limit{above.Budget.Tools[tool], d.Budget.Tools[tool]}
	}
	for name, l := range limits {
		if l.above > 0 && (l.below == 0 || l.below > l.above) {
			t.Fatalf("the budget %s is %d under a delegation with %d", name, l.below, l.above)
		}
	}
	if d.Depth >= above.Depth || d.Expires.After(above.Expires) {
		t.Fatalf("a delegation of depth %d until %v is under one of depth %d until %v",
			d.Depth, d.Expires, above.Depth, above.Expires)
	}
}

var holders = []spiffeid.ID{as("planner").ID, as("writer").ID, as("reader").ID}

// pathTo returns the delegations from the root to a node.
func pathTo(tree []treeNode, node int) (path []broker.Delegation) {
	for ; node >= 0; node = tree[node].parent {
		path = append(path, tree[node].held)
	}
	slices.Reverse(path)
	return path
}

// TestNoTreeWidens draws trees of delegations that Delegate accepts, whose holders repeat, and calls. By the reference,
// every call that a node allows is allowed by the node above it. No holder can make a call that it could not make by
// its first node on the way from the root. No node has a later expiry, a larger budget or a greater depth than the node
// above it.
func TestNoTreeWidens(t *testing.T) {
	const trees, nodes = 100_000, 5
	random := rand.New(rand.NewPCG(3, 20251124))
	p := argstest.Pick(random.IntN)
	w := newSamples(p)
	accepted, refused, allowed := 0, 0, 0
	for range trees {
		root := w.randomRights(p, nil)
		tree := []treeNode{{parent: -1, rights: root, scope: w.scope(t, root), held: broker.Delegation{
			Holder: holders[p(len(holders))], Scope: w.scope(t, root), Depth: 1 + p(broker.MaxDepth),
			Budget: broker.Budget{Steps: p(3) * 10, Live: p(3) * 10, PerMinute: p(2) * 10,
				Tools: map[broker.ToolName]int{"ssh": p(2) * 10}},
			Created: treeTime, Expires: treeTime.Add(time.Hour)}}}
		for range nodes {
			parent := p(len(tree))
			rights := w.randomRights(p, tree[parent].rights)
			child := treeNode{parent: parent, rights: rights, scope: w.scope(t, rights)}
			path := pathTo(tree, parent)
			above := path[len(path)-1]
			r := w.randomLimits(p, above)
			r.Rights, r.To = child.scope, holders[p(len(holders))]
			held, ok := engine.Shrink(path, r, above.Created.Add(time.Duration(p(60))*time.Second))
			if !ok {
				refused++
				continue
			}
			accepted++
			child.held = held
			checkWithin(t, above, held)
			tree = append(tree, child)
			for _, tool := range treeTools {
				if r, held := rights[tool]; held {
					allowed += w.check(t, tree, tool, w.randomCall(p, r))
				}
			}
		}
	}
	t.Logf("%d trees: %d delegations accepted, %d refused, %d calls compared", trees, accepted, refused, allowed)
	if accepted < trees || refused < trees || allowed < trees/2 {
		t.Errorf("%d accepted, %d refused, %d allowed calls: too few to test the property", accepted, refused, allowed)
	}
}

// check compares a call under the newest node with the reference. If the node allows the call, every node above must
// allow it too. check returns the number of calls that were compared so.
func (w *samples) check(t *testing.T, tree []treeNode, tool broker.ToolName, call map[string]int) int {
	leaf := tree[len(tree)-1]
	r := leaf.rights[tool]
	values := map[string]args.Value{}
	for name, v := range call {
		if v >= 0 {
			values[name] = w.values[v]
		}
	}
	args, err := args.New(values)
	if err != nil {
		t.Fatalf("args.New(%v): %v", values, err)
	}
	mine, _ := leaf.scope.Right(tool)
	want := w.allows(r, call)
	if got := len(mine.Allows(args)) == 0; got != want {
		t.Fatalf("right %v allows %s = %v, want %v", mine, args.Canonical(), got, want)
	}
	if !want {
		return 0
	}
	first := r // of the same holder, on the way from the root
	for up := leaf.parent; up >= 0; up = tree[up].parent {
		above, held := tree[up].rights[tool]
		if tree[up].held.Holder == leaf.held.Holder {
			first = above
		}
		if !held || !above.delegate || !w.allows(above, call) {
			t.Fatalf("%s with %s is allowed by %v and not by %v above it",
				tool, args.Canonical(), leaf.scope, tree[up].scope)
		}
	}
	if r.use && !first.use {
		t.Fatalf("%s may use %s by %v, and could only delegate it above", leaf.held.Holder, tool, leaf.scope)
	}
	return 1
}

func TestScopeWider(t *testing.T) {
	use := func(tool string, given ...string) broker.Right {
		r := broker.Right{Tool: broker.ToolName(tool), Use: true, Args: map[string]args.Constraint{}}
		for _, a := range given {
			name, wire, _ := strings.Cut(a, "=")
			r.Args[name] = must(args.ParseConstraint([]byte(wire)))
		}
		return r
	}
	delegate := func(tool string, given ...string) broker.Right {
		r := use(tool, given...)
		r.Use, r.Delegate = false, true
		return r
	}
	type rights = []broker.Right
	for name, row := range map[string]struct {
		parent broker.Right
		child  rights
		want   string
	}{
		"to use":                  {delegate("a"), rights{use("a")}, ""},
		"to delegate":             {delegate("a"), rights{delegate("a")}, ""},
		"a right to use only":     {use("a"), rights{use("a")}, "tool:a"},
		"a tool the parent lacks": {delegate("a"), rights{use("a"), use("b")}, "tool:b"},
		"a narrower argument":     {delegate("a", `x={"prefix":"p"}`), rights{use("a", `x={"exact":"pq"}`)}, ""},
		"another argument":        {delegate("a"), rights{use("a", `x={"exact":"pq"}`)}, ""},
		"an argument left free":   {delegate("a", `x={"prefix":"p"}`), rights{use("a")}, "tool:a:argument:x"},
		"a wider argument": {delegate("a", `x={"exact":"p"}`), rights{use("a", `x={"prefix":"p"}`)},
			"tool:a:argument:x"},
		"one of two is wider": {delegate("a", `x={"exact":"p"}`, `y={"range":{"max":3}}`),
			rights{use("a", `x={"exact":"p"}`, `y={"range":{"max":4}}`)}, "tool:a:argument:y"},
		"an argument with no value": {delegate("a", `x={"exact":"p"}`), rights{use("a", `x={"one_of":[]}`)}, ""},
	} {
		parent, child := must(broker.NewScope(rights{row.parent})), must(broker.NewScope(row.child))
		if got := strings.Join(parent.Wider(child), " "); got != row.want {
			t.Errorf("%s: Wider = %q, want %q", name, got, row.want)
		}
	}
	if got := (broker.Scope{}).Wider(broker.Scope{use("a")}); len(got) != 1 {
		t.Errorf("Wider of the zero Scope = %v, want the tool", got)
	}
}

func TestRightAllows(t *testing.T) {
	right := broker.Right{Tool: "a", Use: true,
		Args: map[string]args.Constraint{"x": argstest.Parse(`{"one_of":["1"]}`), "y": argstest.Parse(`{"range":{"min":0,"max":9}}`)}}
	for raw, want := range map[string]string{
		`{"x":"1","y":5}`:         "",
		`{"x":"1","y":5,"z":"q"}`: "",
		`{"x":"1"}`:               "y",
		`{"x":"2","y":10}`:        "x y",
		`{"x":"1","y":"5"}`:       "y",
		`{}`:                      "x y",
	} {
		args, err := args.Parse([]byte(raw))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(right.Allows(args), " "); got != want {
			t.Errorf("Right.Allows(%s) = %q, want %q", raw, got, want)
		}
	}
}

func TestNewScope(t *testing.T) {
	r := func(tool string) broker.Right { return broker.Right{Tool: broker.ToolName(tool), Use: true} }
	many := func(n int) (rights []broker.Right) {
		for i := range n {
			rights = append(rights, r("t"+strings.Repeat("a", i/26)+string(rune('a'+i%26))))
		}
		return rights
	}
	if s, err := broker.NewScope([]broker.Right{r("b"), r("a")}); err != nil || s[0].Tool != "a" || s[1].Tool != "b" {
		t.Errorf("NewScope(b, a) = %v, %v, want a, b", s, err)
	}
	if _, err := broker.NewScope(many(broker.MaxRights)); err != nil {
		t.Errorf("NewScope with %d rights = %v, want a scope", broker.MaxRights, err)
	}
	for name, rights := range map[string][]broker.Right{
		"none":                   nil,
		"above the limit":        many(broker.MaxRights + 1),
		"two for one tool":       {r("a"), r("a")},
		"no use and no delegate": {{Tool: "a"}},
		"bad tool":               {r("A")},
		"bad argument":           {{Tool: "a", Use: true, Args: map[string]args.Constraint{"X": argstest.Parse(`{"one_of":["a"]}`)}}},
	} {
		if s, err := broker.NewScope(rights); err == nil {
			t.Errorf("NewScope(%s) = %v, want an error", name, s)
		}
	}
}
