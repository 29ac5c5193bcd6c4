package policy

import (
	"io/fs"

	"github.com/go-jose/go-jose/v4"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// DecideUnsliced is Decide over every policy of the bundle and the whole context. It is the reference for slicing.
func (p *Policy) DecideUnsliced(q broker.Question) broker.Decision {
	rules := p.whole()
	return p.conclude(&q, p.evaluate(&q, func(*tool, broker.Action, spiffeid.ID) ([]*rule, reads) { return rules, every() }))
}

// whole returns the rules with their scopes still to be evaluated.
func (p *Policy) whole() (rules []*rule) {
	for _, r := range p.rules {
		unsliced := *r
		unsliced.when = r.policy
		rules = append(rules, &unsliced)
	}
	return rules
}

// Unsliced is Decide over every policy, with the context members that they read. It leaves out slicing alone, so that
// both can be timed side by side.
func (p *Policy) Unsliced() func(broker.Question) broker.Decision {
	members, rules := reads{}, p.whole()
	for _, r := range p.rules {
		members.add(r.reads)
	}
	return func(q broker.Question) broker.Decision {
		return p.conclude(&q, p.evaluate(&q, func(*tool, broker.Action, spiffeid.ID) ([]*rule, reads) { return rules, members }))
	}
}

// LoadUnchecked builds and loads a directory that may have wrong policies, which Load refuses.
func LoadUnchecked(dir fs.FS) (*Policy, error) {
	s, err := read(dir)
	if err != nil {
		return nil, err
	}
	return compile(s.Unsigned())
}

// ReadUnchecked reads such a directory.
var ReadUnchecked = read

// Words returns the words of the context.
func Words() (names []string) {
	for _, w := range vocabulary {
		names = append(names, w.name)
	}
	return names
}

// Broken is a policy that panics on a question about db.read.
func Broken() *Policy { return &Policy{tools: map[broker.ToolName]*tool{"db.read": nil}} }

// Relevant counts the policies that Decide evaluates.
func (p *Policy) Relevant(q broker.Question) int { return len(p.evaluate(&q, p.relevant).rules) }

// SignRaw signs any payload.
func SignRaw(payload []byte, keys ...jose.JSONWebKey) []byte {
	jws, err := addSignatures(signedJSON{Payload: encode(payload)}, keys)
	if err != nil {
		panic(err)
	}
	return jws
}

// Payload returns the canonical JSON that signatures cover.
func (s Source) Payload() []byte { return s.payload }

// RunTests runs a policy test file.
var RunTests = runTests
