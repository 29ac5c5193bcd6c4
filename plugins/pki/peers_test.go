package pki_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/pki"
)

// connection is a client's connection to a web server.
type connection struct {
	*tls.Conn
	in *bufio.Reader
}

func connect(t *testing.T, address string, config *tls.Config) (connection, error) {
	t.Helper()
	dialer := tls.Dialer{Config: config}
	conn, err := dialer.DialContext(t.Context(), "tcp", address)
	if err != nil {
		return connection{}, err
	}
	t.Cleanup(func() { _ = conn.Close() })
	return connection{conn.(*tls.Conn), bufio.NewReader(conn)}, nil
}

// accepted makes a request and reports whether the server accepted the client. With TLS 1.3 a server refuses a client
// after the client's handshake. nginx refuses by a status.
func (c connection) accepted() bool {
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprint(c, "GET /index.html HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		return false
	}
	response, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return false
	}
	_, err = io.Copy(io.Discard, response.Body)
	return err == nil && response.StatusCode == http.StatusOK
}

// visit makes one request over a new connection.
func visit(t *testing.T, address string, config *tls.Config) (accepted, resumed bool) {
	t.Helper()
	c, err := connect(t, address, config)
	if err != nil {
		return false, false
	}
	defer c.Close()
	accepted = c.accepted()
	return accepted, c.ConnectionState().DidResume
}

// until polls until f is true.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s did not come true", what)
		}
	}
}

// web is a web server that requires a client certificate.
type web interface {
	Address() string
	Replace(list []byte) error
}

// goWeb is a server of Go's standard library that checks its list as its documentation says.
type goWeb struct {
	net.Listener
	list chan *x509.RevocationList // holds the list in force
}

func newGoWeb(t *testing.T, config parts.TLSConfig) goWeb {
	t.Helper()
	pair, err := tls.X509KeyPair(config.Certificate, config.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(config.Authorities)
	w := goWeb{list: make(chan *x509.RevocationList, 1)}
	w.list <- nil
	if err := w.Replace(config.List); err != nil {
		t.Fatal(err)
	}
	// VerifyConnection runs for resumed sessions too; VerifyPeerCertificate does not.
	w.Listener, err = tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: roots,
		ClientAuth: tls.RequireAndVerifyClientCert, VerifyConnection: func(c tls.ConnectionState) error {
			l := <-w.list
			w.list <- l
			for _, e := range l.RevokedCertificateEntries {
				if e.SerialNumber.Cmp(c.PeerCertificates[0].SerialNumber) == 0 {
					return fmt.Errorf("revoked")
				}
			}
			return nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), ReadHeaderTimeout: time.Minute,
		ErrorLog: log.New(io.Discard, "", 0)}
	go func() { _ = server.Serve(w.Listener) }() // ends with Close
	t.Cleanup(func() { _ = server.Close() })
	return w
}

func (w goWeb) Address() string { return w.Addr().String() }

func (w goWeb) Replace(list []byte) error {
	block, _ := pem.Decode(list)
	l, err := x509.ParseRevocationList(block.Bytes)
	if err == nil {
		<-w.list
		w.list <- l
	}
	return err
}

// peer is a server of TestRealPeers with its expected behaviour.
type peer struct {
	program, name string
	settings      []string
	expired       bool   // it resumes the session of an expired certificate
	listed        bool   // it resumes the session of a certificate on the list
	peers         string // the tool's setting that says so

	server      web
	open        connection
	short, long *holder
}

// holder is a client with a certificate.
type holder struct {
	fresh *tls.Config // keeps no sessions
	warm  *tls.Config // keeps sessions
	grant broker.Grant
	lease string
}

