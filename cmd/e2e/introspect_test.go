package e2e_test

import (
	"bytes"
	"compress/zlib"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/cmd/dev"
)

// service is a workload that accepts tokens and introspects them with its own SVID.
type service struct {
	*world
	http *http.Client
}

func newService(w *world) service {
	source := w.env.Identities.Source(dev.Agent("orders"))
	tr := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(dev.BrokerID))}
	w.t.Cleanup(tr.CloseIdleConnections)
	return service{w, &http.Client{Transport: tr, Timeout: 10 * time.Second}}
}

// ask gives the broker's answer about a token.
func (s service) ask(token string) (answer api.Introspection) {
	s.t.Helper()
	s.http.CloseIdleConnections() // the broker may have restarted
	resp, err := s.http.PostForm("https://"+s.config.Listen.Agents+"/v1/introspect", url.Values{"token": {token}})
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it was only read
	raw, err := io.ReadAll(resp.Body)
	if err == nil {
		err = json.Unmarshal(raw, &answer)
	}
	if err != nil || resp.StatusCode != http.StatusOK {
		s.t.Fatalf("introspection = %d, %v", resp.StatusCode, err)
	}
	return answer
}

// want checks whether each token is active.
func (s service) want(when string, tokens map[string]string, active ...string) {
	s.t.Helper()
	for name, token := range tokens {
		want := false
		for _, a := range active {
			want = want || a == name
		}
		got := s.ask(token)
		if got.Active != want || !want && got != (api.Introspection{}) {
			s.t.Errorf("%s: the token %s is active: %v with subject %q, want active %v, and no claims of an inactive one", when, name, got.Active, got.Subject, want)
		}
	}
}

var ordersCall = agent.Args{"audience": "https://orders.pawl.dev", "order": 7}

