package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// Host is an sshd that reads the revocation list.
type Host struct {
	Address string // host:port; required
	Key     string // its host key, as in known_hosts behind the name: "ssh-ed25519 AAAA…"; required
}

// host is a checked Host.
type host struct {
	address string
	key     ssh.PublicKey
}

func parseHosts(all []Host) ([]host, error) {
	var out []host
	for _, h := range all {
		if _, _, err := net.SplitHostPort(h.Address); err != nil {
			return nil, fmt.Errorf("host %q: the address must be host:port", h.Address)
		}
		key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(h.Key))
		if err != nil || len(rest) > 0 {
			return nil, fmt.Errorf("host %q: the host key must be a type and a key, such as ssh-ed25519 AAAA…", h.Address)
		}
		out = append(out, host{h.Address, key})
	}
	return out, nil
}

// queryTimeout bounds one query of an sshd.
const queryTimeout = 5 * time.Second

// errAsked is the refusal to sign. It ends a query.
var errAsked = errors.New("the query needs no signature")

// query is a signer for a certificate without its private key. SSH lets a client ask whether sshd accepts a certificate
// before it signs (RFC 4252, 7). sshd checks its revocation list for the answer.
type query struct {
	cert     *ssh.Certificate
	accepted bool
}

func (q *query) PublicKey() ssh.PublicKey { return q.cert }

func (q *query) Sign(io.Reader, []byte) (*ssh.Signature, error) {
	q.accepted = true
	return nil, errAsked
}

// accepts asks an sshd whether it would accept the certificate. It opens no session, and needs no private key. An error
// means that there is no answer.
func (h host) accepts(ctx context.Context, cert *ssh.Certificate) (bool, error) {
	q := &query{cert: cert}
	err := h.connect(ctx, cert.ValidPrincipals[0], ssh.PublicKeys(q))
	switch {
	case q.accepted:
		return true, nil
	case err == nil:
		return true, nil // it asks for no authentication at all
	case strings.Contains(err.Error(), "unable to authenticate") && strings.Contains(err.Error(), "publickey"):
		return false, nil
	}
	return false, err
}

// connect logs in, checks the host key, and closes the connection.
func (h host) connect(ctx context.Context, user string, auth ...ssh.AuthMethod) error {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", h.address)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing was sent that could be lost
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	algorithms := []string{h.key.Type()}
	if h.key.Type() == ssh.KeyAlgoRSA {
		algorithms = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	secure, channels, requests, err := ssh.NewClientConn(conn, h.address, &ssh.ClientConfig{User: user, Auth: auth,
		HostKeyCallback: ssh.FixedHostKey(h.key), HostKeyAlgorithms: algorithms, ClientVersion: "SSH-2.0-pawl"})
	if err != nil {
		return err
	}
	return ssh.NewClient(secure, channels, requests).Close()
}

// CheckHost connects to an sshd and checks its host key. It does not log in.
func CheckHost(ctx context.Context, h Host) error {
	hosts, err := parseHosts([]Host{h})
	if err != nil {
		return err
	}
	err = hosts[0].connect(ctx, "pawl")
	if err != nil && strings.Contains(err.Error(), "unable to authenticate") {
		return nil // it is the right host
	}
	return err
}

// maxWitnesses is the number of certificates that a prober keeps.
const maxWitnesses = 4096

// prober asks every host whether it refuses certificates on the list. A refusal shows that the host reads the list only
// if the host accepts such certificates from here otherwise. So the prober asks about a certificate that is not on the
// list yet, right before each write of the list. Safe for concurrent use.
type prober struct {
	hosts []host
	list  *list
	now   func() time.Time

	mu        sync.Mutex // guards the fields below; never held over the network
	witnesses map[string]*ssh.Certificate
	accepted  []map[string]bool // by host: whether it accepted each kind of certificate from here, right before the last write
	confirmed []uint64          // by host: the newest version of the list that it was seen to read
}

func newProber(hosts []host, l *list, now func() time.Time) *prober {
	p := &prober{hosts: hosts, list: l, now: now, witnesses: map[string]*ssh.Certificate{}, confirmed: make([]uint64, len(hosts))}
	for range hosts {
		p.accepted = append(p.accepted, map[string]bool{})
	}
	return p
}

// kind describes those properties of a certificate that decide, besides the list, whether a host accepts it from here.
func kind(cert *ssh.Certificate) string {
	return cert.ValidPrincipals[0] + " " + cert.CriticalOptions["source-address"] + " " + string(cert.SignatureKey.Marshal())
}

// margin is the remaining life that a certificate needs for a query: a refusal must not be for its end.
const margin = 2 * time.Second

func (p *prober) lives(cert *ssh.Certificate) bool {
	return uint64(p.now().Add(queryTimeout+margin).Unix()) < cert.ValidBefore
}

// keep remembers a certificate as a witness.
func (p *prober) keep(cert *ssh.Certificate) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.witnesses) >= maxWitnesses {
		for id, old := range p.witnesses {
			if !p.lives(old) {
				delete(p.witnesses, id)
			}
		}
	}
	if len(p.witnesses) < maxWitnesses {
		p.witnesses[cert.KeyId] = cert
	}
}

