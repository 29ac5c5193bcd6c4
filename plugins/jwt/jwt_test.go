package jwt_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
	"github.com/hashicorp/vault/api"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const issuer = "https://pawl.example.org"

type reader struct{ *api.Client }

func (r reader) Read(ctx context.Context, path broker.VaultPath) (map[string]any, error) {
	s, err := r.Logical().ReadWithContext(ctx, path.String())
	if err != nil || s == nil {
		return nil, err
	}
	return s.Data, nil
}

type nothing struct{}

func (nothing) Read(context.Context, broker.VaultPath) (map[string]any, error) { return nil, nil }

func always(context.Context, broker.GrantID) (bool, error) { return true, nil }

func newBackend(t *testing.T, v jwt.Reader, now func() time.Time) *jwt.Backend {
	t.Helper()
	b, err := jwt.New(jwt.Config{Vault: v, Issuer: issuer, Now: now, Active: always})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tool(mount string, settings map[string]string, args ...string) broker.Tool {
	t := broker.Tool{Name: "orders", Backend: "jwt", Path: brokertest.Path(mount + "/agents"), Settings: settings, Arguments: map[string]broker.Parameter{}}
	for _, a := range args {
		name, kind, _ := strings.Cut(a, ":")
		t.Arguments[name] = broker.Parameter{Kind: kind, Required: true}
	}
	return t
}

func TestLoad(t *testing.T) {
	b := newBackend(t, nothing{}, nil)
	aud := map[string]string{"audience": "orders"}
	for i, row := range []struct {
		tool broker.Tool
		ok   bool
	}{
		{tool("transit", aud), true}, {tool("transit", aud, "other:integer"), true},
		{tool("transit", map[string]string{"audience": "orders", "scope": "read write"}), true},
		{tool("transit", map[string]string{"arg.to": "audience", "arg.may": "scope"}, "to:string", "may:list"), true},
		{tool("transit", nil), false}, {tool("transit/x", aud), false}, {tool("transit/y/z", aud), false},
		{tool("transit", map[string]string{"audience": ""}), false},
		{tool("transit", map[string]string{"audience": "a", "outlives": "10m"}), true},
		{tool("transit", map[string]string{"audience": "a", "outlives": "0s"}), false},
		{tool("transit", map[string]string{"audience": "a b"}), false},
		{tool("transit", map[string]string{"audience": "{{to}}"}), false},
		{tool("transit", map[string]string{"audience": strings.Repeat("a", 1024)}), true},
		{tool("transit", map[string]string{"audience": strings.Repeat("a", 1025)}), false},
		{tool("transit", map[string]string{"audience": "a", "arg.to": "audience"}, "to:string"), false},
		{tool("transit", map[string]string{"arg.to": "audience"}), false},
		{tool("transit", map[string]string{"arg.to": "audience"}, "to:list"), false},
		{tool("transit", map[string]string{"audience": "a", "arg.to": "sub"}, "to:string"), false},
		{tool("transit", map[string]string{"audience": "a", "alg": "none"}), false},
	} {
		if err := b.Load(row.tool); (err == nil) != row.ok {
			t.Errorf("row %d: Load(%v) = %v, want ok %v", i, row.tool.Settings, err, row.ok)
		}
	}
	for _, cfg := range []jwt.Config{{Issuer: issuer, Active: always}, {Vault: nothing{}, Active: always}, {Vault: nothing{}, Issuer: issuer},
		{Vault: nothing{}, Issuer: "http://a", Active: always}} {
		if _, err := jwt.New(cfg); err == nil {
			t.Errorf("New(%+v) succeeded", cfg)
		}
	}
}

// engine is a real transit engine.
type engine struct {
	*api.Client
	mount string
}

var count atomic.Int64

func newEngine(t *testing.T, kind string) *engine {
	t.Helper()
	c, err := parts.NeedVault(t).Client()
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{c, fmt.Sprintf("transit-%d", count.Add(1))}
	e.write(t, "sys/mounts/"+e.mount, map[string]any{"type": "transit"})
	e.write(t, e.mount+"/keys/agents", map[string]any{"type": kind})
	return e
}

func (e *engine) write(t *testing.T, path string, data map[string]any) map[string]any {
	t.Helper()
	s, err := e.Logical().WriteWithContext(t.Context(), path, data)
	if err != nil {
		t.Fatalf("writing %q: %v", path, err)
	}
	if s == nil {
		return nil
	}
	return s.Data
}

// public returns the public key of a version, as a verifier has it.
func (e *engine) public(t *testing.T, version string) *ecdsa.PublicKey {
	t.Helper()
	data, err := reader{e.Client}.Read(t.Context(), brokertest.Path(e.mount+"/keys/agents"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(data["keys"].(map[string]any)[version].(map[string]any)["public_key"].(string)))
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*ecdsa.PublicKey)
}

func grant(t *testing.T, values map[string]args.Value) broker.Grant {
	t.Helper()
	args, err := args.New(values)
	if err != nil {
		t.Fatal(err)
	}
	return broker.Grant{ID: "gr000000000000000000000001", Chain: "ch000000000000000000000001", Args: args,
		Caller: spiffeid.RequireFromString("spiffe://example.org/agent"), Expires: time.Now().Add(time.Minute)}
}

type verified struct {
	josejwt.Claims
	Scope string `json:"scope"`
	Chain string `json:"pawl_chain"`
	Args  string `json:"pawl_args"`
}

// verify does the checks of a service: the key by its kid, a fixed algorithm, one audience, the time.
func verify(token, kid, audience string, key *ecdsa.PublicKey, at time.Time) (v verified, err error) {
	parsed, err := josejwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return v, err
	}
	if parsed.Headers[0].KeyID != kid {
		return v, fmt.Errorf("kid %q", parsed.Headers[0].KeyID)
	}
	if err := parsed.Claims(key, &v); err != nil {
		return v, err
	}
	return v, v.ValidateWithLeeway(josejwt.Expected{Issuer: issuer, AnyAudience: josejwt.Audience{audience}, Time: at}, 0)
}

