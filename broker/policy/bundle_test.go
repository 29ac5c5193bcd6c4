package policy_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/pawlsec/pawl/broker/policy"
)

const someCedar = `@id("ci") permit(principal in AgentGroup::"spiffe://acme.example/ci", action == Action::"use", resource == Tool::"db.read");`

func keys(t testing.TB, n int) (private, public []jose.JSONWebKey) {
	t.Helper()
	for range n {
		priv, pub, err := policy.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		private, public = append(private, priv), append(public, pub)
	}
	return private, public
}

func sign(t testing.TB, s policy.Source, keys ...jose.JSONWebKey) []byte {
	t.Helper()
	jws, err := policy.Sign(s, keys...)
	if err != nil {
		t.Fatalf("Sign: %v", err)
	}
	return jws
}

// version returns the test bundle with another version.
func version(t testing.TB, n, cedar string) policy.Source {
	t.Helper()
	dir := sources(cedar)
	dir["bundle.yaml"].Data = []byte("name: acme\nversion: " + n + "\n")
	return build(t, dir)
}

func TestSignAndVerify(t *testing.T) {
	private, public := keys(t, 3)
	s := build(t, sources(someCedar))
	jws := sign(t, s, private[0])
	jws, err := policy.Cosign(jws, private[2])
	if err != nil {
		t.Fatalf("Cosign: %v", err)
	}
	b, err := policy.Verify(jws, policy.Trust{Keys: public, Need: 2})
	if err != nil {
		t.Fatalf("Verify: %v", err)
	}
	if want := []string{public[0].KeyID, public[2].KeyID}; !slices.Equal(b.Signers, want) {
		t.Errorf("Signers = %v, want %v", b.Signers, want)
	}
	if b.Digest() != s.Digest() || !bytes.Equal(b.Payload(), s.Payload()) || b.Version() != 3 || b.Name() != "acme" {
		t.Errorf("Verify gave %s version %d %s, want the signed source", b.Name(), b.Version(), b.Digest())
	}
	p, err := policy.Load(b)
	if err != nil {
		t.Fatalf("Load: %v", err)
	}
	if tool, ok := p.Tool("db.read"); !ok || tool.Path.Segments()[1] != "pawl-app" || len(tool.Arguments) != 4 {
		t.Errorf("Tool(db.read) = %+v, %v", tool, ok)
	}
}

func TestSignWithES256(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private := jose.JSONWebKey{Key: key}
	jws := sign(t, build(t, sources(someCedar)), private)
	if _, err := policy.Verify(jws, policy.Trust{Keys: []jose.JSONWebKey{private.Public()}, Need: 1}); err != nil {
		t.Errorf("Verify of ES256: %v", err)
	}
}

func TestSignRefuses(t *testing.T) {
	private, public := keys(t, 1)
	s := build(t, sources(someCedar))
	if _, err := policy.Sign(s); err == nil || !strings.Contains(err.Error(), "no key") {
		t.Errorf("Sign without a key = %v", err)
	}
	if _, err := policy.Sign(s, public...); err == nil || !strings.Contains(err.Error(), "public key") {
		t.Errorf("Sign with a public key = %v", err)
	}
	if _, err := policy.Sign(s, jose.JSONWebKey{Key: []byte(strings.Repeat("k", 32))}); err == nil || !strings.Contains(err.Error(), "not valid") {
		t.Errorf("Sign with a symmetric key = %v", err)
	}
	if _, err := policy.Cosign([]byte("{}"), private...); !errors.Is(err, policy.ErrMalformed) {
		t.Errorf("Cosign of nonsense = %v", err)
	}
}

