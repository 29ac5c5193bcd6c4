package e2e_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/dev"
)

// errorBodies keeps a copy of every refusal that an agent gets.
type errorBodies struct {
	http.RoundTripper
	bearer string // JWT-SVID; empty: none

	mu   sync.Mutex // guards text
	text bytes.Buffer
	n    int
}

func (e *errorBodies) RoundTrip(r *http.Request) (*http.Response, error) {
	if e.bearer != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+e.bearer)
	}
	answer, err := e.RoundTripper.RoundTrip(r)
	if err != nil || answer.StatusCode < 400 {
		return answer, err
	}
	raw, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, err
	}
	answer.Body = io.NopCloser(bytes.NewReader(raw))
	e.mu.Lock()
	defer e.mu.Unlock()
	e.n++
	e.text.Write(raw)
	return answer, nil
}

// needles are the bytes that must not appear anywhere, by a readable name.
type needles map[string][]byte

func (n needles) add(name string, secret []byte) {
	if len(secret) < 12 {
		panic("a needle so short proves nothing")
	}
	n[name] = bytes.Clone(secret)
}

// addPEM adds a line from the middle of a PEM text, and the bytes that it encodes.
func (n needles) addPEM(name, text string) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		panic("not PEM")
	}
	n.add(name+", a line", []byte(strings.Split(text, "\n")[2]))
	n.add(name+", the bytes", block.Bytes)
}

// find gives the names of the needles in a haystack, in clear text or in base64.
func (n needles) find(haystack []byte) (found []string) {
	for name, needle := range n {
		for _, form := range [][]byte{needle, []byte(base64.RawStdEncoding.EncodeToString(needle)), []byte(base64.RawURLEncoding.EncodeToString(needle))} {
			if bytes.Contains(haystack, form) {
				found = append(found, name)
				break
			}
		}
	}
	return found
}

// TestNeedlesAreFound checks the search of the next test.
func TestNeedlesAreFound(t *testing.T) {
	n := needles{}
	n.add("a", []byte("a secret of ours"))
	for hay, want := range map[string]int{
		"x a secret of ours y": 1, "x a secret of mine y": 0, `{"k":"` + base64.StdEncoding.EncodeToString(n["a"]) + `"}`: 1,
	} {
		if found := n.find([]byte(hay)); len(found) != want {
			t.Errorf("find(%q) = %v, want %d", hay, found, want)
		}
	}
}

// TestSecretsAreNowhere plays steps, denials, violations and a failing Vault. Then it searches everything that was
// stored, logged or answered for every secret, token and SVID of the run.
func TestSecretsAreNowhere(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	w := newWorld(t, env, nil)
	p := newProxy(t, env)
	p.use(t, &w.config)
	w.config.SigningKey = signingKey(t)
	log := &logBuffer{}
	s := w.here(slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})), nil)
	kept := needles{}
	plain, bearer := w.tapped(t, kept, false), w.tapped(t, kept, true)
	refused := w.playAll(t, p, kept, plain.client)
	refused += w.playAll(t, p, kept, bearer.client)
	if n := plain.n + bearer.n; n < refused {
		t.Errorf("%d refusals were captured, want %d", n, refused)
	}
	w.allClosed(4 * bound)

	p.mu.Lock()
	for secret := range p.passed {
		if name := fmt.Sprintf("secret %d that passed the proxy", len(kept)); strings.HasPrefix(secret, "-----BEGIN") {
			kept.addPEM(name, secret)
		} else {
			kept.add(name, []byte(secret))
		}
	}
	p.mu.Unlock()
	kept.add("Vault's root token", []byte(env.Vault.RootToken()))
	kept.add("the note in Vault", []byte("kept in a drawer"))
	hay := map[string][]byte{
		"audit entries": w.audit(t), "revocations and grants": w.views(t), "metrics": w.metrics(t), "report": w.report(t),
		"refusals": append(plain.text.Bytes(), bearer.text.Bytes()...),
	}
	s.Close()
	hay["log"] = []byte(log.String())
	files, err := filepath.Glob(filepath.Join(filepath.Dir(w.config.Ledger), "*"))
	if err != nil || len(files) < 2 {
		t.Fatalf("the broker's directory has %v, %v", files, err)
	}
	for _, f := range files {
		if raw, err := os.ReadFile(f); err == nil { // the socket cannot be read
			hay["file "+filepath.Base(f)] = raw
		}
	}
	if len(kept) < 30 {
		t.Errorf("only %d secrets were captured", len(kept))
	}
	for where, text := range hay {
		if len(text) == 0 {
			t.Errorf("%s: nothing to search", where)
		}
		for _, name := range kept.find(text) {
			t.Errorf("%s: holds %s", where, name)
		}
	}
	t.Logf("searched for %d secrets in %d places", len(kept), len(hay))
}

