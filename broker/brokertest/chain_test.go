package brokertest_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/brokertest"
)

func TestParseChain(t *testing.T) {
	for _, c := range []struct{ drawing, want string }{
		{"root", "root"},
		{" root\n->planner ", "root -> planner"},
		{"root -> planner -> {fetcher, writer}", "root -> planner -> {fetcher, writer}"},
		{"a->{b->{c,d},e->f->g}", "a -> {b -> {c, d}, e -> f -> g}"},
		{"a -> {b}", "a -> b"},
		{"a-1->b_2-c", "a-1 -> b_2-c"},
	} {
		got, err := brokertest.ParseChain(c.drawing)
		if err != nil || got.String() != c.want {
			t.Errorf("ParseChain(%q) = %v, %v, want %s", c.drawing, got, err, c.want)
		}
	}
}

func TestParseChainErrors(t *testing.T) {
	for _, c := range []struct{ drawing, text string }{
		{"", "byte 0: want a name"},
		{"a ->", "byte 4: want a name"},
		{"a -> {b", `byte 7: want "," or "}"`},
		{"a -> {b, }", "byte 9: want a name"},
		{"a -> {}", "byte 6: want a name"},
		{"a b", `byte 2: unexpected "b"`},
		{"a -> b -> a", `byte 10: "a" is drawn twice`},
		{"-> a", "byte 0: want a name"},
		{"é", "byte 0: want a name"},
	} {
		if _, err := brokertest.ParseChain(c.drawing); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("ParseChain(%q) = %v, want an error with %q", c.drawing, err, c.text)
		}
	}
}

func TestWalk(t *testing.T) {
	root, err := brokertest.ParseChain("root -> {planner -> {fetcher, writer}, critic}")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	root.Walk(func(parent, node *brokertest.Node) {
		above := "-"
		if parent != nil {
			above = parent.Name
		}
		got = append(got, above+">"+node.Name)
	})
	const want = "[->root root>planner planner>fetcher planner>writer root>critic]"
	if fmt.Sprint(got) != want {
		t.Errorf("Walk = %v, want %v", got, want)
	}
}

func FuzzParseChain(f *testing.F) {
	f.Add("root -> planner -> {fetcher, writer}")
	f.Add(strings.Repeat("{a->", 200))
	f.Fuzz(func(t *testing.T, drawing string) {
		n, err := brokertest.ParseChain(drawing)
		if err != nil {
			return
		}
		again, err := brokertest.ParseChain(n.String())
		if err != nil || again.String() != n.String() {
			t.Errorf("ParseChain(%q) draws %q, which reads as %v, %v", drawing, n, again, err)
		}
	})
}