// maxKinds is the number of kinds of certificates about which a prober asks before one write of the list.
const maxKinds = 4

// firstWait bounds the queries before a write of the list. The write does not wait longer for a host that is away.
const firstWait = 2 * time.Second

// before asks the hosts about certificates that are going to be listed, one of each kind. A refusal after the write shows
// that a host reads the list only if the host accepted such a certificate right before it: a host that has no list for a
// moment refuses every key, and may get an old list back.
func (p *prober) before(ctx context.Context, ids map[string]time.Time) {
	ctx, cancel := context.WithTimeout(ctx, firstWait)
	defer cancel()
	asked := p.unlisted(ids)
	if len(asked) == 0 {
		return
	}
	var g errgroup.Group
	for n := range p.hosts {
		for _, cert := range asked {
			g.Go(func() error {
				ok, err := p.hosts[n].accepts(ctx, cert)
				p.mu.Lock()
				defer p.mu.Unlock()
				p.accepted[n][kind(cert)] = err == nil && ok
				return nil // without an answer the host is not confirmed
			})
		}
	}
	_ = g.Wait() // none of them fails
}

// unlisted returns certificates of different kinds that are not listed, and forgets what the hosts accepted before.
func (p *prober) unlisted(ids map[string]time.Time) (out []*ssh.Certificate) {
	p.mu.Lock()
	defer p.mu.Unlock()
	kinds := map[string]bool{}
	for id := range ids {
		cert := p.witnesses[id]
		if cert == nil || !p.lives(cert) || p.list.since(id) > 0 {
			continue
		}
		if k := kind(cert); !kinds[k] && len(out) < maxKinds {
			kinds[k] = true
			out = append(out, cert)
		}
	}
	if len(out) > 0 { // earlier answers do not count for the next write
		for n := range p.accepted {
			clear(p.accepted[n])
		}
	}
	return out
}

// verdict is the answer of the hosts about the list.
type verdict struct {
	accepting   string // a host that accepts a listed certificate; empty: none
	version     uint64 // all hosts read this version of the list or a newer one; zero: not all are known to read it
	unconfirmed string // a host that is not known to read it; empty: none
}

// ask asks each host about one listed certificate, unless the host was seen to read version already.
func (p *prober) ask(ctx context.Context, version uint64) (v verdict) {
	answers := make([]broker.Outcome, len(p.hosts))
	var g errgroup.Group
	g.SetLimit(8)
	for n := range p.hosts {
		g.Go(func() error { answers[n] = p.askOne(ctx, n, version); return nil })
	}
	_ = g.Wait() // none of them fails
	p.mu.Lock()
	defer p.mu.Unlock()
	v.version = slices.Min(p.confirmed)
	for n, answer := range answers {
		switch {
		case answer == broker.OutcomeAlive:
			v.accepting = p.hosts[n].address
		case p.confirmed[n] < version:
			v.unconfirmed = p.hosts[n].address
		}
	}
	return v
}

func (p *prober) askOne(ctx context.Context, n int, version uint64) broker.Outcome {
	cert, listed := p.witness(n, version)
	if cert == nil {
		return broker.OutcomeUnknown
	}
	ok, err := p.hosts[n].accepts(ctx, cert)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil:
		return broker.OutcomeUnknown
	case ok:
		p.confirmed[n] = 0
		return broker.OutcomeAlive
	case p.accepted[n][kind(cert)]:
		p.confirmed[n] = max(p.confirmed[n], listed)
	}
	return broker.OutcomeDead
}

// witness returns the certificate that was listed last, and the version that listed it. It prefers a kind that the host
// has accepted. It returns nil if the host was seen to read version already.
func (p *prober) witness(n int, version uint64) (best *ssh.Certificate, listed uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.confirmed[n] >= version {
		return nil, 0
	}
	known := false
	for id, cert := range p.witnesses {
		since, accepted := p.list.since(id), p.accepted[n][kind(cert)]
		if since == 0 || !p.lives(cert) || known && !accepted {
			continue
		}
		if best == nil || accepted && !known || since > listed {
			best, listed, known = cert, since, accepted
		}
	}
	return best, listed
}
