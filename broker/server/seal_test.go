package server_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/server"
)

func sealKey(t testing.TB) *agent.SealKey {
	t.Helper()
	k, err := agent.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestSealed checks that the step's answer has no secret, and that only the collector receives it, once.
func TestSealed(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	d, err := w.agent(t, "root").Open(ctx, agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "db", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	key := sealKey(t)
	seal := &agent.Seal{Key: key.Public(), Collector: "spiffe://example.org/worker"}
	step, err := d.Begin(ctx, agent.Call{Tool: "db", IdempotencyKey: "k", Seal: seal})
	if err != nil {
		t.Fatal(err)
	}
	g := step.Grant()
	if step.Secret().JSON() != nil || g.Sealed == "" || g.Collector != seal.Collector || !g.Collected.IsZero() {
		t.Errorf("a sealed step gave %d bytes and %+v, want none, with its collector", len(step.Secret().JSON()), g)
	}
	var again *agent.Repeated
	if _, err := d.Begin(ctx, agent.Call{Tool: "db", IdempotencyKey: "k", Seal: seal}); !errors.As(err, &again) || again.Grant.ID != g.ID {
		t.Errorf("the same key again = %v, want the same grant", err)
	}
	var p *agent.Error
	for what, other := range map[string]*agent.Seal{"no seal": nil, "another key": {Key: sealKey(t).Public(), Collector: seal.Collector}, "another collector": {Key: seal.Key}} {
		if _, err := d.Begin(ctx, agent.Call{Tool: "db", IdempotencyKey: "k", Seal: other}); !errors.As(err, &p) || p.Code != "key_other_seal" {
			t.Errorf("the same key with %s = %v, want key_other_seal", what, err)
		}
	}
	for _, name := range []string{"thief", "root"} {
		if _, err := w.agent(t, name).Collect(ctx, g.ID, key); !errors.As(err, &p) || p.Code != "grant_unknown" {
			t.Errorf("Collect by %s = %v, want grant_unknown", name, err)
		}
	}
	worker := w.agent(t, "worker")
	secret, err := worker.Collect(ctx, g.ID, key)
	if err != nil || !w.target.Login(secret.JSON()) {
		t.Fatalf("Collect = %v, want a secret that works", err)
	}
	if text := fmt.Sprintf("%v %+v %#v %s", key, key, key, struct{ K *agent.SealKey }{key}); strings.Contains(text, "D:") || !strings.Contains(text, "redacted") {
		t.Error("a seal key prints")
	}
	if _, err := worker.Collect(ctx, g.ID, key); !errors.Is(err, agent.ErrConflict) || !errors.As(err, &p) || p.Code != "already_collected" {
		t.Errorf("Collect again = %v, want already_collected", err)
	}
	if err := step.Close(ctx); err != nil || w.target.Login(secret.JSON()) {
		t.Errorf("after Close = %v the secret works", err)
	}
	if _, err := d.Begin(ctx, agent.Call{Tool: "db", Seal: &agent.Seal{Key: key.Public(), Collector: "spiffe://elsewhere.org/worker"}}); !errors.As(err, &p) || p.Code != "foreign_trust_domain" {
		t.Errorf("a collector in another trust domain = %v, want foreign_trust_domain", err)
	}
}

// TestWrongSealKey checks that no other key opens a sealed secret. The collection counts all the same.
func TestWrongSealKey(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	c := w.agent(t, "root")
	d, err := c.Open(ctx, agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "db", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	step, err := d.Begin(ctx, agent.Call{Tool: "db", Seal: &agent.Seal{Key: sealKey(t).Public()}})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := c.Collect(ctx, step.Grant().ID, sealKey(t)); err == nil {
		t.Errorf("Collect with another key gave %v, want an error", s)
	}
}

// TestSealKeys checks that a key must be public, on P-256, for this use, and in its one spelling.
func TestSealKeys(t *testing.T) {
	good := string(sealKey(t).Public())
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	okp, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwk := func(key any) string {
		raw, err := jose.JSONWebKey{Key: key}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	replace := func(a, b string) string {
		out := strings.Replace(good, a, b, 1)
		if out == good {
			t.Fatalf("the key %s has no %q", good, a)
		}
		return out
	}
	for name, row := range map[string]struct {
		key string
		ok  bool
	}{
		"good":          {good, true},
		"bare":          {jwk(private.Public()), true},
		"with a kid":    {replace(`"kty"`, `"kid":"k","kty"`), true},
		"private":       {jwk(private), false},
		"P-384":         {jwk(other.Public()), false},
		"Ed25519":       {jwk(okp), false},
		"symmetric":     {jwk([]byte("0123456789abcdef")), false},
		"for signing":   {replace(`"enc"`, `"sig"`), false},
		"another alg":   {replace(`"ECDH-ES"`, `"ECDH-ES+A256KW"`), false},
		"key_ops":       {replace(`"kty"`, `"key_ops":["sign"],"kty"`), false},
		"not a point":   {`{"kty":"EC","crv":"P-256","x":"` + strings.Repeat("A", 43) + `","y":"` + strings.Repeat("A", 43) + `"}`, false},
		"short":         {`{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}`, false},
		"padded":        {replace(`","y"`, `=","y"`), false},
		"given twice":   {replace(`"kty":"EC"`, `"kty":"EC","kty":"EC"`), false},
		"in capitals":   {replace(`"kty"`, `"KTY"`), false},
		"empty":         {`{}`, false},
		"not an object": {`"key"`, false},
		"too large":     {replace(`"kty"`, `"kid":"`+strings.Repeat("k", 1100)+`","kty"`), false},
		"trailing data": {good + good, false},
	} {
		if _, print, err := server.ParseSealKey([]byte(row.key)); (err == nil) != row.ok || row.ok && print == "" {
			t.Errorf("ParseSealKey(%s) = %v, want good: %v", name, err, row.ok)
		}
	}
}

func TestSealRequest(t *testing.T) {
	const path = "/v1/delegations/" + string(delegationID) + "/steps"
	key := string(sealKey(t).Public())
	for _, row := range []struct {
		seal   string
		status int
	}{
		{`{"key":` + key + `}`, 201},
		{`{"key":` + key + `,"collector":"spiffe://example.org/worker"}`, 201},
		{`{"key":` + key + `,"collector":"spiffe://example.org"}`, 400},
		{`{"key":` + key + `,"collector":"worker"}`, 400},
		{`{"key":` + key + `,"collector":"spiffe://example.org/` + strings.Repeat("a", 2100) + `"}`, 400},
		{`{"collector":"spiffe://example.org/worker"}`, 400},
		{`{"key":null}`, 400},
	} {
		w := newRig(t).ask("agents", "POST", path, `{"tool":"postgres","seal":`+row.seal+`}`)
		if w.Code != row.status || strings.Contains(w.Body.String(), marker) {
			t.Errorf("a step with seal %.80s = %d %.200s, want %d and no secret", row.seal, w.Code, w.Body, row.status)
		}
	}
}

func TestCollectRequest(t *testing.T) {
	const path = "/v1/grants/" + string(grantID) + "/collect"
	if out := decoded[api.Collected](t, newRig(t).ask("agents", "POST", path, `{}`)); out.JWE != "a.b.c.d.e" || out.Grant.ID != string(grantID) {
		t.Errorf("collect = %+v, want the sealed secret", out)
	}
	r := newRig(t)
	r.fake.err = broker.Errorf(broker.Conflict, "collect", "again").With(broker.CodeAlreadyCollected)
	if p := problem(t, r.ask("agents", "POST", path, `{}`)); p.Status != 409 || p.Code != "already_collected" {
		t.Errorf("collect again = %+v, want 409", p)
	}
}

func FuzzSealKey(f *testing.F) {
	f.Add(sealKey(f).Public())
	f.Add([]byte(`{"kty":"EC","crv":"P-256","x":"","y":""}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		key, print, err := server.ParseSealKey(raw)
		if err != nil {
			return
		}
		// go-jose must agree: the same key, public, with the same thumbprint.
		var k jose.JSONWebKey
		if err := k.UnmarshalJSON(raw); err != nil || !k.IsPublic() || !k.Valid() {
			t.Fatalf("%q was accepted, but go-jose returns %v", raw, err)
		}
		if other, ok := k.Key.(*ecdsa.PublicKey); !ok || !other.Equal(key) {
			t.Fatalf("go-jose reads another key from %q", raw)
		}
		if digest, err := k.Thumbprint(crypto.SHA256); err != nil || base64.RawURLEncoding.EncodeToString(digest) != print {
			t.Fatalf("thumbprint of %q = %s, want %x, %v", raw, print, digest, err)
		}
	})
}