// edit changes the envelope.
func edit(t testing.TB, jws []byte, f func(m map[string]any, first map[string]any)) []byte {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(jws, &m); err != nil {
		t.Fatal(err)
	}
	f(m, m["signatures"].([]any)[0].(map[string]any))
	out, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func b64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func TestVerifyRefuses(t *testing.T) {
	private, public := keys(t, 4)
	s := build(t, sources(someCedar))
	trust := policy.Trust{Keys: public[:3], Need: 2}
	good := sign(t, s, private[:2]...)
	other := version(t, "4", someCedar)
	signed := func(payload string) []byte { return policy.SignRaw([]byte(payload), private[:2]...) } // validly signed, whatever the payload
	head := func(s string) func(map[string]any, map[string]any) {
		return func(_, first map[string]any) { first["protected"] = b64(s) }
	}
	broken := func(member string, outer bool) func(map[string]any, map[string]any) {
		return func(m, first map[string]any) {
			if !outer {
				m = first
			}
			text := m[member].(string)
			m[member] = text[:4] + "\n" + text[4:]
		}
	}
	kid := public[0].KeyID
	for _, tt := range []struct {
		name  string
		jws   []byte
		trust policy.Trust
		is    error
		text  string
	}{
		{"tampered payload", edit(t, good, func(m, _ map[string]any) { m["payload"] = b64(string(other.Payload())) }), trust, policy.ErrTampered, "signature does not fit"},
		{"tampered signature", edit(t, good, func(_, f map[string]any) { f["signature"] = b64(strings.Repeat("x", 64)) }), trust, policy.ErrTampered, kid},
		{"under-signed", sign(t, s, private[0]), trust, policy.ErrUnderSigned, "2 needed, 1 valid"},
		{"one key twice", sign(t, s, private[0], private[0]), trust, policy.ErrUnderSigned, "2 needed, 1 valid"},
		{"unknown key", sign(t, s, private[0], private[3]), trust, policy.ErrUnderSigned, "not trusted: \"" + public[3].KeyID},
		{"unknown critical header", edit(t, good, head(`{"alg":"EdDSA","kid":"`+kid+`","typ":"pawl-bundle+jws","crit":["b64"],"b64":false}`)), trust, policy.ErrMalformed, "crit"},
		{"other algorithm", edit(t, good, head(`{"alg":"none","kid":"`+kid+`","typ":"pawl-bundle+jws"}`)), trust, policy.ErrTampered, "signs with EdDSA, not \"none\""},
		{"other type", edit(t, good, head(`{"alg":"EdDSA","kid":"`+kid+`","typ":"JWT"}`)), trust, policy.ErrMalformed, "typ"},
		{"repeated member", append([]byte(`{"payload":"AA",`), good[1:]...), trust, policy.ErrMalformed, "duplicate"},
		{"unprotected header", edit(t, good, func(_, f map[string]any) { f["header"] = map[string]any{} }), trust, policy.ErrMalformed, "header"},
		{"trailing data", append(slices.Clone(good), " {}"...), trust, policy.ErrMalformed, "after top-level"},
		{"no signature", []byte(`{"payload":"e30","signatures":[]}`), trust, policy.ErrMalformed, "1 to 16 signatures"},
		{"oversized", bytes.Repeat([]byte("x"), policy.MaxBundle+1), trust, policy.ErrOversized, "too large"},
		{"empty", nil, trust, policy.ErrMalformed, "not a signed bundle"},
		{"no trusted key", good, policy.Trust{}, nil, "0 signatures needed of 0"},
		{"more needed than there are", good, policy.Trust{Keys: slices.Repeat(public[:1], 3), Need: 2}, nil, "2 signatures needed of 1 different keys"},
		{"line break in the payload", edit(t, good, broken("payload", true)), trust, policy.ErrMalformed, "not base64url"},
		{"line break in a header", edit(t, good, broken("protected", false)), trust, policy.ErrMalformed, "not base64url"},
		{"line break in a signature", edit(t, good, broken("signature", false)), trust, policy.ErrTampered, kid},
		{"signed, unknown member", signed(`{"name":"acme","version":1,"tools":[],"policies":[],"extra":1}`), trust, nil, "extra"},
		{"signed, not canonical", signed(` {"name":"acme","version":1,"tools":[],"policies":[]}`), trust, nil, "canonical"},
		{"signed, tool twice", signed(`{"name":"acme","version":1,"tools":[{"name":"a"},{"name":"a"}],"policies":[]}`), trust, nil, "declared twice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Verify(tt.jws, tt.trust)
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Verify = %v, want %v with %q", err, tt.is, tt.text)
			}
		})
	}
	if _, err := policy.Verify(good, trust); err != nil {
		t.Errorf("Verify of the unmodified bundle: %v", err)
	}
}

func TestRunning(t *testing.T) {
	private, public := keys(t, 2)
	trust := policy.Trust{Keys: public, Need: 2}
	signed := func(n, cedar string) []byte { return sign(t, version(t, n, cedar), private...) }
	r, err := policy.NewRunning(signed("3", someCedar), trust)
	if err != nil {
		t.Fatalf("NewRunning: %v", err)
	}
	want := r.Current().Digest()
	for _, tt := range []struct {
		name     string
		jws      []byte
		rollback bool
		text     string
	}{
		{"older", signed("2", someCedar), false, "version 2, and 3 is running"},
		{"same version, other content", signed("3", ""), false, "version 3 again, with other content"},
		{"same version, other content, as a rollback", signed("3", ""), true, "version 3 again"},
		{"under-signed", sign(t, version(t, "4", someCedar), private[0]), false, "2 needed, 1 valid"},
		{"nonsense", []byte("{}"), false, "not a signed bundle"},
	} {
		if _, err := r.Replace(tt.jws, tt.rollback, nil); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: Replace = %v, want %q", tt.name, err, tt.text)
		}
		if got := r.Policy().Digest(); got != want {
			t.Fatalf("%s: running %s, want %s to stay", tt.name, got, want)
		}
	}
	for _, step := range []struct {
		n        string
		rollback bool
	}{{"3", false}, {"5", false}, {"4", true}} {
		p, err := r.Replace(signed(step.n, someCedar), step.rollback, nil)
		if err != nil || p != r.Current() {
			t.Errorf("Replace with version %s = %v, want it running", step.n, err)
		}
	}
	want = r.Current().Digest()
	if _, err := r.Replace(signed("6", someCedar), false, func(next *policy.Policy) error {
		return fmt.Errorf("no to version %d", next.Bundle().Version())
	}); err == nil || err.Error() != "no to version 6" || r.Current().Digest() != want {
		t.Errorf("Replace that agree refuses = %v, running %s, want %s to stay", err, r.Current().Digest(), want)
	}
	foreign := sources(someCedar)
	foreign["bundle.yaml"].Data = []byte("name: other\nversion: 9\n")
	if _, err := r.Replace(sign(t, build(t, foreign), private...), true, nil); err == nil || !strings.Contains(err.Error(), `"other" cannot replace "acme"`) {
		t.Errorf("Replace with another bundle = %v", err)
	}
}
