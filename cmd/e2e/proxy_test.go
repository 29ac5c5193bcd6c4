package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// The requests that can get a fault. A star at the end matches any suffix.
const (
	mintPath  = "/v1/database/creds/pawl-db-read"
	childPath = "/v1/auth/token/create"
	tokenPath = "/v1/auth/token/create*"
	killPath  = "/v1/auth/token/revoke-accessor"
	gonePath  = "/v1/sys/leases/lookup"
)

// fault answers instead of Vault. real sends the request to Vault, and may be called from any goroutine.
type fault func(w http.ResponseWriter, r *http.Request, real func() *httptest.ResponseRecorder)

// proxy forwards to the real Vault, with a certificate of its own, and replaces chosen answers by faults. It keeps a
// copy of every token and secret that passes.
type proxy struct {
	server  *httptest.Server
	forward *httputil.ReverseProxy

	mu     sync.Mutex // guards the fields below
	path   string
	fault  fault
	asked  int             // requests for path since the fault was set
	passed map[string]bool // Vault tokens, passwords and private keys
}

func newProxy(t *testing.T, env *dev.Env) *proxy {
	t.Helper()
	base, err := url.Parse(env.Vault.Address())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(env.Vault.CAPEM())
	// The proxy terminates TLS, and Vault requires the client's certificate.
	asBroker := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		svid, err := env.Identities.X509SVID(dev.BrokerID)
		if err != nil {
			return nil, err
		}
		return &tls.Certificate{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}, nil
	}
	p := &proxy{passed: map[string]bool{}}
	p.forward = &httputil.ReverseProxy{
		Rewrite:        func(r *httputil.ProxyRequest) { r.SetURL(base) },
		Transport:      &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, GetClientCertificate: asBroker}},
		ModifyResponse: p.keep,
		// If Vault is down, so is the proxy.
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { panic(http.ErrAbortHandler) },
	}
	p.server = httptest.NewTLSServer(p)
	t.Cleanup(p.server.Close)
	return p
}

// spoil puts a fault on a path, once.
func (p *proxy) spoil(path string, f fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.path, p.fault, p.asked = path, f, 0
}

// requests gives the number of requests for the spoiled path.
func (p *proxy) requests() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var now fault
	p.mu.Lock()
	if token := r.Header.Get("X-Vault-Token"); token != "" {
		p.passed[token] = true
	}
	if prefix, any := strings.CutSuffix(p.path, "*"); r.URL.Path == prefix || any && strings.HasPrefix(r.URL.Path, prefix) {
		p.asked++
		now, p.fault = p.fault, nil
	}
	p.mu.Unlock()
	if now == nil {
		p.forward.ServeHTTP(w, r)
		return
	}
	body, _ := io.ReadAll(r.Body) // Vault refuses a truncated body
	now(w, r, func() *httptest.ResponseRecorder {
		answer := httptest.NewRecorder()
		again := r.Clone(context.WithoutCancel(r.Context())) // Vault continues after the broker has given up
		again.Body = io.NopCloser(bytes.NewReader(body))
		p.forward.ServeHTTP(answer, again)
		return answer
	})
}

// keep copies the secrets of an answer.
func (p *proxy) keep(answer *http.Response) error {
	raw, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	answer.Body = io.NopCloser(bytes.NewReader(raw))
	var made struct {
		Auth struct {
			Token string `json:"client_token"`
		}
		Data struct {
			Password   string
			PrivateKey string `json:"private_key"`
		}
	}
	_ = json.Unmarshal(raw, &made) // an answer of another shape has no secret
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, secret := range []string{made.Auth.Token, made.Data.Password, made.Data.PrivateKey} {
		if secret != "" {
			p.passed[secret] = true
		}
	}
	return nil
}

// use makes a broker reach Vault through the proxy.
func (p *proxy) use(t *testing.T, c *wire.Config) {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "proxy.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Vault.Address, c.Vault.CA = p.server.URL, ca
}

func status(code int) fault {
	return func(w http.ResponseWriter, _ *http.Request, real func() *httptest.ResponseRecorder) {
		real()
		w.WriteHeader(code)
		_, _ = io.WriteString(w, `{"errors":["internal error"]}`) // the broker may have hung up
	}
}

func body(change func(string) string) fault {
	return func(w http.ResponseWriter, _ *http.Request, real func() *httptest.ResponseRecorder) {
		_, _ = io.WriteString(w, change(real().Body.String())) // the broker may have hung up
	}
}

// member replaces one member of Vault's answer; nil removes it.
func member(t *testing.T, name string, value any) fault {
	return body(func(answer string) string {
		var all map[string]any
		if err := json.Unmarshal([]byte(answer), &all); err != nil {
			t.Errorf("Vault's answer is no object")
		}
		if all[name] = value; value == nil {
			delete(all, name)
		}
		raw, err := json.Marshal(all)
		if err != nil {
			t.Error(err)
		}
		return string(raw)
	})
}

// instead makes a fault happen without sending the request to Vault.
func instead(f fault) fault {
	return func(w http.ResponseWriter, r *http.Request, _ func() *httptest.ResponseRecorder) {
		f(w, r, func() *httptest.ResponseRecorder { return nil })
	}
}

func cut(w http.ResponseWriter, _ *http.Request, real func() *httptest.ResponseRecorder) {
	real()
	panic(http.ErrAbortHandler)
}

// drip sends the answer one byte at a time, and never completes it.
func drip(w http.ResponseWriter, r *http.Request, real func() *httptest.ResponseRecorder) {
	for _, b := range real().Body.Bytes() {
		if _, err := w.Write([]byte{b}); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush() // if it fails, so does the next write
		select {
		case <-r.Context().Done():
			return
		case <-tick():
		}
	}
}

const hugePiece = 1 << 20

func huge(w http.ResponseWriter, _ *http.Request, real func() *httptest.ResponseRecorder) {
	real()
	_, _ = io.WriteString(w, `{"data":{"username":"`) // the broker hangs up at its limit
	for range 200 {
		if _, err := io.WriteString(w, strings.Repeat("a", hugePiece)); err != nil {
			return
		}
	}
}
