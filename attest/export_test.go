package attest

// MaxID, MaxTrustDomain and MaxJWT are size limits in bytes.
const (
	MaxID          = maxID
	MaxTrustDomain = maxTrustDomain
	MaxJWT         = maxJWT
)

// Processors are those of a listener's handshakes.
type Processors = processors

// NewProcessors has a number of turns.
func NewProcessors(free int) *Processors { return &Processors{free: free} }

// Take is take for a connection that does not go.
func (p *processors) Take(address string, gone <-chan struct{}) bool { return p.take(address, gone) }

// Give is give.
func (p *processors) Give() { p.give() }

// Waiting returns how many handshakes wait, and how many turns are free.
func (p *processors) Waiting() (n, free int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.byAddress {
		n += at.Value.(*waiting).turns.Len()
	}
	return n, p.free
}

// Computing returns how many handshakes wait for a turn, and how many turns are free.
func (l *Bounded) Computing() (waiting, free int) { return l.processors.Waiting() }

// URINames is the parser of a certificate's names.
var URINames = uriNames