// signingKey writes a key for reports.
func signingKey(t *testing.T) string {
	t.Helper()
	private, _, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(private)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "report-key.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// tapped is an agent's client that keeps its refusals.
type tapped struct {
	*errorBodies
	client *agent.Client
}

func (w *world) tapped(t *testing.T, kept needles, jwt bool) tapped {
	t.Helper()
	id := dev.Agent("planner")
	source := w.env.Identities.Source(id)
	config := tlsconfig.TLSClientConfig(source, tlsconfig.AuthorizeID(dev.BrokerID))
	e := &errorBodies{}
	if jwt {
		token, err := w.env.Identities.JWTSVID(id, "pawl")
		if err != nil {
			t.Fatal(err)
		}
		e.bearer = token
		kept.add("JWT-SVID", []byte(token))
		kept.add("signature of the JWT-SVID", []byte(token[strings.LastIndex(token, ".")+1:]))
	} else {
		config = tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(dev.BrokerID))
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		kept.add("the agent's private key", key)
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	e.RoundTripper = transport
	return tapped{e, newAgent(t, agent.Config{Address: "https://" + w.config.Listen.Agents, HTTPClient: &http.Client{Transport: e}})}
}

// playAll takes steps with every tool, is refused for every reason, and gives the number of refusals.
func (w *world) playAll(t *testing.T, p *proxy, kept needles, c *agent.Client) (refused int) {
	t.Helper()
	ctx := t.Context()
	rights := []agent.Right{{Tool: "db.read", Use: true, Args: map[string]agent.Constraint{"tables": agent.Subset("orders")}},
		{Tool: "tls.call", Use: true}, {Tool: "notes.read", Use: true}, {Tool: "api.call", Use: true}, {Tool: "host.uptime", Use: true}, {Tool: "notes.fetch", Use: true}}
	d, err := c.Open(ctx, agent.Chain{Task: "hygiene", Rights: rights, Budget: agent.Budget{Tools: map[string]int{"notes.read": 1}}})
	if err != nil {
		t.Fatal(err)
	}
	w.keepSecrets(t, kept, d)
	refuse := func(what string, err error) {
		t.Helper()
		if refused++; err == nil {
			t.Errorf("%s: not refused", what)
		}
	}
	begin := func(tool string, args agent.Args) error {
		_, err := d.Begin(ctx, agent.Call{Tool: tool, Args: args})
		return err
	}
	refuse("a tool that is not there", begin("no.such", nil))
	refuse("outside the delegation", begin("db.read", agent.Args{"tables": []string{"customers"}}))
	refuse("an argument that is not there", begin("db.read", agent.Args{"tables": []string{"orders"}, "password": "x"}))
	refuse("budget", begin("notes.read", nil))
	_, err = c.Join(ctx, agent.DelegationID("dl"+strings.Repeat("0", 24)))
	refuse("a delegation that is not there", err)
	p.spoil(childPath, quoting) // before a second step has a token that was made ahead
	refuse("echo in place of a token", begin("db.read", agent.Args{"tables": []string{"orders"}}))
	for name, f := range map[string]fault{"500": status(500), "cut": cut, "half": body(func(s string) string { return s[:len(s)/2] }),
		"no lease": member(t, "lease_id", nil), "echo": quoting} {
		p.spoil(mintPath, f)
		refuse(name+" after the mint", begin("db.read", agent.Args{"tables": []string{"orders"}}))
	}
	if err := w.env.Vault.Seal(ctx); err != nil {
		t.Fatal(err)
	}
	refuse("sealed", begin("tls.call", agent.Args{"name": "a.agents.pawl.dev"}))
	if err := w.env.Vault.Unseal(ctx); err != nil {
		t.Fatal(err)
	}
	refuse("a violation", begin("tls.call", agent.Args{"name": "root.agents.pawl.dev"}))
	refuse("under the fence", begin("tls.call", agent.Args{"name": "a.agents.pawl.dev"}))
	return refused - 1 // after the fence arrives, the SDK sends no request
}

// quoting answers an error with the secret in it, as some engines have done.
func quoting(w http.ResponseWriter, r *http.Request, real func() *httptest.ResponseRecorder) {
	said := real().Body.String()
	w.WriteHeader(http.StatusInternalServerError)
	// The broker may have hung up.
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []string{said, r.Header.Get("X-Vault-Token")}})
}

