package e2e_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// ca is an engine of a row with one authority.
type ca struct {
	*hunt
	root string // the authority's certificate
}

const huntCert = 12 * time.Second // the life of a certificate, after which a row may end

// authority mounts an engine with an authority, and gives it the roles of the agents and of servers.
func (h *hunt) authority() *ca {
	h.Helper()
	h.write("sys/mounts/"+h.id, map[string]any{"type": "pki"})
	made := h.write(h.id+"/root/generate/internal", map[string]any{"common_name": "First " + h.id, "issuer_name": "first", "key_type": "ec", "ttl": "24h"})
	root, _ := made.Data["certificate"].(string)
	for name, client := range map[string]bool{"agent": true, "server": false} {
		h.write(h.id+"/roles/"+name, map[string]any{"allow_any_name": true, "enforce_hostnames": false, "client_flag": client,
			"server_flag": !client, "key_type": "ec", "key_bits": 256, "generate_lease": client, "max_ttl": "1h", "issuer_ref": "first"})
	}
	return &ca{h, root}
}

// issue starts a broker with the tool's setting peers, and takes a certificate.
func (c *ca) issue(peers string) tls.Certificate {
	c.Helper()
	if peers != "" {
		peers = fmt.Sprintf(", peers: %q", peers)
	}
	c.broker(fmt.Sprintf(`
  - name: hunt
    backend: pki
    narrowing: native
    ttl: %s
    settings: {common_name: agent.pawl.dev%s}
    vault: {policy: pawl-tool-ID, path: ID/agent}`, huntCert, peers), map[string]wire.Backend{"pki": {Plugin: "pki"}})
	m := c.take(nil, 0)
	pair, err := tls.X509KeyPair([]byte(m["certificate"]), []byte(m["private_key"]))
	if err != nil {
		c.Fatal("the secret is no certificate with its key")
	}
	return pair
}

// issueOfTwo takes a certificate of an authority that is not the default one.
func (c *ca) issueOfTwo() tls.Certificate {
	c.Helper()
	c.write(c.id+"/root/generate/internal", map[string]any{"common_name": "Second", "issuer_name": "second", "key_type": "ec", "ttl": "24h"})
	c.write(c.id+"/config/issuers", map[string]any{"default": "second"})
	return c.issue("")
}