// TestRealToken signs with a real Vault, across a rotation of the key, and tries out-of-scope uses.
func TestRealToken(t *testing.T) {
	e := newEngine(t, "ecdsa-p256")
	now := time.Now()
	b := newBackend(t, reader{e.Client}, func() time.Time { return now })
	tl := tool(e.mount, map[string]string{"arg.to": "audience", "arg.may": "scope"}, "to:string", "may:list", "id:integer")
	g := grant(t, map[string]args.Value{"to": args.String("orders"), "may": args.List("read", "list"), "id": args.Int(7)})
	token := func() string {
		t.Helper()
		m, name, err := b.Prepare(t.Context(), tl, g)
		if err != nil || name != string(g.ID) || m.Leased {
			t.Fatalf("Prepare() = %q, %v", name, err)
		}
		f, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{})
		if err != nil || f.Ref != string(g.ID) || f.Expires.After(g.Expires) || g.Expires.Sub(f.Expires) > time.Second {
			t.Fatalf("Finish() = %q until %v, %v", f.Ref, f.Expires, err)
		}
		var s struct {
			Token string `json:"token"`
		}
		if err := json.Unmarshal(f.Secret.Reveal(), &s); err != nil {
			t.Fatal(err)
		}
		if want := []broker.ValueDigest{broker.DigestValue(s.Token)}; !slices.Equal(f.Digests, want) {
			t.Errorf("Finish() returns the digests %v, want %v, the token's", f.Digests, want)
		}
		return s.Token
	}
	first, key := token(), e.public(t, "1")
	v, err := verify(first, "agents:1", "orders", key, now)
	if err != nil || v.Subject != "spiffe://example.org/agent" || v.ID != string(g.ID) || v.Scope != "read list" ||
		v.Chain != string(g.Chain) || v.Args != fmt.Sprintf("%x", g.Args.Digest()) || len(v.Audience) != 1 {
		t.Fatalf("verify() = %+v, %v", v, err)
	}
	pieces := strings.Split(first, ".")
	other := grant(t, map[string]args.Value{"to": args.String("billing"), "may": args.List("write"), "id": args.Int(7)})
	m, _, err := b.Prepare(t.Context(), tl, other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Finish(map[string]any{"signature": "vault:v1:" + pieces[2]}, time.Time{}); err == nil {
		t.Error("Finish() accepted the signature of another token")
	}
	altered := pieces[0] + "." + strings.Replace(pieces[1], "A", "B", 1) + "." + pieces[2]
	for _, row := range []struct {
		name, token, audience string
		at                    time.Time
	}{
		{"at another service", first, "billing", now},
		{"after its end", first, "orders", now.Add(2 * time.Minute)},
		{"with another claim", altered, "orders", now},
	} {
		if _, err := verify(row.token, "agents:1", row.audience, key, row.at); err == nil {
			t.Errorf("out of scope, %s: the verifier accepted the token", row.name)
		}
	}
	if got, err := b.Verify(t.Context(), tl, first); err != nil || got.Grant != g.ID || got.Audience != "orders" || got.Expires != g.Expires.Unix() {
		t.Errorf("Verify() = %+v, %v; want the grant's token", got, err)
	}
	elsewhere := tl
	elsewhere.Name = "billing"
	for name, row := range map[string]struct {
		tool  broker.Tool
		token string
	}{"altered": {tl, altered}, "of another tool": {elsewhere, first}, "no token": {tl, "a.b.c"},
		"broken into lines": {tl, first[:4] + "\n" + first[4:]}, "too long": {tl, first + strings.Repeat("A", 8<<10)}} {
		if _, err := b.Verify(t.Context(), row.tool, row.token); err == nil {
			t.Errorf("Verify() accepted a token that is %s", name)
		}
	}
	e.write(t, e.mount+"/keys/agents/rotate", nil)
	if _, err := verify(token(), "agents:1", "orders", key, now); err != nil {
		t.Errorf("before the key is read again: %v", err)
	}
	now, g.Expires = now.Add(time.Minute), g.Expires.Add(time.Minute)
	if _, err := verify(token(), "agents:2", "orders", e.public(t, "2"), now); err != nil {
		t.Errorf("after the key's rotation: %v", err)
	}
	if _, err := b.Verify(t.Context(), tl, first); err != nil {
		t.Errorf("Verify() of a token by the previous version = %v, want nil", err)
	}
	e.write(t, e.mount+"/keys/agents/config", map[string]any{"min_decryption_version": 2, "min_encryption_version": 2})
	now = now.Add(2 * time.Minute)
	if _, err := b.Verify(t.Context(), tl, first); err == nil {
		t.Error("Verify() accepted a token by a version that Vault has retired")
	}
}

