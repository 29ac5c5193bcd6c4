package signals_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/jws"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/broker/signals"
)

const (
	issuer   = "https://idp.example.org"
	audience = "https://pawl.example.org/v1/security-events"
	revoked  = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
	changed  = "https://schemas.openid.net/secevent/caep/event-type/credential-change"
)

var noon = time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)

// rsaKey is shared by all tests, because generating one takes long.
var rsaKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

type object = map[string]any

// rig is a receiver over an engine that records its calls.
type rig struct {
	*signals.Receiver
	ed    ed25519.PrivateKey
	rsa   *rsa.PrivateKey
	now   time.Time
	asked []selector.Request
	by    []string
	err   error
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{now: noon}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r.ed = private
	if r.rsa, err = rsaKey(); err != nil {
		t.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: public, KeyID: "ed"}, {Key: r.rsa.Public(), KeyID: "rsa"}}})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := jws.ParseKeys(set)
	if err != nil {
		t.Fatal(err)
	}
	all, err := selector.Parse("label.customer:acme")
	if err != nil {
		t.Fatal(err)
	}
	other := issuer + "/other"
	r.Receiver, err = signals.New(signals.Config{
		Transmitters: []signals.Transmitter{
			{Issuer: issuer, Audience: audience, Keys: keys, Subjects: map[string]selector.Selector{"acme": all}},
			{Issuer: other, Audience: audience, Keys: keys[1:], Freeze: true},
		},
		Revoke: func(_ context.Context, o broker.Operator, req selector.Request) (broker.Revocation, error) {
			r.by, r.asked = append(r.by, o.Name), append(r.asked, req)
			return broker.Revocation{ID: "rv1"}, r.err
		},
		Domains: []string{"example.org"}, Now: func() time.Time { return r.now }, Remember: 50,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func goodHeader() object { return object{"alg": "EdDSA", "kid": "ed", "typ": "secevent+jwt"} }

func goodClaims() object {
	return object{"iss": issuer, "jti": "j1", "iat": noon.Unix(), "aud": audience, "sub_id": object{"format": "uri", "uri": "spiffe://example.org/agent"},
		"events": object{revoked: object{"event_timestamp": noon.Unix(), "reason_admin": object{"en": "compromised"}}}}
}

func encode(t testing.TB, v any) string {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(raw)
}

// token signs with sign, or with the Ed25519 key if sign is nil.
func (r *rig) token(t testing.TB, header, claims object, sign func(signed []byte) []byte) string {
	t.Helper()
	signed := encode(t, header) + "." + encode(t, claims)
	if sign == nil {
		sign = func(b []byte) []byte { return ed25519.Sign(r.ed, b) }
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(sign([]byte(signed)))
}

// push sends a token as a transmitter does.
func push(r http.Handler, token, contentType string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodPost, "/v1/security-events", strings.NewReader(token))
	req.Header.Set("Content-Type", contentType)
	w := httptest.NewRecorder()
	r.ServeHTTP(w, req)
	return w
}

const setType = "application/secevent+jwt"

// TestRefused lists tokens that are refused. Each differs from a good one in one thing.
func TestRefused(t *testing.T) {
	with := func(name string, v any) func(h, c object) {
		return func(_, c object) {
			if c[name] = v; v == nil {
				delete(c, name)
			}
		}
	}
	head := func(name string, v any) func(h, c object) { return func(h, _ object) { h[name] = v } }
	subject := func(s object) func(h, c object) { return with("sub_id", s) }
	for name, row := range map[string]struct {
		change func(h, c object)
		sign   func(r *rig) func([]byte) []byte
		code   string
	}{
		"another issuer":               {with("iss", "https://evil.example.org"), nil, "invalid_issuer"},
		"an issuer with a slash added": {with("iss", issuer+"/"), nil, "invalid_issuer"},
		"no issuer":                    {with("iss", nil), nil, "invalid_issuer"},
		"another issuer's key":         {with("iss", issuer+"/other"), nil, "invalid_key"},
		"another audience":             {with("aud", "https://elsewhere.example.org"), nil, "invalid_audience"},
		"no audience":                  {with("aud", nil), nil, "invalid_audience"},
		"two audiences":                {with("aud", []string{audience, "https://elsewhere.example.org"}), nil, "invalid_audience"},
		"too old":                      {with("iat", noon.Add(-5*time.Minute-time.Second).Unix()), nil, "invalid_request"},
		"from the future":              {with("iat", noon.Add(31*time.Second).Unix()), nil, "invalid_request"},
		"before 1970":                  {with("iat", -1), nil, "invalid_request"},
		"no time":                      {with("iat", nil), nil, "invalid_request"},
		"a time as text":               {with("iat", "now"), nil, "invalid_request"},
		"expired":                      {with("exp", noon.Unix()), nil, "invalid_request"},
		"no jti":                       {with("jti", nil), nil, "invalid_request"},
		"a jti with a line break":      {with("jti", "a\nb"), nil, "invalid_request"},
		"a jti too long":               {with("jti", strings.Repeat("x", 257)), nil, "invalid_request"},
		"two events":                   {with("events", object{revoked: object{}, changed: object{"change_type": "revoke"}}), nil, "invalid_request"},
		"no event":                     {with("events", object{}), nil, "invalid_request"},
		"an unknown event":             {with("events", object{revoked + "/x": object{}}), nil, "invalid_request"},
		"an event that is not an object": {
			with("events", object{revoked: "yes"}), nil, "invalid_request"},
		"an unknown change":        {with("events", object{changed: object{"change_type": "explode"}}), nil, "invalid_request"},
		"no subject":               {with("sub_id", nil), nil, "invalid_request"},
		"a subject of email":       {subject(object{"format": "email", "email": "a@example.org"}), nil, "invalid_request"},
		"a subject of two formats": {subject(object{"format": "uri", "uri": "spiffe://example.org/a", "id": "acme"}), nil, "invalid_request"},
		"a foreign trust domain":   {subject(object{"format": "uri", "uri": "spiffe://elsewhere.org/agent"}), nil, "invalid_request"},
		"a whole trust domain":     {subject(object{"format": "uri", "uri": "spiffe://example.org"}), nil, "invalid_request"},
		"a wildcard":               {subject(object{"format": "uri", "uri": "spiffe://example.org/*"}), nil, "invalid_request"},
		"an unknown name":          {subject(object{"format": "opaque", "id": "unlisted"}), nil, "invalid_request"},
		"another issuer's subject": {subject(object{"format": "iss_sub", "iss": "https://evil.example.org", "sub": "acme"}), nil, "invalid_request"},
		"another typ":              {head("typ", "JWT"), nil, "invalid_request"},
		"a key of its own":         {head("jwk", object{"kty": "oct", "k": "AA"}), nil, "invalid_request"},
		"a critical extension":     {head("crit", []string{"b64"}), nil, "invalid_request"},
		"an unknown kid":           {head("kid", "unlisted"), nil, "invalid_key"},
		"no kid":                   {head("kid", ""), nil, "invalid_key"},
		"alg none":                 {head("alg", "none"), func(*rig) func([]byte) []byte { return func([]byte) []byte { return nil } }, "invalid_key"},
		"HS256 with the public key": {func(h, _ object) { h["alg"], h["kid"] = "HS256", "rsa" }, func(r *rig) func([]byte) []byte {
			return func(b []byte) []byte {
				mac := hmac.New(sha256.New, x509.MarshalPKCS1PublicKey(&r.rsa.PublicKey))
				mac.Write(b)
				return mac.Sum(nil)
			}
		}, "invalid_key"},
		"another alg than the key's": {func(h, _ object) { h["alg"], h["kid"] = "PS256", "rsa" }, func(r *rig) func([]byte) []byte { return signPSS(r) }, "invalid_key"},
		"the alg of another key":     {func(h, _ object) { h["alg"] = "RS256" }, nil, "invalid_key"},
		"no signature":               {func(h, _ object) {}, func(*rig) func([]byte) []byte { return func([]byte) []byte { return nil } }, "invalid_key"},
		"a changed signature": {func(h, _ object) {}, func(r *rig) func([]byte) []byte {
			return func(b []byte) []byte { s := ed25519.Sign(r.ed, b); s[3] ^= 1; return s }
		}, "invalid_key"},
	} {
		r := newRig(t)
		header, claims := goodHeader(), goodClaims()
		row.change(header, claims)
		var sign func([]byte) []byte
		if row.sign != nil {
			sign = row.sign(r)
		}
		w := push(r, r.token(t, header, claims, sign), setType)
		var refusal struct{ Err, Description string }
		if err := json.Unmarshal(w.Body.Bytes(), &refusal); err != nil || w.Code != http.StatusBadRequest || refusal.Err != row.code || refusal.Description == "" {
			t.Errorf("%s = %d %s, want 400 with %s", name, w.Code, w.Body, row.code)
		}
		if len(r.asked) > 0 {
			t.Errorf("%s caused %+v", name, r.asked)
		}
	}
}

// signPSS signs correctly, but with another algorithm than the key's own.
func signPSS(r *rig) func([]byte) []byte {
	return func(signed []byte) []byte {
		sum := sha256.Sum256(signed)
		sig, err := rsa.SignPSS(rand.Reader, r.rsa, crypto.SHA256, sum[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		if err != nil {
			return nil
		}
		return sig
	}
}

// TestForm checks that malformed tokens and other media types are refused.
func TestForm(t *testing.T) {
	r := newRig(t)
	good := r.token(t, goodHeader(), goodClaims(), nil)
	parts := strings.Split(good, ".")
	for name, token := range map[string]string{
		"empty": "", "two parts": parts[0] + "." + parts[1], "four parts": good + ".AA", "a line break": good[:20] + "\n" + good[20:],
		"padding": good + "=", "JSON": `{"payload":"` + parts[1] + `"}`, "over-long": good + strings.Repeat("A", signals.MaxToken),
		"a member twice": encode(t, goodHeader()) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"a","iss":"`+issuer+`"}`)) + "." + parts[2],
		"not JSON":       "AAAA." + parts[1] + "." + parts[2],
	} {
		if w := push(r, token, setType); w.Code != http.StatusBadRequest {
			t.Errorf("%s = %d, want 400", name, w.Code)
		}
	}
	for _, kind := range []string{"application/json", "", setType + "; charset=utf-8"} {
		if w := push(r, good, kind); w.Code != http.StatusBadRequest {
			t.Errorf("a token as %q = %d, want 400", kind, w.Code)
		}
	}
	if w := push(r, good, setType); w.Code != http.StatusAccepted || w.Body.Len() != 0 {
		t.Errorf("the good token = %d %q, want 202 and no body", w.Code, w.Body)
	}
}

// TestAccepted lists tokens that are accepted, with the effect of each.
func TestAccepted(t *testing.T) {
	for name, row := range map[string]struct {
		change func(h, c object)
		sel    string
		freeze bool
	}{
		"session-revoked of a SPIFFE ID": {func(_, _ object) {}, "spiffe:spiffe://example.org/agent", false},
		"a list with our audience":       {func(_, c object) { c["aud"] = []string{audience} }, "spiffe:spiffe://example.org/agent", false},
		"a subject by iss_sub": {func(_, c object) {
			c["sub_id"] = object{"format": "iss_sub", "iss": issuer, "sub": "acme"}
		}, "label.customer:acme", false},
		"a subject by an opaque name": {func(_, c object) { c["sub_id"] = object{"format": "opaque", "id": "acme"} }, "label.customer:acme", false},
		"a credential that was revoked": {func(_, c object) {
			c["events"] = object{changed: object{"credential_type": "x509", "change_type": "revoke"}}
		}, "spiffe:spiffe://example.org/agent", false},
		"a credential that was created": {func(_, c object) {
			c["events"] = object{changed: object{"credential_type": "x509", "change_type": "create"}}
		}, "", false},
		"as old as allowed":      {func(_, c object) { c["iat"] = noon.Add(-5 * time.Minute).Unix() }, "spiffe:spiffe://example.org/agent", false},
		"a clock slightly ahead": {func(_, c object) { c["iat"] = noon.Add(30 * time.Second).Unix() }, "spiffe:spiffe://example.org/agent", false},
		"unknown claims":         {func(_, c object) { c["txn"] = "t"; c["toe"] = 1 }, "spiffe:spiffe://example.org/agent", false},
	} {
		r := newRig(t)
		header, claims := goodHeader(), goodClaims()
		row.change(header, claims)
		if w := push(r, r.token(t, header, claims, nil), setType); w.Code != http.StatusAccepted {
			t.Errorf("%s = %d %s, want 202", name, w.Code, w.Body)
			continue
		}
		if row.sel == "" {
			if len(r.asked) != 0 {
				t.Errorf("%s caused %+v, want nothing", name, r.asked)
			}
			continue
		}
		if len(r.asked) != 1 || r.asked[0].Selector.String() != row.sel || r.asked[0].Freeze != row.freeze || r.by[0] != "set:"+issuer ||
			!strings.Contains(r.asked[0].Reason, "j1") {
			t.Errorf("%s caused %+v by %v, want %s", name, r.asked, r.by, row.sel)
		}
	}
}

// TestFreeze checks that a transmitter limited to freezing freezes. RS256 is the algorithm of an RSA key without an
// alg.
func TestFreeze(t *testing.T) {
	r := newRig(t)
	header, claims := goodHeader(), goodClaims()
	header["alg"], header["kid"], claims["iss"] = "RS256", "rsa", issuer+"/other"
	token := r.token(t, header, claims, func(signed []byte) []byte {
		sum := sha256.Sum256(signed)
		sig, err := rsa.SignPKCS1v15(nil, r.rsa, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return sig
	})
	if w := push(r, token, setType); w.Code != http.StatusAccepted || len(r.asked) != 1 || !r.asked[0].Freeze {
		t.Errorf("push = %d %s and %+v, want a freeze", w.Code, w.Body, r.asked)
	}
}

// TestReplay checks that a token has an effect once, and that it may be sent again after the engine failed.
func TestReplay(t *testing.T) {
	r := newRig(t)
	token := r.token(t, goodHeader(), goodClaims(), nil)
	r.err = broker.Errorf(broker.Unavailable, "revoke", "the ledger is down")
	if w := push(r, token, setType); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("with the ledger down = %d, want 503 with Retry-After", w.Code)
	}
	r.err = nil
	if w := push(r, token, setType); w.Code != http.StatusAccepted {
		t.Errorf("the same token, later = %d %s, want 202", w.Code, w.Body)
	}
	for range 2 {
		if w := push(r, token, setType); w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), "received before") {
			t.Errorf("the token again = %d %s, want 400 for a repeated token", w.Code, w.Body)
		}
	}
	if r.now = noon.Add(5*time.Minute + time.Second); push(r, token, setType).Code != http.StatusBadRequest {
		t.Error("the token was accepted again after it was forgotten")
	}
	if len(r.asked) != 2 {
		t.Errorf("the engine was asked %d times, want twice", len(r.asked))
	}
}

// TestRemember checks that a flood of tokens is refused until the old ones expire, so that none is forgotten early.
func TestRemember(t *testing.T) {
	r := newRig(t)
	code, taken := 0, 0
	for ; taken < 100; taken++ {
		claims := goodClaims()
		claims["jti"] = fmt.Sprint(taken)
		if code = push(r, r.token(t, goodHeader(), claims, nil), setType).Code; code != http.StatusAccepted {
			break
		}
	}
	if code != http.StatusServiceUnavailable || taken != 50 {
		t.Fatalf("after %d tokens = %d, want 503 after 50", taken, code)
	}
	claims := goodClaims()
	claims["jti"] = "0"
	if w := push(r, r.token(t, goodHeader(), claims, nil), setType); w.Code != http.StatusBadRequest {
		t.Errorf("the first token again = %d, want 400", w.Code)
	}
	r.now = noon.Add(6 * time.Minute)
	claims["jti"], claims["iat"] = "later", r.now.Unix()
	if w := push(r, r.token(t, goodHeader(), claims, nil), setType); w.Code != http.StatusAccepted {
		t.Errorf("a token once the flood is old = %d, want 202", w.Code)
	}
}

func TestParseKeys(t *testing.T) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	short := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}
	odd, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, keys := range map[string][]jose.JSONWebKey{
		"none": {}, "private": {{Key: private, KeyID: "a"}}, "symmetric": {{Key: []byte("0123456789abcdef0123456789abcdef"), KeyID: "a"}},
		"without a kid": {{Key: public}}, "the same kid twice": {{Key: public, KeyID: "a"}, {Key: public, KeyID: "a"}},
		"a short RSA key": {{Key: short, KeyID: "a"}}, "P-521": {{Key: odd.Public(), KeyID: "a"}},
		"an alg of another kind": {{Key: public, KeyID: "a", Algorithm: "RS256"}}, "for encryption": {{Key: public, KeyID: "a", Use: "enc"}},
	} {
		raw, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := jws.ParseKeys(raw); err == nil {
			t.Errorf("ParseKeys of %s = %v, want an error", name, got)
		}
	}
	if _, err := jws.ParseKeys([]byte("[")); err == nil {
		t.Error("ParseKeys of invalid JSON = nil, want an error")
	}
}

// TestEndToEnd checks that a received token fences the agent's chain, which is then proven dead.
func TestEndToEnd(t *testing.T) {
	ctx := t.Context()
	r := newRig(t)
	target, tools := brokertest.NewTarget(), brokertest.AllowAll("db")
	b, err := engine.New(engine.Config{Ledger: brokertest.NewMemory(), Policy: func() broker.Policy { return tools }, Vault: brokertest.NewVault(target),
		Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	receiver := receiverOver(t, r, b.Revoke)
	agent := broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/agent"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := b.Open(ctx, agent, broker.OpenRequest{Task: "t", Rights: []broker.Right{{Tool: "db", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	step := broker.StepRequest{Delegation: root.ID, Tool: "db"}
	issued, err := b.Issue(ctx, agent, step)
	if err != nil {
		t.Fatal(err)
	}
	if !target.Login(issued.Secret.Reveal()) {
		t.Fatal("the secret does not work before the event")
	}
	claims := goodClaims()
	claims["iat"] = time.Now().Unix()
	if w := push(receiver, r.token(t, goodHeader(), claims, nil), setType); w.Code != http.StatusAccepted {
		t.Fatalf("push = %d %s, want 202", w.Code, w.Body)
	}
	if _, err := b.Issue(ctx, agent, step); !errors.Is(err, broker.Revoked) {
		t.Errorf("a step after the event = %v, want revoked", err)
	}
	deadline := time.After(10 * time.Second)
	for {
		woken, cancel := b.Watch("")
		list, _, err := b.Revocations(ctx, broker.Page{Limit: 10})
		if err != nil || len(list) != 1 || list[0].By != "set:"+issuer {
			t.Fatalf("Revocations = %+v, %v, want the one by the transmitter", list, err)
		}
		if rv := list[0]; !rv.Settled.IsZero() {
			cancel()
			if rv.Closure != broker.ClosureClosed || rv.Dead != 1 || target.Login(issued.Secret.Reveal()) {
				t.Errorf("revocation = %+v, want CLOSED with the secret dead", rv)
			}
			return
		}
		select {
		case <-woken:
		case <-deadline:
			t.Fatal("the revocation did not settle within 10 s")
		}
		cancel()
	}
}

// receiverOver returns a receiver for the rig's transmitter over another engine, on the wall clock.
func receiverOver(t *testing.T, r *rig, revoke func(context.Context, broker.Operator, selector.Request) (broker.Revocation, error)) *signals.Receiver {
	t.Helper()
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: r.ed.Public(), KeyID: "ed"}}})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := jws.ParseKeys(set)
	if err != nil {
		t.Fatal(err)
	}
	receiver, err := signals.New(signals.Config{Transmitters: []signals.Transmitter{{Issuer: issuer, Audience: audience, Keys: keys}},
		Revoke: revoke, Domains: []string{"example.org"}, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	return receiver
}

func FuzzReceive(f *testing.F) {
	r := newRig(f)
	good := r.token(f, goodHeader(), goodClaims(), nil)
	f.Add([]byte(good))
	f.Add([]byte("e30.e30."))
	f.Add([]byte(encode(f, goodHeader()) + "." + encode(f, goodClaims()) + ".AAAA"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		_, err := r.Receive(t.Context(), raw)
		var refused *signals.Refusal
		if err == nil && string(raw) != good || err != nil && !errors.As(err, &refused) {
			t.Errorf("Receive(%q) = %v, want a refusal", raw, err)
		}
	})
}

// TestUnknownSubject checks that an event about a subject with nothing here is accepted without effect. After any
// other error of the engine it must be sent again.
func TestUnknownSubject(t *testing.T) {
	for _, row := range []struct {
		err    error
		status int
	}{
		{broker.Errorf(broker.NotFound, "revoke", "nothing").With(broker.CodeSelectorEmpty), http.StatusAccepted},
		{broker.Errorf(broker.NotFound, "revoke", "there is no such chain"), http.StatusAccepted},
		{broker.Errorf(broker.Unavailable, "revoke", "the ledger is down").With(broker.CodeLedgerDown), http.StatusServiceUnavailable},
	} {
		r := newRig(t)
		r.err = row.err
		token := r.token(t, goodHeader(), goodClaims(), nil)
		if w := push(r, token, setType); w.Code != row.status {
			t.Errorf("status with %v = %d, want %d", row.err, w.Code, row.status)
		}
		r = newRig(t)
		r.err = row.err
		if rv, err := r.Receive(t.Context(), []byte(r.token(t, goodHeader(), goodClaims(), nil))); err == nil && rv != "" {
			t.Errorf("Receive with %v = %s, want no revocation", row.err, rv)
		}
	}
}