// TestRealPeers holds docs/promises.md to real TLS servers: which of them resume the session of a certificate that has
// expired, and of one that is on the list in force, and by which settings they do not. By the tool's setting no
// certificate is dead with which a session can be resumed. It uses TLS 1.3.
func TestRealPeers(t *testing.T) {
	e := newEngine(t, role(nil))
	b := newBackend(t, reader{e.Client})
	e.write(t, e.mount+"/roles/server", map[string]any{"allow_any_name": true, "key_type": "ec", "client_flag": false})
	own := e.write(t, e.mount+"/issue/server", map[string]any{"common_name": "server.example.org", "ttl": "1h"})
	config := parts.TLSConfig{Certificate: fmt.Appendf(nil, "%s\n%s\n", own.Data["certificate"], own.Data["private_key"]),
		Authorities: e.der(t, e.mount+"/ca/pem"), List: asPEM(e.der(t, e.mount+"/crl"))}
	all := []*peer{
		{program: "nginx", name: "by default", expired: true, peers: "resume-unlisted 1h"},
		{program: "nginx", name: "with a ticket key", settings: []string{"ssl_session_ticket_key nginx.key;"},
			expired: true, listed: true, peers: "resume 1h"},
		{program: "nginx", name: "with a shared cache", settings: []string{"ssl_session_tickets off;", "ssl_session_cache shared:a:1m;"},
			expired: true, listed: true, peers: "resume 1h"},
		{program: "nginx", name: "without sessions", settings: []string{"ssl_session_tickets off;", "ssl_session_cache off;"}, peers: "handshake"},
		{program: "apache2", name: "by default", expired: true, peers: "resume-unlisted 1h"},
		{program: "apache2", name: "with a ticket key", settings: []string{"SSLSessionTicketKeyFile apache.key"},
			expired: true, listed: true, peers: "resume 1h"},
		{program: "apache2", name: "without sessions", settings: []string{"SSLSessionTickets off", "SSLSessionCache none"}, peers: "handshake"},
		{program: "haproxy", name: "by default", expired: true, peers: "resume-unlisted 1h"},
		{program: "haproxy", name: "with ticket keys", settings: []string{"bind tls-ticket-keys haproxy.keys"},
			expired: true, listed: true, peers: "resume 1h"},
		{program: "haproxy", name: "without sessions", settings: []string{"tune.ssl.cachesize 0", "bind no-tls-tickets"}, peers: "handshake"},
		{program: "go", name: "by default", peers: "handshake"},
	}
	late, err := pki.New(pki.Config{Vault: reader{e.Client}, Now: func() time.Time { return time.Now().Add(time.Minute) }})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all { // the first certificates end while the last servers start
		p.start(t, e, b, config)
	}
	for _, p := range all {
		t.Run(p.program+" "+p.name, func(t *testing.T) { p.check(t, e, b, late) })
	}
}

// start starts the server, and a session for each of two certificates.
func (p *peer) start(t *testing.T, e *engine, b *pki.Backend, config parts.TLSConfig) {
	t.Helper()
	config.Program, config.Settings = p.program, p.settings
	if p.program == "go" {
		p.server = newGoWeb(t, config)
	} else {
		p.server = parts.OwnTLS(t, config)
	}
	p.short, p.long = e.holder(t, b, p.peers, 4*time.Second), e.holder(t, b, p.peers, 10*time.Minute)
	for _, h := range []*holder{p.short, p.long} {
		if accepted, _ := visit(t, p.server.Address(), h.warm); !accepted {
			t.Fatalf("%s %s refuses a valid certificate", p.program, p.name)
		}
	}
	var err error
	if p.open, err = connect(t, p.server.Address(), p.short.fresh); err != nil || !p.open.accepted() {
		t.Fatalf("%s %s refuses a valid certificate: %v", p.program, p.name, err)
	}
}

// check ends the first certificate by its time, and the second by the list. The clock of late is a minute ahead: the
// backend allows that for the clocks of servers.
func (p *peer) check(t *testing.T, e *engine, b, late *pki.Backend) {
	p.refuses(t, "an expired certificate", p.short.fresh)
	if !p.open.accepted() {
		t.Error("an open connection ended with its certificate; docs/promises.md says otherwise")
	}
	p.session(t, late, "that has expired", p.short, p.expired)
	e.write(t, "sys/leases/revoke", map[string]any{"lease_id": p.long.lease, "sync": true})
	if err := p.server.Replace(asPEM(e.der(t, e.mount+"/crl"))); err != nil {
		t.Fatal(err)
	}
	p.refuses(t, "a revoked certificate", p.long.fresh)
	p.session(t, b, "that is on the list", p.long, p.listed)
}

// refuses waits until the server refuses new handshakes.
func (p *peer) refuses(t *testing.T, what string, config *tls.Config) {
	t.Helper()
	until(t, "the refusal of "+what, func() bool {
		accepted, _ := visit(t, p.server.Address(), config)
		return !accepted
	})
}

