package pki_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/pki"
)

type reader struct{ *api.Client }

func (r reader) Read(ctx context.Context, path broker.VaultPath) (map[string]any, error) {
	s, err := r.Logical().ReadWithContext(ctx, path.String())
	if err != nil || s == nil {
		return nil, err
	}
	return s.Data, nil
}

func (r reader) Fetch(ctx context.Context, path broker.VaultPath, limit int64) ([]byte, error) {
	resp, err := r.Logical().ReadRawWithContext(ctx, path.String())
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	return io.ReadAll(io.LimitReader(resp.Body, limit))
}

func (r reader) List(ctx context.Context, path broker.VaultPath) (map[string]map[string]any, error) {
	s, err := r.Logical().ListWithContext(ctx, path.String())
	if err != nil || s == nil {
		return nil, err
	}
	infos, _ := s.Data["key_info"].(map[string]any)
	names := map[string]map[string]any{}
	for _, k := range s.Data["keys"].([]any) {
		names[k.(string)], _ = infos[k.(string)].(map[string]any)
	}
	return names, nil
}

func (r reader) OCSP(ctx context.Context, mount string, request []byte) ([]byte, error) {
	req := r.NewRequest(http.MethodPost, "/v1/"+mount+"/ocsp")
	req.BodyBytes = request
	req.Headers = http.Header{"Content-Type": {"application/ocsp-request"}}
	//lint:ignore SA1019 Logical sends JSON only, and OCSP is not JSON
	resp, err := r.RawRequestWithContext(ctx, req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
}

type none struct{}

func (none) Read(context.Context, broker.VaultPath) (map[string]any, error) {
	return nil, errors.New("down")
}

func (none) Fetch(context.Context, broker.VaultPath, int64) ([]byte, error) {
	return nil, errors.New("down")
}

func (none) List(context.Context, broker.VaultPath) (map[string]map[string]any, error) {
	return nil, errors.New("down")
}

func (none) OCSP(context.Context, string, []byte) ([]byte, error) { return nil, errors.New("down") }

func newBackend(t *testing.T, v pki.Reader) *pki.Backend {
	t.Helper()
	b, err := pki.New(pki.Config{Vault: v})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tool(settings map[string]string, args ...string) broker.Tool {
	t := broker.Tool{Name: "cert", Backend: "pki", Narrowing: broker.NarrowNative, Path: brokertest.Path("pki/agent"), Settings: settings,
		Arguments: map[string]broker.Parameter{}}
	for _, a := range args {
		name, kind, _ := strings.Cut(a, ":")
		t.Arguments[name] = broker.Parameter{Kind: kind, Required: true}
	}
	return t
}

func TestLoad(t *testing.T) {
	b := newBackend(t, none{})
	good := map[string]string{"arg.name": "common_name,alt_names", "uri_sans": "spiffe://example.org/a"}
	noRole := tool(good, "name:string")
	noRole.Path = brokertest.Path("pki")
	optional := tool(good)
	optional.Arguments["name"] = broker.Parameter{Kind: "string"}
	for i, row := range []struct {
		tool broker.Tool
		ok   bool
	}{
		{tool(good, "name:string"), true},
		{tool(map[string]string{"arg.names": "alt_names", "usage": "server"}, "names:list"), true},
		{tool(map[string]string{"common_name": "a.example.org"}), true},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "handshake"}), true},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "resume 24h"}), true},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "resume-unlisted 10m"}), true},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "resume"}), false},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "resume 25h"}), false},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "resume 0s"}), false},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "handshake 1h"}), false},
		{tool(map[string]string{"common_name": "a.example.org", "peers": "nginx"}), false},
		{tool(map[string]string{"usage": "client", "peers": "handshake"}), false},
		{tool(map[string]string{"common_name": "a.example.org", "revocation": "list", "peers": "resume-unlisted 10m"}), true},
		{tool(map[string]string{"common_name": "a.example.org", "revocation": "ocsp", "peers": "resume 10m"}), true},
		{tool(map[string]string{"common_name": "a.example.org", "revocation": "ocsp", "peers": "resume-unlisted 10m"}), false},
		{tool(map[string]string{"common_name": "a.example.org", "revocation": "both"}), false},
		{tool(map[string]string{"revocation": "ocsp"}), false},
		{tool(good), false}, {tool(good, "name:integer"), false}, {optional, false}, {noRole, false},
		{tool(good, "name:string", "other:string"), false},
		{tool(map[string]string{"usage": "client"}), false}, {tool(nil), false},
		{tool(map[string]string{"common_name": "a.example.org", "usage": "any"}), false},
		{tool(map[string]string{"common_name": "a.example.org,b.example.org"}), false},
		{tool(map[string]string{"common_name": "*.example.org"}), false},
		{tool(map[string]string{"common_name": "{{name}}.example.org", "arg.name": "alt_names"}, "name:string"), false},
		{tool(map[string]string{"arg.name": "ou"}, "name:string"), false},
		{tool(map[string]string{"arg.name": "alt_names", "alt_names": "a"}, "name:string"), false},
		{tool(map[string]string{"arg.names": "common_name"}, "names:list"), false},
		{tool(map[string]string{"common_name": "a", "color": "red"}), false},
	} {
		if err := b.Load(row.tool); (err == nil) != row.ok {
			t.Errorf("row %d: Load(%v) = %v, want ok %v", i, row.tool.Settings, err, row.ok)
		}
	}
}

