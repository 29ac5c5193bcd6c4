package broker

import (
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker/args"
)

// ToolName names a tool: words of lower-case letters and digits, joined by single dots or hyphens, at most
// [MaxToolName] bytes. Each name has one spelling, so look-alikes do not parse.
type ToolName string

// ParseToolName accepts only this spelling. A name begins with a letter.
func ParseToolName(s string) (ToolName, error) {
	bad := s == "" || len(s) > MaxToolName || s[0] < 'a' || s[0] > 'z'
	for i := 1; !bad && i < len(s); i++ {
		joint := s[i] == '.' || s[i] == '-'
		after := s[i-1] == '.' || s[i-1] == '-'
		bad = !joint && !(s[i] >= 'a' && s[i] <= 'z' || s[i] >= '0' && s[i] <= '9') ||
			joint && (after || i == len(s)-1)
	}
	if bad {
		return "", fmt.Errorf("a tool name is lower-case letters and digits joined by single dots or hyphens, "+
			"at most %d bytes", MaxToolName)
	}
	return ToolName(s), nil
}

// Narrowing is the label of a tool. It names the place that enforces that a secret can do no more than its step. The
// zero value is the weakest.
type Narrowing uint8

// The labels, weakest first, so that they compare with <.
const (
	NarrowNone   Narrowing = iota // nothing: a static secret keeps its full width
	NarrowProxy                   // Pawl's proxy, through which alone the secret is usable
	NarrowNative                  // the target itself
)

var narrowingNames = []string{"none", "proxy", "native"}

// String is "none", "proxy" or "native".
func (n Narrowing) String() string { return narrowingNames[min(int(n), len(narrowingNames)-1)] }

// ParseNarrowing reads "none", "proxy" or "native".
func ParseNarrowing(s string) (Narrowing, error) {
	for i, name := range narrowingNames {
		if s == name {
			return Narrowing(i), nil
		}
	}
	return NarrowNone, fmt.Errorf("narrowing %.20q is not none, proxy or native", s)
}

// MarshalText is [Narrowing.String].
func (n Narrowing) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText is [ParseNarrowing].
func (n *Narrowing) UnmarshalText(b []byte) (err error) {
	*n, err = ParseNarrowing(string(b))
	return err
}

// Tool is the declaration of one tool. The platform team makes it once for all callers. The
// delegation and the policy decide how much of it one caller may use.
type Tool struct {
	Name      ToolName
	Backend   string               // the backend that prepares, severs and proves: "postgres", "ssh", …
	Narrowing Narrowing            // the place that enforces the narrowing of the secret
	TTL       time.Duration        // lifetime of a secret unless the request sets a shorter one; zero: DefaultTTL
	Arguments map[string]Parameter // every argument that it takes; others are refused
	Policy    string               // the Vault policy that permits the mint
	Path      VaultPath            // mount and role in Vault; the backend defines the meaning of the segments
	Settings  map[string]string    // for the backend, which checks them when the tool is loaded

	// StepToken asks for a Vault token of each step's own, with Policy alone, also where the secrets have no lease. False:
	// only steps with a lease have one, and the delegation's token mints the others.
	StepToken bool

	// Canary marks a tool that no caller has a reason to use. A request for it is a violation, and nothing is ever
	// minted.
	Canary bool
}

// Parameter declares one argument of a tool.
type Parameter struct {
	Kind       string           // "string", "integer", "boolean" or "list"
	Required   bool             // a step without it is refused
	Constraint *args.Constraint // the values that the tool takes at all; nil: every value of the kind
}

// Check returns the names of the arguments that this tool refuses: those that are unknown, missing, of another kind, or
// outside the tool's own constraint.
func (t Tool) Check(args args.Args) (wrong []string) {
	for _, name := range args.Names() {
		p, known := t.Arguments[name]
		v, _ := args.Get(name)
		if !known || p.Kind != v.Kind() || p.Constraint != nil && !p.Constraint.Allows(v) {
			wrong = append(wrong, name)
		}
	}
	for name, p := range t.Arguments {
		if _, given := args.Get(name); p.Required && !given {
			wrong = append(wrong, name)
		}
	}
	return wrong
}

// Lifetime is the longest lifetime of a secret for this tool: TTL, or [DefaultTTL] without one, and at most [MaxTTL].
func (t Tool) Lifetime() time.Duration {
	if t.TTL <= 0 {
		return DefaultTTL
	}
	return min(t.TTL, MaxTTL)
}
