package brokertest

import (
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

// Path makes a Vault path of a constant. It panics if the text is no path.
func Path(text string) broker.VaultPath {
	path, err := broker.ParseVaultPath(text)
	if err != nil {
		panic("brokertest: " + err.Error())
	}
	return path
}

// Policy is a policy in the form of a function, over a set of tools.
type Policy struct {
	Tools  map[broker.ToolName]broker.Tool
	Answer func(broker.Question) broker.Decision // nil allows everything

	// Envelopes has the content of each valid token. Each is for every caller until it expires.
	Envelopes map[string]broker.Envelope
}

// AllowAll returns a policy that allows the named tools, on the backend "target", to every caller.
func AllowAll(names ...broker.ToolName) *Policy {
	p := &Policy{Tools: map[broker.ToolName]broker.Tool{}}
	for _, n := range names {
		p.Tools[n] = broker.Tool{Name: n, Backend: "target", Narrowing: broker.NarrowNative, Policy: "pawl-tool-" + string(n),
			Path: Path("target/creds"), Arguments: map[string]broker.Parameter{"table": {Kind: "string"}}}
	}
	return p
}

// Decide implements [broker.Policy].
func (p *Policy) Decide(q broker.Question) broker.Decision {
	if p.Answer == nil {
		return broker.Decision{Allow: q.Action != broker.ActionReport}
	}
	return p.Answer(q)
}

// Tool implements [broker.Policy].
func (p *Policy) Tool(name broker.ToolName) (broker.Tool, bool) { t, ok := p.Tools[name]; return t, ok }

// Digest implements [broker.Policy].
func (p *Policy) Digest() string { return "test" }

// VerifyEnvelope implements [broker.EnvelopeVerifier].
func (p *Policy) VerifyEnvelope(token string, _ spiffeid.ID, now time.Time) (broker.Envelope, error) {
	if e, ok := p.Envelopes[token]; ok && now.Before(e.Expires) {
		return e, nil
	}
	return broker.Envelope{}, errors.New("it is not one of the test's")
}