// TestArguments checks that one argument is one name. Vault splits lists at commas.
func TestArguments(t *testing.T) {
	b := newBackend(t, none{})
	for field, rows := range map[string]map[string]bool{
		"alt_names": {"a.example.org": true, "a.example.org,evil.example.org": false, "*.example.org": false, "": false, "A.example.org": false,
			"a..b": false, ".a": false, "a b": false, "a\x00": false, "é.example.org": false, strings.Repeat("a", 254): false},
		"uri_sans": {"spiffe://example.org/a": true, "spiffe://example.org/a,spiffe://example.org/b": false, "a": false, "spiffe://example.org/*": false, "spiffe://example.org/a b": false},
		"ip_sans":  {"10.0.0.1": true, "::1": true, "10.0.0.1,10.0.0.2": false, "10.0.0.0/8": false, "010.0.0.1": false},
	} {
		for value, ok := range rows {
			args, err := args.New(map[string]args.Value{"x": args.String(value)})
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = b.Prepare(t.Context(), tool(map[string]string{"arg.x": field}, "x:string"),
				broker.Grant{ID: "gr1", Args: args, Expires: time.Now().Add(time.Minute)})
			if (err == nil) != ok || err != nil && !errors.Is(err, broker.Malformed) {
				t.Errorf("Prepare(%s = %q) = %v, want ok %v", field, value, err, ok)
			}
		}
	}
}

// engine is a real pki engine.
type engine struct {
	*api.Client
	mount string
	roots *x509.CertPool
}

var count atomic.Int64

func newEngine(t *testing.T, role map[string]any) *engine {
	t.Helper()
	c, err := parts.NeedVault(t).Client()
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{Client: c, mount: fmt.Sprintf("pki-%d", count.Add(1)), roots: x509.NewCertPool()}
	e.write(t, "sys/mounts/"+e.mount, map[string]any{"type": "pki", "config": map[string]any{"max_lease_ttl": "24h"}})
	root := e.write(t, e.mount+"/root/generate/internal", map[string]any{"common_name": "test", "key_type": "ec", "ttl": "24h"})
	e.roots.AppendCertsFromPEM([]byte(root.Data["certificate"].(string)))
	e.write(t, e.mount+"/roles/agent", role)
	return e
}

func (e *engine) write(t *testing.T, path string, data map[string]any) *api.Secret {
	t.Helper()
	s, err := e.Logical().WriteWithContext(t.Context(), path, data)
	if err != nil {
		t.Fatalf("writing %q: %v", path, err)
	}
	return s
}

// role issues client certificates and adds nothing to the request.
func role(more map[string]any) map[string]any {
	r := map[string]any{"generate_lease": true, "key_type": "ec", "allow_any_name": true, "allowed_uri_sans": "spiffe://example.org/*",
		"require_cn": false, "server_flag": false, "client_flag": true, "max_ttl": "1h"}
	for k, v := range more {
		r[k] = v
	}
	return r
}

// issued is a secret as the agent receives it, with Vault's lease.
type issued struct {
	Certificate string `json:"certificate"`
	PrivateKey  string `json:"private_key"`
	Serial      string `json:"serial_number"`
	lease       string
	finished    broker.Finished
}

func (e *engine) issue(t *testing.T, b *pki.Backend, uri string) (issued, error) {
	t.Helper()
	return e.issueFor(t, b, uri, "list")
}