// lastList is the list of the first authority, in PEM.
func (c *ca) lastList() []byte {
	c.Helper()
	der := oracle{t: c.T, env: c.env}.fetch("/v1/" + c.id + "/issuer/first/crl/der")
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// delete deletes the first authority.
func (c *ca) delete() {
	c.Helper()
	if _, err := c.hunt.root.Logical().DeleteWithContext(c.Context(), c.id+"/issuer/first"); err != nil {
		c.Fatal(err)
	}
}

// list fetches the list of an engine as servers do, in PEM.
func (h *hunt) list(mount string) []byte {
	h.Helper()
	der := oracle{t: h.T, env: h.env}.fetch("/v1/" + mount + "/crl")
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// server starts a web server that lets in the authority's clients and checks a list, unless it is nil.
func (c *ca) server(program string, list []byte, settings ...string) *parts.TLSServer {
	c.Helper()
	own := c.write(c.id+"/issue/server", map[string]any{"common_name": "localhost", "ip_sans": "127.0.0.1", "ttl": "1h"})
	return parts.OwnTLS(c.T, parts.TLSConfig{Program: program, Authorities: []byte(c.root), List: list, Settings: settings,
		Certificate: fmt.Appendf(nil, "%s\n%s\n", own.Data["certificate"], own.Data["private_key"])})
}

// client is a client with the stolen certificate.
type client509 struct {
	*hunt
	address string
	tls     *tls.Config
}

func (h *hunt) client(address string, pair tls.Certificate, sessions tls.ClientSessionCache) client509 {
	return client509{h, address, &tls.Config{Certificates: []tls.Certificate{pair}, ClientSessionCache: sessions,
		ServerName: "localhost", InsecureSkipVerify: true}} //nolint:gosec // the client is the thief
}

// asks makes a request over a connection, and reports whether the server took it.
func (c client509) asks(transport http.RoundTripper) bool {
	answer, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Get("https://" + c.address + "/index.html")
	if err != nil {
		return false
	}
	defer answer.Body.Close() //nolint:errcheck // it was only read
	_, err = io.Copy(io.Discard, answer.Body)
	return err == nil && answer.StatusCode == http.StatusOK
}

// visits is a way: a request over a new connection.
func (c client509) visits() bool {
	transport := &http.Transport{TLSClientConfig: c.tls, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	return c.asks(transport)
}

// stays is a way: a request over a connection that stays open. A second connection has no certificate.
func (c client509) stays() func() bool {
	first := true
	config := c.tls.Clone()
	config.Certificates = nil
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if !first {
			return &tls.Certificate{}, nil
		}
		first = false
		return &c.tls.Certificates[0], nil
	}
	transport := &http.Transport{TLSClientConfig: config, MaxConnsPerHost: 1}
	c.Cleanup(transport.CloseIdleConnections)
	return func() bool { return c.asks(transport) }
}

// onList reports whether a list has a certificate, and for a list that is none that it has.
func onList(list []byte, serial *big.Int) bool {
	block, _ := pem.Decode(list)
	parsed, err := x509.ParseRevocationList(block.Bytes)
	return err != nil || slices.ContainsFunc(parsed.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool {
		return e.SerialNumber.Cmp(serial) == 0
	})
}

// fresh starts a server that fetches the list of an engine at each handshake.
func (c *ca) fresh(mount func() string) string {
	c.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(c.root))
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert,
		VerifyConnection: func(s tls.ConnectionState) error {
			if onList(c.list(mount()), s.PeerCertificates[0].SerialNumber) {
				return errors.New("revoked")
			}
			return nil
		}}
	server.StartTLS()
	c.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// responder serves an engine's OCSP responder without TLS, as servers want it.
func (c *ca) responder() string {
	c.Helper()
	to, err := url.Parse(c.env.Vault.Address())
	if err != nil {
		c.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.env.Vault.CAPEM())
	proxy := &httputil.ReverseProxy{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, //nolint:gosec // the default
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to); r.Out.URL.Path = "/v1/" + c.id + "/ocsp" + r.In.URL.Path }}
	server := httptest.NewServer(proxy)
	c.Cleanup(server.Close)
	return server.URL
}

// openssl is a way: openssl accepts the certificate with a clock that lags, and by a list unless that is nil.
func (c *ca) openssl(pair tls.Certificate, list []byte, lag time.Duration) func() bool {
	c.Helper()
	program, err := exec.LookPath("openssl")
	if err != nil {
		parts.Without(c.T, "openssl", "install the package openssl")
	}
	dir := c.TempDir()
	for name, raw := range map[string][]byte{"ca.pem": []byte(c.root), "crl.pem": list,
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})} {
		c.must(os.WriteFile(filepath.Join(dir, name), raw, 0o600))
	}
	args := []string{"-CAfile", filepath.Join(dir, "ca.pem")}
	if list != nil {
		args = append(args, "-crl_check", "-CRLfile", filepath.Join(dir, "crl.pem"))
	}
	return func() bool {
		all := append([]string{"verify", "-attime", strconv.FormatInt(time.Now().Add(-lag).Unix(), 10)}, args...)
		out, err := exec.CommandContext(c.Context(), program, append(all, filepath.Join(dir, "cert.pem"))...).CombinedOutput()
		return err == nil && bytes.Contains(out, []byte("OK"))
	}
}

// resumes is a way: the session of an earlier visit goes on although no new client with the certificate gets in.
func (c client509) resumes() bool {
	config := c.tls.Clone()
	config.Certificates = nil // a full handshake fails
	return client509{c.hunt, c.address, config}.visits()
}