// keepSecrets takes a step with each tool.
func (w *world) keepSecrets(t *testing.T, kept needles, d *agent.Delegation) {
	t.Helper()
	_, l, err := take(t.Context(), d, 0)
	if err != nil {
		t.Fatal(err)
	}
	kept.add("password of "+l.Username, []byte(l.Password))
	cert, err := d.Begin(t.Context(), agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}})
	if err != nil {
		t.Fatal(err)
	}
	kept.addPEM("private key of "+string(cert.Grant().ID), cert.Secret().Field("private_key"))
	token, err := d.Begin(t.Context(), agent.Call{Tool: "api.call", Args: agent.Args{"audience": "https://mail.pawl.dev"}})
	if err != nil {
		t.Fatal(err)
	}
	kept.add("token of "+string(token.Grant().ID), []byte(token.Secret().Field("token")))
	host, err := d.Begin(t.Context(), agent.Call{Tool: "host.uptime"})
	if err != nil {
		t.Fatal(err)
	}
	kept.addPEM("private key of "+string(host.Grant().ID), host.Secret().Field("private_key"))
	fetch, err := d.Begin(t.Context(), agent.Call{Tool: "notes.fetch"})
	if err != nil {
		t.Fatal(err)
	}
	kept.add("token of "+string(fetch.Grant().ID), []byte(cmp.Or(fetch.Secret().Field("token"), fetch.Secret().Field("wrapping_token"))))
	note, err := d.Begin(t.Context(), agent.Call{Tool: "notes.read"})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(note.Secret().JSON(), []byte("kept in a drawer")) {
		t.Error("the note has changed")
	}
}

// audit gives the whole audit log, as operators read it.
func (w *world) audit(t *testing.T) []byte {
	t.Helper()
	page, err := w.operator().Audit(t.Context(), 0, 1000)
	return encode(t, page, err)
}

// views gives everything else that operators can read.
func (w *world) views(t *testing.T) []byte {
	t.Helper()
	revocations, err := w.operator().Revocations(t.Context())
	return append(encode(t, revocations, err), encode(t, w.grants(), nil)...)
}

// metrics gives the broker's metrics, as a scraper reads them.
func (w *world) metrics(t *testing.T) []byte {
	t.Helper()
	socket := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", w.config.Listen.Socket)
	}
	c := &http.Client{Transport: &http.Transport{DialContext: socket, DisableKeepAlives: true}}
	answer, err := c.Get("http://pawl/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close() //nolint:errcheck // it was only read
	raw, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("metrics: %s, %v", answer.Status, err)
	}
	return raw
}

// report gives the signed report of every revocation. It decodes them, because the base64 of a payload is aligned
// differently from the base64 of a secret in it.
func (w *world) report(t *testing.T) (all []byte) {
	t.Helper()
	revocations, err := w.operator().Revocations(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, rv := range revocations {
		raw, err := w.operator().Report(t.Context(), rv.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.FieldsFunc(string(raw), func(r rune) bool { return strings.ContainsRune(`."{}:, `, r) }) {
			if plain, err := base64.RawURLEncoding.DecodeString(part); err == nil {
				all = append(all, plain...)
			}
		}
		all = append(all, raw...)
	}
	return all
}

func encode(t *testing.T, v any, err error) []byte {
	t.Helper()
	raw, encodeErr := json.Marshal(v)
	if err != nil || encodeErr != nil {
		t.Fatal(err, encodeErr)
	}
	return raw
}