// issueFor is issue for servers that learn of a revocation in this way.
func (e *engine) issueFor(t *testing.T, b *pki.Backend, uri, revocation string) (issued, error) {
	t.Helper()
	args, err := args.New(map[string]args.Value{"id": args.String(uri)})
	if err != nil {
		t.Fatal(err)
	}
	tl := tool(map[string]string{"arg.id": "uri_sans", "common_name": "agent.example.org", "revocation": revocation}, "id:string")
	tl.Path = brokertest.Path(e.mount + "/agent")
	m, _, err := b.Prepare(t.Context(), tl, broker.Grant{ID: "gr1", Args: args, Expires: time.Now().Add(time.Minute)})
	if err != nil {
		t.Fatalf("Prepare() = %v", err)
	}
	s := e.write(t, m.Path.String(), m.Data)
	if s.LeaseID == "" || time.Duration(s.LeaseDuration)*time.Second > m.TTL {
		t.Errorf("lease %q of %d s, want one within %v", s.LeaseID, s.LeaseDuration, m.TTL)
	}
	f, err := m.Finish(s.Data, time.Time{})
	if err != nil {
		return issued{}, err
	}
	out := issued{lease: s.LeaseID, finished: f}
	err = json.Unmarshal(f.Secret.Reveal(), &out)
	var members struct {
		Certificate string `json:"certificate"`
		PrivateKey  string `json:"private_key"`
	}
	if json.Unmarshal(f.Secret.Reveal(), &members) != nil || !slices.Equal(f.Digests, []broker.ValueDigest{broker.DigestValue(members.Certificate), broker.DigestValue(members.PrivateKey)}) {
		t.Errorf("Finish() returns the digests %v, want those of certificate and key", f.Digests)
	}
	return out, err
}

// TestRealExact checks that a certificate is rejected when the role adds to the request.
func TestRealExact(t *testing.T) {
	for name, more := range map[string]map[string]any{
		"server usage too": {"server_flag": true},
		"another usage":    {"ext_key_usage": "CodeSigning"},
	} {
		e := newEngine(t, role(more))
		if _, err := e.issue(t, newBackend(t, reader{e.Client}), "spiffe://example.org/a"); err == nil {
			t.Errorf("a certificate with %s was accepted", name)
		}
	}
}