func TestRealKeyType(t *testing.T) {
	e := newEngine(t, "rsa-2048")
	_, _, err := newBackend(t, reader{e.Client}, nil).Prepare(t.Context(), tool(e.mount, map[string]string{"audience": "a"}), grant(t, nil))
	if !errors.Is(err, broker.Unavailable) {
		t.Errorf("Prepare() with an RSA key = %v, want Unavailable", err)
	}
}

func TestRealArguments(t *testing.T) {
	e := newEngine(t, "ecdsa-p256")
	b := newBackend(t, reader{e.Client}, nil)
	tl := tool(e.mount, map[string]string{"arg.to": "audience", "arg.may": "scope"}, "to:string", "may:list")
	for _, row := range []struct {
		to  string
		may []string
		ok  bool
	}{
		{"orders", []string{"read"}, true}, {"", []string{"read"}, false}, {"a b", []string{"read"}, false}, {"orders", nil, false},
		{"orders", []string{"read write"}, false}, {"orders", []string{"read", ""}, false}, {"orders\x00", []string{"read"}, false}, {"örders", []string{"read"}, false},
	} {
		_, _, err := b.Prepare(t.Context(), tl, grant(t, map[string]args.Value{"to": args.String(row.to), "may": args.List(row.may...)}))
		if (err == nil) != row.ok || err != nil && !errors.Is(err, broker.Malformed) {
			t.Errorf("Prepare(%q, %q) = %v, want ok %v", row.to, row.may, err, row.ok)
		}
	}
}

// TestProve checks that the evidence follows introspection, and that there is none when introspection fails.
func TestProve(t *testing.T) {
	now := time.Now()
	inactive, down := map[broker.GrantID]bool{}, error(nil)
	b, err := jwt.New(jwt.Config{Vault: nothing{}, Issuer: issuer, Now: func() time.Time { return now },
		Active: func(_ context.Context, id broker.GrantID) (bool, error) { return !inactive[id], down }})
	if err != nil {
		t.Fatal(err)
	}
	live, revoked := grant(t, nil), grant(t, nil)
	revoked.ID = "gr000000000000000000000002"
	outcomes := func() string {
		t.Helper()
		e, err := b.Prove(t.Context(), []broker.Grant{live, revoked})
		if err != nil || len(e) != 2 {
			t.Fatalf("Prove() = %v, %v", e, err)
		}
		return string(e[0].Outcome) + "," + string(e[1].Outcome)
	}
	if got := outcomes(); got != "alive,alive" {
		t.Errorf("Prove() = %s", got)
	}
	inactive[revoked.ID] = true
	if got := outcomes(); got != "alive,dead" {
		t.Errorf("Prove() when introspection refuses one = %s", got)
	}
	if e, err := b.Prove(t.Context(), []broker.Grant{revoked}); err != nil || !e[0].Listed {
		t.Errorf("Prove() = %+v, %v, want Listed: only verifiers that call introspection refuse the token", e, err)
	}
	down = errors.New("down")
	if e, err := b.Prove(t.Context(), []broker.Grant{revoked}); err == nil {
		t.Errorf("Prove() when introspection is down = %v, want an error", e)
	}
	now = now.Add(3 * time.Minute)
	if got := outcomes(); got != "dead,dead" {
		t.Errorf("Prove() after the expiry = %s", got)
	}
}

func FuzzRead(f *testing.F) {
	f.Add("eyJhbGciOiJFUzI1NiIsImtpZCI6ImE6MSIsInR5cCI6IkpXVCJ9.eyJqdGkiOiJncjAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMCIsInBhd2xfdG9vbCI6ImEifQ.AAAA")
	f.Fuzz(func(t *testing.T, token string) {
		if got, err := jwt.Read(token); err == nil {
			if _, err := broker.ParseGrantID(string(got.Grant)); err != nil {
				t.Errorf("Read(%q) = %+v, want a grant id or an error", token, got)
			}
		}
	})
}
