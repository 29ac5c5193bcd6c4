package brokertest

import (
	"fmt"
	"strings"
)

// Node is one delegation of a chain drawn as text.
type Node struct {
	Name     string
	Children []Node
}

// ParseChain reads a drawing like
//
//	root -> planner -> {fetcher, writer -> reviewer}
//
// An arrow points to the receiver of a delegation, and braces hold several receivers. Names are letters, digits, '-'
// and '_', each used once. The error gives the byte at which parsing stopped.
func ParseChain(drawing string) (Node, error) {
	p := chainParser{rest: drawing, seen: map[string]bool{}}
	root, err := p.node()
	if p.space(); err == nil && p.rest != "" {
		err = fmt.Errorf("unexpected %q", p.rest[:1])
	}
	if err != nil {
		return Node{}, fmt.Errorf("chain %q, byte %d: %w", drawing, len(drawing)-len(p.rest), err)
	}
	return root, nil
}

// String draws the chain in the form that ParseChain reads.
func (n Node) String() string {
	switch len(n.Children) {
	case 0:
		return n.Name
	case 1:
		return n.Name + " -> " + n.Children[0].String()
	}
	list := make([]string, len(n.Children))
	for i, c := range n.Children {
		list[i] = c.String()
	}
	return n.Name + " -> {" + strings.Join(list, ", ") + "}"
}

// Walk calls f with each node and its parent, nil for the root, parents first.
func (n *Node) Walk(f func(parent, node *Node)) { n.walk(nil, f) }

func (n *Node) walk(parent *Node, f func(parent, node *Node)) {
	f(parent, n)
	for i := range n.Children {
		n.Children[i].walk(n, f)
	}
}

// maxDrawing is the depth beyond which a drawing must be a mistake.
const maxDrawing = 100

type chainParser struct {
	rest  string
	seen  map[string]bool
	depth int
}

func (p *chainParser) space() { p.rest = strings.TrimLeft(p.rest, " \t\n") }

// eat consumes token if it is next.
func (p *chainParser) eat(token string) bool {
	p.space()
	rest, ok := strings.CutPrefix(p.rest, token)
	p.rest = rest
	return ok
}

func (p *chainParser) node() (Node, error) {
	if p.depth++; p.depth > maxDrawing {
		return Node{}, fmt.Errorf("deeper than %d", maxDrawing)
	}
	defer func() { p.depth-- }()
	name, err := p.name()
	if err != nil || !p.eat("->") {
		return Node{Name: name}, err
	}
	if !p.eat("{") {
		child, err := p.node()
		return Node{name, []Node{child}}, err
	}
	var children []Node
	for {
		child, err := p.node()
		if err != nil {
			return Node{}, err
		}
		children = append(children, child)
		switch {
		case p.eat(","):
		case p.eat("}"):
			return Node{name, children}, nil
		default:
			return Node{}, fmt.Errorf(`want "," or "}"`)
		}
	}
}

func (p *chainParser) name() (string, error) {
	p.space()
	rest := strings.TrimLeft(p.rest, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
	// A '-' belongs to the name unless it begins an arrow.
	for strings.HasPrefix(rest, "-") && !strings.HasPrefix(rest, "->") && len(rest) < len(p.rest) {
		rest = strings.TrimLeft(rest[1:], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
	}
	name := p.rest[:len(p.rest)-len(rest)]
	switch {
	case name == "":
		return "", fmt.Errorf("want a name")
	case p.seen[name]:
		return "", fmt.Errorf("%q is drawn twice", name)
	}
	p.rest, p.seen[name] = rest, true
	return name, nil
}