// session checks whether the server resumes a session, and that the certificate is dead only if not.
func (p *peer) session(t *testing.T, b *pki.Backend, what string, h *holder, resumes bool) {
	t.Helper()
	address, times := p.server.Address(), 0
	until(t, fmt.Sprintf("%v as the answer to the session of a certificate %s", resumes, what), func() bool {
		accepted, resumed := visit(t, address, h.warm)
		if accepted != resumes || resumes && !resumed {
			times = 0 // a process of before the reload may answer otherwise at first
			return false
		}
		times++ // each resumption gives a new ticket
		return times == 5
	})
	want := broker.OutcomeDead
	if resumes {
		want = broker.OutcomeUnknown
	}
	until(t, "the evidence for a certificate "+what, func() bool {
		evidence, err := b.Prove(t.Context(), []broker.Grant{h.grant})
		if err != nil || evidence[0].Outcome == broker.OutcomeDead && resumes {
			t.Fatalf("Prove() = %+v, %v, want %s", evidence, err, want)
		}
		return evidence[0].Outcome == want
	})
}

func asPEM(list []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: list}) }

// holder returns a client with a new certificate of a tool with this setting.
func (e *engine) holder(t *testing.T, b *pki.Backend, peers string, life time.Duration) *holder {
	t.Helper()
	tl := tool(map[string]string{"common_name": "agent.example.org", "peers": peers})
	tl.Path = brokertest.Path(e.mount + "/agent")
	g := broker.Grant{ID: "gr1", Path: brokertest.Path(e.mount + "/agent"), Expires: time.Now().Add(life)}
	m, _, err := b.Prepare(t.Context(), tl, g)
	if err != nil {
		t.Fatal(err)
	}
	s := e.write(t, m.Path.String(), m.Data)
	f, err := m.Finish(s.Data, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	g.Lease = broker.Lease{ID: s.LeaseID, Ref: f.Ref, Expires: f.Expires, Outlives: f.Outlives}
	pair, err := tls.X509KeyPair([]byte(s.Data["certificate"].(string)), []byte(s.Data["private_key"].(string)))
	if err != nil {
		t.Fatal(err)
	}
	fresh := &tls.Config{RootCAs: e.roots, ServerName: "server.example.org", Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}
	warm := fresh.Clone()
	warm.ClientSessionCache = &lastSession{}
	return &holder{fresh, warm, g, s.LeaseID}
}

// lastSession keeps the last session of one server, also after it failed.
type lastSession struct{ last *tls.ClientSessionState }

func (l *lastSession) Get(string) (*tls.ClientSessionState, bool) { return l.last, l.last != nil }

func (l *lastSession) Put(_ string, s *tls.ClientSessionState) {
	if s != nil {
		l.last = s
	}
}

// TestPeers checks the evidence for a certificate with sessions that outlive it.
func TestPeers(t *testing.T) {
	a := newAuthority(t)
	listed := vaultOf(a, a.sign(t, time.Now().Add(48*time.Hour), entry(258, 0)))
	unlisted := vaultOf(a, a.sign(t, time.Now().Add(48*time.Hour)))
	for _, row := range []struct {
		ref   string
		vault lists
		later time.Duration
		want  broker.Outcome
	}{
		{"", listed, 0, broker.OutcomeDead},                          // the list ends resumed sessions
		{"", listed, 2 * time.Minute, broker.OutcomeDead},            // past the end
		{"", unlisted, 0, broker.OutcomeAlive},                       // not on it
		{"", unlisted, 2 * time.Minute, broker.OutcomeUnknown},       // expired, and not on it
		{"", unlisted, 2 * time.Hour, broker.OutcomeDead},            // every session has ended
		{" resumed", listed, 0, broker.OutcomeUnknown},               // the list ends none
		{" resumed", listed, 2 * time.Minute, broker.OutcomeUnknown}, // nor does the end
		{" resumed", unlisted, 0, broker.OutcomeAlive},
		{" resumed", listed, 2 * time.Hour, broker.OutcomeDead},
	} {
		now := time.Now().Add(row.later)
		b, err := pki.New(pki.Config{Vault: row.vault, Now: func() time.Time { return now }})
		if err != nil {
			t.Fatal(err)
		}
		g := a.grant258()
		g.Lease.Ref, g.Lease.Outlives = g.Lease.Ref+row.ref, g.Lease.Expires.Add(time.Hour)
		evidence, err := b.Prove(t.Context(), []broker.Grant{g})
		if err != nil || evidence[0].Outcome != row.want || evidence[0].Outcome == broker.OutcomeUnknown && !strings.Contains(evidence[0].Answer, "setting peers") {
			t.Errorf("Prove(%q) %v later = %+v, %v, want %s", row.ref, row.later, evidence, err, row.want)
		}
	}
}