// TestRealOther checks that another step's certificate is rejected.
func TestRealOther(t *testing.T) {
	e := newEngine(t, role(nil))
	b := newBackend(t, reader{e.Client})
	prepare := func(settings map[string]string) broker.Mint {
		tl := tool(settings)
		tl.Path = brokertest.Path(e.mount + "/agent")
		m, _, err := b.Prepare(t.Context(), tl, broker.Grant{ID: "gr1", Expires: time.Now().Add(time.Minute)})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	want := prepare(map[string]string{"common_name": "a", "uri_sans": "spiffe://example.org/a"})
	for _, other := range []map[string]string{
		{"common_name": "a", "uri_sans": "spiffe://example.org/b"},
		{"common_name": "a", "uri_sans": "spiffe://example.org/a,spiffe://example.org/b"},
		{"common_name": "b", "uri_sans": "spiffe://example.org/a"},
		{"common_name": "a", "uri_sans": "spiffe://example.org/a", "alt_names": "a"},
		{"common_name": "a", "uri_sans": "spiffe://example.org/a", "ip_sans": "10.0.0.1"},
	} {
		m := prepare(other)
		if _, err := want.Finish(e.write(t, m.Path.String(), m.Data).Data, time.Time{}); err == nil {
			t.Errorf("Finish() accepted a certificate for %v", other)
		}
	}
}

// TestRealNarrow makes out-of-scope calls with the raw secret. The TLS peer refuses each.
func TestRealNarrow(t *testing.T) {
	e := newEngine(t, role(nil))
	s, err := e.issue(t, newBackend(t, reader{e.Client}), "spiffe://example.org/orders/read")
	if err != nil {
		t.Fatalf("issue = %v", err)
	}
	pair, err := tls.X509KeyPair([]byte(s.Certificate), []byte(s.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	demand := func(id string) *tls.Config { // a server of the service that id names
		return &tls.Config{Certificates: []tls.Certificate{e.serverPair(t)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: e.roots,
			VerifyConnection: func(c tls.ConnectionState) error {
				if u := c.PeerCertificates[0].URIs; len(u) != 1 || u[0].String() != id {
					return errors.New("not this identity")
				}
				return nil
			}}
	}
	client := &tls.Config{RootCAs: e.roots, ServerName: "server.example.org", Certificates: []tls.Certificate{pair}}
	if err := handshake(t, client, demand("spiffe://example.org/orders/read")); err != nil {
		t.Fatalf("in scope: %v", err)
	}
	elsewhere := demand("spiffe://example.org/orders/read")
	elsewhere.ClientCAs = newEngine(t, role(nil)).roots
	grown := client.Clone() // a changed name breaks the certificate's signature
	grown.Certificates = []tls.Certificate{{Certificate: [][]byte{rename(pair.Certificate[0])}, PrivateKey: pair.PrivateKey}}
	stolen := client.Clone()
	stolen.Certificates = []tls.Certificate{{Certificate: pair.Certificate, PrivateKey: forge(t, pair, "spiffe://example.org/x").PrivateKey}}
	forged := client.Clone()
	forged.Certificates = []tls.Certificate{forge(t, pair, "spiffe://example.org/orders/write")}
	for name, pairOf := range map[string][2]*tls.Config{
		"another name":               {client, demand("spiffe://example.org/orders/write")},
		"a name forged with its key": {forged, demand("spiffe://example.org/orders/write")},
		"another authority":          {client, elsewhere},
		"its name changed":           {grown, demand("spiffe://example.org/orders/send")},
		"without its key":            {stolen, demand("spiffe://example.org/orders/read")},
		"acting as a server": {{RootCAs: e.roots, ServerName: "agent.example.org"},
			{Certificates: []tls.Certificate{pair}}},
	} {
		if err := handshake(t, pairOf[0], pairOf[1]); err == nil {
			t.Errorf("out of scope, %s: the handshake succeeded", name)
		}
	}
}

// serverPair returns the service's own certificate, issued by the same authority.
func (e *engine) serverPair(t *testing.T) tls.Certificate {
	t.Helper()
	e.write(t, e.mount+"/roles/server", map[string]any{"allow_any_name": true, "key_type": "ec", "client_flag": false})
	s := e.write(t, e.mount+"/issue/server", map[string]any{"common_name": "server.example.org", "ttl": "1h"})
	pair, err := tls.X509KeyPair([]byte(s.Data["certificate"].(string)), []byte(s.Data["private_key"].(string)))
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// forge signs a certificate for another name with the key of an issued one.
func forge(t *testing.T, by tls.Certificate, id string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(7), URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, by.Leaf, &key.PublicKey, by.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, by.Certificate[0]}, PrivateKey: key}
}

// rename replaces the name in a certificate by one of the same length.
func rename(der []byte) []byte {
	return bytes.Replace(der, []byte("orders/read"), []byte("orders/send"), 1)
}

// handshake sends one byte from server to client and returns the errors of both sides.
func handshake(t *testing.T, client, server *tls.Config) error {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
			_, err = conn.Write([]byte{1})
			_ = conn.Close()
		}
		done <- err
	}()
	conn, err := net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = io.ReadFull(tls.Client(conn, client), make([]byte, 1))
	_ = conn.Close()
	return errors.Join(err, <-done)
}

func TestRealProve(t *testing.T) {
	e := newEngine(t, role(nil))
	b := newBackend(t, reader{e.Client})
	s, err := e.issue(t, b, "spiffe://example.org/a")
	if err != nil {
		t.Fatal(err)
	}
	g := broker.Grant{ID: "gr1", Path: brokertest.Path(e.mount + "/agent"), Expires: time.Now().Add(time.Minute), Lease: broker.Lease{Ref: s.finished.Ref, Expires: s.finished.Expires}}
	lost, expired, unknown := g, g, g
	lost.Lease = broker.Lease{}
	expired.Expires, expired.Lease.Expires = time.Now().Add(-time.Minute), time.Now().Add(-time.Minute)
	unknown.Lease.Ref = "01:02"
	outcomes := func() string {
		ev, err := b.Prove(t.Context(), []broker.Grant{g, lost, expired, unknown})
		if err != nil {
			t.Fatalf("Prove() = %v", err)
		}
		var out []string
		for _, one := range ev {
			word := string(one.Outcome)
			if one.Listed {
				word += " by a list"
			}
			out = append(out, word)
		}
		return strings.Join(out, ",")
	}
	if got := outcomes(); got != "alive,,dead," {
		t.Errorf("Prove() before = %q", got)
	}
	e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
	if got := outcomes(); got != "dead by a list,,dead," {
		t.Errorf("Prove() after the lease's revocation = %q", got)
	}
	if _, err := newBackend(t, none{}).Prove(t.Context(), []broker.Grant{g}); err == nil {
		t.Error("Prove() with Vault down returned evidence")
	}
}
