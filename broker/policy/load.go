package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/envelope"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Policy is one compiled bundle. It is immutable, implements [broker.Policy], and is safe for
// concurrent use.
type Policy struct {
	bundle     Bundle
	digest     string
	tools      map[broker.ToolName]*tool
	unnamed    *tool   // the tool of a report that names none
	rules      []*rule // in the order of their ids
	byID       map[cedar.PolicyID]*rule
	violations map[broker.ViolationCode]broker.Consequence
	issuers    envelope.Issuers
	windows    []time.Duration // of the rules over the history of a caller
	warnings   []string
}

var _ interface {
	broker.Policy
	broker.EnvelopeVerifier
	broker.CallerPolicy
} = (*Policy)(nil)

// tool is a declared tool with its Cedar entity and the rules that can match it.
type tool struct {
	broker.Tool
	uid      cedar.EntityUID
	entity   cedar.Entity
	relevant map[broker.Action]slice
}

// Load compiles a bundle. It refuses text that is not Cedar, two policies with one id, unknown or misplaced
// annotations, and open scopes without @any. It also refuses policies that are legal Cedar but wrong: those that can
// match nothing, and those with a condition that always fails. Errors begin with "file:line: ".
func Load(b Bundle) (*Policy, error) {
	p, err := compile(b)
	if err != nil {
		return nil, err
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	return p, nil
}

// compile compiles a bundle, wrong policies included.
func compile(b Bundle) (*Policy, error) {
	p := &Policy{
		bundle:     b,
		digest:     b.Digest(),
		tools:      make(map[broker.ToolName]*tool, len(b.content.Tools)),
		violations: make(map[broker.ViolationCode]broker.Consequence, len(b.content.Violations)),
	}
	for _, d := range b.content.Tools {
		t, err := d.tool()
		if err != nil {
			return nil, fmt.Errorf("tools.yaml: tool %.60q: %w", d.Name, err)
		}
		p.tools[t.Name] = newTool(t)
	}
	p.unnamed = newTool(broker.Tool{})
	p.violations[broker.ViolationSecondUse] = broker.ConsequenceRevokeStep // the secret leaked, or was not delivered
	p.violations[broker.ViolationCanary] = broker.ConsequenceRevokeChain
	for code, name := range b.content.Violations {
		p.violations[code], _ = broker.ParseConsequence(name) // content.check validated it
	}
	var err error
	if p.issuers, err = b.content.issuers(); err != nil {
		return nil, err
	}
	if err := p.compile(b.content.Policies); err != nil {
		return nil, err
	}
	if err := p.checkSchema(b.content.Schema); err != nil {
		return nil, err
	}
	idx := newIndex(p.rules)
	for _, t := range p.tools {
		t.relevant = idx.of(t)
	}
	p.unnamed.relevant = idx.of(p.unnamed)
	return p, nil
}

func (p *Policy) compile(docs []document) error {
	p.byID = map[cedar.PolicyID]*rule{}
	for _, d := range docs {
		list, err := cedar.NewPolicyListFromBytes(d.File, []byte(d.Text))
		if err != nil {
			return errors.New(withFile(d.File, err))
		}
		for i, one := range list {
			r, err := newRule(one, cedar.PolicyID(fmt.Sprintf("%s#%d", d.File, i+1)))
			if err != nil {
				return fmt.Errorf("%s: %w", r.where, err)
			}
			if first, taken := p.byID[r.id]; taken {
				return fmt.Errorf("%s: policy id %q is taken by %s", r.where, r.id, first.where)
			}
			p.byID[r.id] = r
			p.rules = append(p.rules, r)
			if r.window > 0 && !slices.Contains(p.windows, r.window) {
				p.windows = append(p.windows, r.window)
			}
		}
		if len(p.rules) > MaxPolicies {
			return fmt.Errorf("%s: more than %d policies", d.File, MaxPolicies)
		}
	}
	slices.SortFunc(p.rules, func(a, b *rule) int { return cmp.Compare(a.id, b.id) })
	return nil
}

// withFile replaces the position in a Cedar error: Cedar parses bytes and does not know the file name.
func withFile(file string, err error) string {
	text := strings.TrimPrefix(err.Error(), "parser error: ")
	if at, ok := strings.CutPrefix(text, "parse error at <input>:"); ok {
		return file + ":" + at
	}
	return file + ": " + text
}

// checkSchema validates the policies against the author's own schema, if the bundle has one.
func (p *Policy) checkSchema(doc *document) error {
	if doc == nil {
		return nil
	}
	var s schema.Schema
	s.SetFilename(doc.File)
	if err := s.UnmarshalCedar([]byte(doc.Text)); err != nil {
		return fmt.Errorf("%s: %w", doc.File, err)
	}
	resolved, err := s.Resolve()
	if err != nil {
		return fmt.Errorf("%s: %w", doc.File, err)
	}
	v := validate.New(resolved)
	for _, r := range p.rules {
		if err := v.Policy(string(r.id), r.scope()); err != nil {
			return fmt.Errorf("%s: policy %q against the schema: %w", r.where, r.id, err)
		}
	}
	return nil
}

// Tool returns a declared tool.
func (p *Policy) Tool(name broker.ToolName) (broker.Tool, bool) {
	if t, ok := p.tools[name]; ok {
		return t.Tool, true
	}
	return broker.Tool{}, false
}

// Tools returns the declared tools, sorted by name.
func (p *Policy) Tools() []broker.Tool {
	tools := make([]broker.Tool, 0, len(p.tools))
	for _, t := range p.tools {
		tools = append(tools, t.Tool)
	}
	slices.SortFunc(tools, func(a, b broker.Tool) int { return cmp.Compare(a.Name, b.Name) })
	return tools
}

// CallerWindows implements [broker.CallerPolicy].
func (p *Policy) CallerWindows() []time.Duration { return p.windows }

// VerifyEnvelope implements [broker.EnvelopeVerifier] with the bundle's issuers.
func (p *Policy) VerifyEnvelope(token string, caller spiffeid.ID, now time.Time) (broker.Envelope, error) {
	return p.issuers.Verify(token, caller, now)
}

// Digest identifies the bundle: "sha256:" and the hex digest.
func (p *Policy) Digest() string { return p.digest }

// Bundle returns the bundle that the policy was loaded from.
func (p *Policy) Bundle() Bundle { return p.bundle }

// Warnings lists what is legal and unlikely to be meant, one line each.
func (p *Policy) Warnings() []string { return slices.Clone(p.warnings) }