func takeToken(t *testing.T, d *agent.Delegation, ttl time.Duration) (*agent.Step, string) {
	t.Helper()
	step, err := d.Begin(t.Context(), agent.Call{Tool: "api.call", Args: ordersCall, TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	return step, step.Secret().Field("token")
}

// TestIntrospection: introspection and the status list are true from a token's revocation, closing or expiry on, also
// after a restart. They are the evidence of a dead token.
func TestIntrospection(t *testing.T) {
	t.Parallel()
	need(t, false)
	w := newWorld(t, newEnv(t, dev.Config{NoPostgres: true}), nil)
	public := w.statusList()
	first := w.here(nil, nil)
	planner := w.agent("planner")
	open := func() *agent.Delegation {
		t.Helper()
		d, err := planner.Open(t.Context(), agent.Chain{Task: "orders", Rights: []agent.Right{{Tool: "api.call", Use: true}}})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	kept, cut := open(), open()
	tokens := map[string]string{}
	_, tokens["live"] = takeToken(t, kept, 0)
	_, tokens["short"] = takeToken(t, kept, 2*time.Second)
	closing, token := takeToken(t, kept, 0)
	tokens["closed"] = token
	revoked, token := takeToken(t, cut, 0)
	tokens["revoked"] = token
	tokens["foreign"], tokens["altered"] = foreign(t, tokens["live"]), altered(tokens["live"])
	s := newService(w)
	s.want("at first", tokens, "live", "short", "closed", "revoked")
	s.wantStatus("at first", tokens, public)
	if got := s.ask(tokens["live"]); got.Subject != dev.Agent("planner").String() || got.Audience != "https://orders.pawl.dev" || got.Scope != "read" ||
		got.Issuer != "https://pawl.dev" || got.Expires <= time.Now().Unix() {
		t.Errorf("introspection = %+v, want the token's claims", got)
	}

	if err := closing.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	rv, err := w.operator().Revoke(t.Context(), api.RevokeRequest{Selector: "subtree:" + string(cut.ID()), Reason: "leaked"})
	if err != nil {
		t.Fatal(err)
	}
	s.want("once fenced", map[string]string{"closed": tokens["closed"], "revoked": tokens["revoked"]})
	if err := w.operator().Follow(t.Context(), rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil || rv.Closure != "CLOSED" || rv.Dead != 1 {
		t.Errorf("the revocation = %s with %d dead, %v; want CLOSED with the token", rv.Closure, rv.Dead, err)
	}
	for _, g := range w.grants() {
		if last := len(g.Evidence) - 1; g.ID == string(revoked.Grant().ID) && (last < 0 || g.Evidence[last].Check != "jwt: introspection and status list" || !strings.HasPrefix(g.Evidence[last].Answer, "inactive")) {
			t.Errorf("evidence = %+v, want the answer of introspection", g.Evidence)
		}
	}
	if !within(5*time.Second, func() bool { return !s.ask(tokens["short"]).Active }) {
		t.Error("a token is active after its end")
	}
	s.want("after a revocation, a close and an end", tokens, "live")
	s.wantStatus("after a revocation and a close", tokens, public, "revoked", "closed")
	first.Close()
	w.here(nil, nil)
	s.want("after a restart", tokens, "live")
	s.wantStatus("after a restart", tokens, public, "revoked", "closed")

	if _, err := w.operator().Revoke(t.Context(), api.RevokeRequest{Selector: selector.ForLeaked(tokens["live"]).String(), Reason: "found in a log"}); err != nil {
		t.Fatal(err)
	}
	s.want("once the last was found in a log", tokens)
}

// statusList makes the broker serve a status list, and gives the public key of its signature.
func (w *world) statusList() jose.JSONWebKey {
	w.t.Helper()
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	raw, err := private.MarshalJSON()
	if err != nil {
		w.t.Fatal(err)
	}
	w.config.SigningKey = filepath.Join(filepath.Dir(w.file), "signing.key")
	if err := os.WriteFile(w.config.SigningKey, raw, 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.config.Backends = maps.Clone(w.config.Backends)
	tokens := w.config.Backends["tokens"]
	tokens.StatusURI = "https://pawl.dev/v1/status-lists/tokens"
	w.config.Backends["tokens"] = tokens
	return public
}

// wantStatus is another verifier, without an identity. It looks tokens up in the list and checks which bits are set. An
// expired token needs no bit.
func (s service) wantStatus(when string, tokens map[string]string, key jose.JSONWebKey, set ...string) {
	s.t.Helper()
	anonymous := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, // the list's own signature is checked instead
		MinVersion:         tls.VersionTLS13,
	}}}
	defer anonymous.CloseIdleConnections()
	resp, err := anonymous.Get("https://" + s.config.Listen.Agents + "/v1/status-lists/tokens")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it was only read
	raw, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/statuslist+jwt" {
		s.t.Fatalf("the status list = %d of type %q, %v", resp.StatusCode, resp.Header.Get("Content-Type"), err)
	}
	signed, err := jose.ParseSignedCompact(string(raw), []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		s.t.Fatal(err)
	}
	payload, err := signed.Verify(key)
	if err != nil || signed.Signatures[0].Header.ExtraHeaders[jose.HeaderType] != "statuslist+jwt" {
		s.t.Fatalf("the status list is not signed by the broker: %v", err)
	}
	var list struct {
		Sub  string `json:"sub"`
		Exp  int64  `json:"exp"`
		List struct {
			Bits int    `json:"bits"`
			List string `json:"lst"`
		} `json:"status_list"`
	}
	if err := json.Unmarshal(payload, &list); err != nil || list.List.Bits != 1 || list.Exp <= time.Now().Unix() {
		s.t.Fatalf("the status list is %s, %v", payload, err)
	}
	packed, err := base64.RawURLEncoding.DecodeString(list.List.List)
	if err != nil {
		s.t.Fatal(err)
	}
	z, err := zlib.NewReader(bytes.NewReader(packed))
	if err != nil {
		s.t.Fatal(err)
	}
	bits, err := io.ReadAll(z)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, name := range []string{"live", "closed", "revoked"} {
		uri, index := s.place(tokens[name])
		if got := bits[index/8]>>(index%8)&1 == 1; uri != list.Sub || got != slices.Contains(set, name) {
			s.t.Errorf("%s: the bit of the %s token is set: %v, want %v, in the list %q", when, name, got, !got, uri)
		}
	}
}

// place gives the list and the bit that a token names.
func (s service) place(token string) (uri string, index int) {
	s.t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		s.t.Fatal("the token does not parse")
	}
	var claims struct {
		Status struct {
			List struct {
				Index int    `json:"idx"`
				URI   string `json:"uri"`
			} `json:"status_list"`
		} `json:"status"`
	}
	if json.Unmarshal(raw, &claims) != nil || claims.Status.List.URI == "" {
		s.t.Fatal("the token names no status list")
	}
	return claims.Status.List.URI, claims.Status.List.Index
}

// foreign gives a token with the claims and the header of another, signed with a key that is not Vault's.
func foreign(t *testing.T, like string) string {
	t.Helper()
	parsed, err := jose.ParseSignedCompact(like, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal("the broker's token does not parse")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: parsed.Signatures[0].Header.KeyID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(parsed.UnsafePayloadWithoutVerification())
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// altered gives the token with one character of its claims changed.
func altered(token string) string {
	head, rest, _ := strings.Cut(token, ".")
	at := len(rest) / 4
	other := byte('A')
	if rest[at] == other {
		other = 'B'
	}
	return head + "." + rest[:at] + string(other) + rest[at+1:]
}
