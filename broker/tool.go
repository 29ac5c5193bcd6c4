package broker

import (
	"errors"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker/args"
)

// ToolName names a tool: words of lower-case letters and digits joined by single dots or
// hyphens, at most 48 bytes. One spelling each, so look-alikes do not parse.
type ToolName string

// ParseToolName accepts exactly the spelling above.
func ParseToolName(s string) (ToolName, error) {
	bad := s == "" || len(s) > MaxToolName || s[0] < 'a' || s[0] > 'z'
	for i := 1; !bad && i < len(s); i++ {
		joint := s[i] == '.' || s[i] == '-'
		after := s[i-1] == '.' || s[i-1] == '-'
		bad = !joint && !(s[i] >= 'a' && s[i] <= 'z' || s[i] >= '0' && s[i] <= '9') ||
			joint && (after || i == len(s)-1)
	}
	if bad {
		return "", errors.New("a tool name is lower-case letters and digits joined by single dots or hyphens, at most 48 bytes")
	}
	return ToolName(s), nil
}

// Narrowing says where it is enforced that a secret can do no more than its step.
// The zero value is the weakest.
type Narrowing uint8

// The labels, weakest first, so that they compare with <.
const (
	NarrowNone   Narrowing = iota // a static secret as wide as it is
	NarrowProxy                   // usable only through Pawl's proxy
	NarrowNative                  // the target itself refuses more
)

var narrowingNames = []string{"none", "proxy", "native"}

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

// MarshalText and UnmarshalText use the names above.
func (n Narrowing) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText is [ParseNarrowing].
func (n *Narrowing) UnmarshalText(b []byte) (err error) {
	*n, err = ParseNarrowing(string(b))
	return err
}

// Tool is a named thing that a step can be for. It is made by the platform team and is the
// same for everybody; what one caller may do with it is the delegation's and policy's matter.
type Tool struct {
	Name      ToolName
	Backend   string               // which backend plugin prepares, severs and proves: "postgres", "ssh", …
	Narrowing Narrowing            // where the secret's narrowing is enforced
	TTL       time.Duration        // a secret's life unless less is asked for; zero means one minute
	Arguments map[string]Parameter // every argument it takes; others are refused
	Policy    string               // the Vault policy a step's token holds
	Path      VaultPath            // mount and role in Vault; the backend gives the segments their sense
	Settings  map[string]string    // of the backend, validated by it when the tool is loaded
	Canary    bool                 // nobody has business with it: reaching for it is a violation, and nothing is ever minted
}

// Parameter declares one argument of a tool.
type Parameter struct {
	Kind       string           // "string", "integer", "boolean" or "list"
	Required   bool             // a step without it is refused
	Constraint *args.Constraint // what the tool takes at all; nil means any value of the kind
}

// Check reports what is wrong with args for this tool: the names of the arguments that are
// unknown, missing, of another kind, or outside what the tool takes.
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

func (t Tool) Lifetime() time.Duration {
	if t.TTL <= 0 {
		return DefaultTTL
	}
	return min(t.TTL, MaxTTL)
}