// keptSession keeps the last session of one server, also after it failed.
type keptSession struct {
	mu   sync.Mutex // guards last
	last *tls.ClientSessionState
}

func (k *keptSession) Get(string) (*tls.ClientSessionState, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.last, k.last != nil
}

func (k *keptSession) Put(_ string, s *tls.ClientSessionState) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s != nil {
		k.last = s
	}
}

// resumed is a quarry of a server that resumes sessions by keys of a file, also of certificates on its list.
func resumed(program string, settings ...string) func(*hunt) quarry {
	return func(h *hunt) quarry {
		c := h.authority()
		server := c.server(program, h.list(h.id), settings...)
		pair := c.issue("resume 4s")
		client := h.client(server.Address(), pair, &keptSession{})
		h.until("the first visit", client.visits)
		return quarry{ways: map[string]func() bool{"a new connection": h.client(server.Address(), pair, nil).visits,
			"a resumed session": client.resumes},
			mend: func() {
				h.until("the list of Vault has the certificate", func() bool { return onList(h.list(h.id), pair.Leaf.SerialNumber) })
				h.must(server.Replace(h.list(h.id)))
				h.until("a new connection is refused", func() bool { return !h.client(server.Address(), pair, nil).visits() })
				h.until("the session is resumed after the new list", client.resumes)
				h.must(server.Kill()) // before a start with other keys
			}}
	}
}

var huntCertificates = []huntRow{
	{plugin: "pki", name: "authority deleted", end: broker.ClosureUnknown,
		why: "Vault books the certificate on another authority's list, and servers have the last list of its own",
		set: func(h *hunt) quarry {
			c := h.authority()
			accepts := c.openssl(c.issueOfTwo(), c.lastList(), 0)
			return quarry{ways: map[string]func() bool{"openssl with the last list": accepts}, change: c.delete}
		}},
	{plugin: "pki", name: "a server whose clock lags", unnamed: true, end: broker.ClosurePartial,
		why: "the certificate has expired by the broker's clock, is on no list, and is good by the server's clock",
		set: func(h *hunt) quarry {
			c := h.authority()
			pair := c.issueOfTwo()
			accepts := c.openssl(pair, nil, 20*time.Second)
			return quarry{ways: map[string]func() bool{"openssl": accepts}, change: func() {
				c.delete()
				h.until("the certificate's end", func() bool { return time.Since(pair.Leaf.NotAfter) > 4*time.Second })
			}}
		}},
	{plugin: "pki", name: "list lags", end: broker.ClosureClosed,
		why: "Vault has recorded the revocation, and the list that it serves is made an hour later",
		set: func(h *hunt) quarry {
			c := h.authority()
			h.write(h.id+"/config/crl", map[string]any{"auto_rebuild": true, "auto_rebuild_grace_period": "1h", "expiry": "72h"})
			pair := c.issue("")
			return quarry{ways: map[string]func() bool{"a server with the newest list": h.client(c.fresh(func() string { return h.id }), pair, nil).visits}}
		}},
	{plugin: "pki", name: "no lists, and nginx asks by OCSP", end: broker.ClosureClosed,
		why: "the list is empty for good, and only the responder knows the certificate",
		set: func(h *hunt) quarry {
			c := h.authority()
			h.write(h.id+"/config/crl", map[string]any{"disable": true, "ocsp_disable": false})
			server := c.server("nginx", nil, "ssl_ocsp leaf; ssl_ocsp_responder "+c.responder()+";")
			return quarry{ways: map[string]func() bool{"nginx": h.client(server.Address(), c.issue(""), nil).visits}}
		}},
	{plugin: "pki", name: "nginx caches OCSP", end: broker.ClosureClosed,
		why: "nginx has the responder's answer from before the revocation, and uses it for hours",
		set: func(h *hunt) quarry {
			c := h.authority()
			h.write(h.id+"/config/crl", map[string]any{"ocsp_disable": false, "ocsp_expiry": "12h"})
			server := c.server("nginx", nil, "ssl_ocsp leaf; ssl_ocsp_cache shared:ocsp:1m; ssl_ocsp_responder "+c.responder()+";")
			return quarry{ways: map[string]func() bool{"nginx": h.client(server.Address(), c.issue("resume 3s"), nil).visits}}
		}},
	{plugin: "pki", name: "nginx with an old list", end: broker.ClosureClosed,
		why: "the server has a copy of the list from before the revocation",
		set: func(h *hunt) quarry {
			c := h.authority()
			server := c.server("nginx", h.list(h.id))
			return quarry{ways: map[string]func() bool{"nginx": h.client(server.Address(), c.issue("resume 3s"), nil).visits}}
		}},
	{plugin: "pki", name: "nginx keeps a connection", end: broker.ClosureClosed,
		why: "a connection that was opened before the revocation is not checked again",
		set: func(h *hunt) quarry {
			c := h.authority()
			server := c.server("nginx", h.list(h.id), "keepalive_time 4s;")
			client := h.client(server.Address(), c.issue("resume 2s"), nil)
			return quarry{ways: map[string]func() bool{"an open connection": client.stays()}}
		}},
	{plugin: "pki", name: "Apache resumes a listed certificate", end: broker.ClosureClosed,
		why: "the session goes on by a ticket although its certificate is on the server's list",
		set: resumed("apache2", "SSLSessionTicketKeyFile apache.key")},
	{plugin: "pki", name: "HAProxy resumes a listed certificate", end: broker.ClosureClosed,
		why: "the session goes on by a ticket although its certificate is on the server's list",
		set: resumed("haproxy", "bind tls-ticket-keys haproxy.keys")},
	{plugin: "pki", name: "engine moved", unnamed: true, end: broker.ClosureUnknown,
		why: "another engine is mounted at the path, and servers have the list of the one that made the certificate",
		set: func(h *hunt) quarry {
			c := h.authority()
			last := h.list(h.id)
			accepts := c.openssl(c.issue(""), last, 0)
			return quarry{ways: map[string]func() bool{"openssl with the last list": accepts}, change: func() {
				h.write("sys/remount", map[string]any{"from": h.id, "to": "old-" + h.id})
				h.until("the mount is free", func() bool {
					_, err := h.root.Logical().WriteWithContext(h.Context(), "sys/mounts/"+h.id, map[string]any{"type": "pki"})
					return err == nil
				})
				h.write(h.id+"/root/generate/internal", map[string]any{"common_name": "Second", "key_type": "ec", "ttl": "24h"})
			}}
		}},
	{plugin: "pki", name: "two engines with one authority", unnamed: true, end: broker.ClosureClosed,
		why: "the authority is in a second engine too, and servers read that one's list, which has the same issuer",
		set: func(h *hunt) quarry {
			c := h.authority()
			exported := h.write(h.id+"/root/rotate/exported", map[string]any{"common_name": "First " + h.id, "issuer_name": "shared", "key_type": "ec", "ttl": "24h"})
			c.root, _ = exported.Data["certificate"].(string)
			h.write(h.id+"/roles/agent", map[string]any{"allow_any_name": true, "enforce_hostnames": false, "client_flag": true,
				"server_flag": false, "key_type": "ec", "key_bits": 256, "generate_lease": true, "max_ttl": "1h", "issuer_ref": "shared"})
			h.write("sys/mounts/other-"+h.id, map[string]any{"type": "pki"})
			h.write("other-"+h.id+"/issuers/import/bundle", map[string]any{
				"pem_bundle": fmt.Sprintf("%s\n%s\n", exported.Data["certificate"], exported.Data["private_key"])})
			pair := c.issue("resume 3s")
			server := c.fresh(func() string { return "other-" + h.id })
			return quarry{ways: map[string]func() bool{"a server with the other list": h.client(server, pair, nil).visits}}
		}},
}
