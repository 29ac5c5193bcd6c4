package jwt_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/jwt"
)

// service is a real service that accepts tokens: Vault's JWT auth, with one role for each operation. All its checks are
// Vault's own code.
type service struct {
	*engine
	auth string // its mount
}

func newService(t *testing.T, e *engine, roles map[string]map[string]any) service {
	t.Helper()
	s := service{engine: e, auth: fmt.Sprintf("service-%d", count.Add(1))}
	e.write(t, "sys/auth/"+s.auth, map[string]any{"type": "jwt"})
	data, err := reader{e.Client}.Read(t.Context(), brokertest.Path(e.mount+"/keys/agents"))
	if err != nil {
		t.Fatal(err)
	}
	key := data["keys"].(map[string]any)["1"].(map[string]any)["public_key"].(string)
	if block, _ := pem.Decode([]byte(key)); block == nil {
		t.Fatal("Vault's public key is not PEM")
	}
	e.write(t, "auth/"+s.auth+"/config", map[string]any{"jwt_validation_pubkeys": []string{key}, "bound_issuer": issuer, "jwt_supported_algs": []string{"ES256"}})
	for name, bound := range roles {
		role := map[string]any{"role_type": "jwt", "user_claim": "sub", "token_policies": []string{"default"}, "token_ttl": "1m",
			"expiration_leeway": -1, "not_before_leeway": -1, "clock_skew_leeway": -1}
		for k, v := range bound {
			role[k] = v
		}
		e.write(t, "auth/"+s.auth+"/role/"+name, role)
	}
	return s
}

// login presents a token for a role.
func (s service) login(t *testing.T, role, token string) error {
	t.Helper()
	_, err := s.Logical().WriteWithContext(t.Context(), "auth/"+s.auth+"/login", map[string]any{"role": role, "jwt": token})
	return err
}

// TestRealNarrow makes out-of-scope calls to a real service with the raw token.
func TestRealNarrow(t *testing.T) {
	e := newEngine(t, "ecdsa-p256")
	args := map[string]args.Value{"to": args.String("orders"), "may": args.List("read", "list"), "id": args.Int(7)}
	g := grant(t, args)
	digest := fmt.Sprintf("%x", g.Args.Digest())
	orders := func(claims map[string]any) map[string]any {
		return map[string]any{"bound_audiences": "orders", "bound_subject": g.Caller.String(), "bound_claims": claims}
	}
	s := newService(t, e, map[string]map[string]any{
		"in-scope":      orders(map[string]any{"scope": "read list", "pawl_args": digest, "pawl_tool": "orders"}),
		"write":         orders(map[string]any{"scope": "write"}),
		"other-args":    orders(map[string]any{"pawl_args": strings.Repeat("0", 64)}),
		"other-tool":    orders(map[string]any{"pawl_tool": "billing"}),
		"other-service": {"bound_audiences": "billing"},
		"other-agent":   {"bound_audiences": "orders", "bound_subject": "spiffe://example.org/other"},
	})
	token := func(now time.Time) string {
		t.Helper()
		g := g
		g.Expires = now.Add(time.Minute)
		b := newBackend(t, reader{e.Client}, func() time.Time { return now })
		return e.sign(t, b, tool(e.mount, map[string]string{"arg.to": "audience", "arg.may": "scope"}, "to:string", "may:list", "id:integer"), g)
	}
	good := token(time.Now())
	if err := s.login(t, "in-scope", good); err != nil {
		t.Fatalf("in scope: the service refuses: %v", err)
	}
	pieces := strings.Split(good, ".")
	changed := pieces[0] + "." + strings.Replace(pieces[1], "A", "B", 1) + "." + pieces[2]
	swapped := pieces[0] + "." + pieces[1] + "." + strings.Split(token(time.Now().Add(time.Second)), ".")[2]
	for name, row := range map[string]struct{ role, token string }{
		"more than its scope":            {"write", good},
		"with other arguments":           {"other-args", good},
		"as another tool's":              {"other-tool", good},
		"at another service":             {"other-service", good},
		"as another agent":               {"other-agent", good},
		"after its expiry":               {"in-scope", token(time.Now().Add(-2 * time.Minute))},
		"with a claim changed":           {"in-scope", changed},
		"without its signature":          {"in-scope", pieces[0] + "." + pieces[1] + "."},
		"with another algorithm":         {"in-scope", "eyJhbGciOiJub25lIn0." + pieces[1] + "."},
		"with another token's signature": {"in-scope", swapped},
	} {
		if err := s.login(t, row.role, row.token); err == nil {
			t.Errorf("out of scope, %s: the service accepted the token", name)
		}
	}
}

// sign mints a step's token with Vault.
func (e *engine) sign(t *testing.T, b *jwt.Backend, tl broker.Tool, g broker.Grant) string {
	t.Helper()
	m, _, err := b.Prepare(t.Context(), tl, g)
	if err != nil {
		t.Fatal(err)
	}
	f, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(f.Secret.Reveal(), &s); err != nil {
		t.Fatal(err)
	}
	return s.Token
}

// TestRealLateToken holds docs/promises.md to real verifiers: how long after its end they accept a token.
func TestRealLateToken(t *testing.T) {
	e := newEngine(t, "ecdsa-p256")
	g := grant(t, nil)
	s := newService(t, e, map[string]map[string]any{
		"exact":   {"bound_audiences": "orders"},
		"default": {"bound_audiences": "orders", "expiration_leeway": 0, "not_before_leeway": 0, "clock_skew_leeway": 0},
	})
	for ago, want := range map[time.Duration]string{20 * time.Second: "default go-jose", 4 * time.Minute: ""} {
		issued := time.Now().Add(-ago - time.Minute)
		g := g
		g.Expires = issued.Add(time.Minute)
		b := newBackend(t, reader{e.Client}, func() time.Time { return issued })
		token := e.sign(t, b, tool(e.mount, map[string]string{"audience": "orders"}), g)
		var accepted []string
		for _, role := range []string{"exact", "default"} {
			if s.login(t, role, token) == nil {
				accepted = append(accepted, role)
			}
		}
		var claims josejwt.Claims
		parsed, err := josejwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		if err := parsed.Claims(e.public(t, "1"), &claims); err != nil {
			t.Fatal(err)
		}
		if claims.Validate(josejwt.Expected{Time: time.Now()}) == nil { // its leeway is a minute
			accepted = append(accepted, "go-jose")
		}
		if got := strings.Join(accepted, " "); got != want {
			t.Errorf("%v after its end %q accept the token, want %q", ago, got, want)
		}
		if evidence, err := newBackend(t, reader{e.Client}, nil).Prove(t.Context(), []broker.Grant{g}); err != nil ||
			want != "" && evidence[0].Check == "jwt: token expiry" {
			t.Errorf("Prove() = %+v, %v; want no conclusion from the end while verifiers accept the token", evidence, err)
		}
	}
}

// TestRealExchange exchanges a token at a real service for another one, which survives the revocation. With the setting
// outlives the first is not dead before that has ended.
func TestRealExchange(t *testing.T) {
	e := newEngine(t, "ecdsa-p256")
	s := newService(t, e, map[string]map[string]any{"orders": {"bound_audiences": "orders", "token_ttl": "10m"}})
	for _, outlives := range []string{"", "10m"} {
		settings := map[string]string{"audience": "orders"}
		if outlives != "" {
			settings["outlives"] = outlives
		}
		now, active := time.Now(), true
		b, err := jwt.New(jwt.Config{Vault: reader{e.Client}, Issuer: issuer, Now: func() time.Time { return now },
			Active: func(context.Context, broker.GrantID) (bool, error) { return active, nil }})
		if err != nil {
			t.Fatal(err)
		}
		g := grant(t, nil)
		m, _, err := b.Prepare(t.Context(), tool(e.mount, settings), g)
		if err != nil {
			t.Fatal(err)
		}
		f, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		g.Lease = broker.Lease{Ref: f.Ref, Expires: f.Expires, Outlives: f.Outlives}
		var secret struct{ Token string }
		if err := json.Unmarshal(f.Secret.Reveal(), &secret); err != nil {
			t.Fatal(err)
		}
		session, err := s.Logical().WriteWithContext(t.Context(), "auth/"+s.auth+"/login", map[string]any{"role": "orders", "jwt": secret.Token})
		if err != nil {
			t.Fatal(err)
		}
		active = false // the revocation
		other, err := s.Clone()
		if err != nil {
			t.Fatal(err)
		}
		other.SetToken(session.Auth.ClientToken)
		if _, err := other.Auth().Token().LookupSelfWithContext(t.Context()); err != nil {
			t.Fatalf("the service's own token does not work: %v", err)
		}
		want := map[string]broker.Outcome{"": broker.OutcomeDead, "10m": broker.OutcomeUnknown}[outlives]
		if evidence, err := b.Prove(t.Context(), []broker.Grant{g}); err != nil || evidence[0].Outcome != want {
			t.Errorf("outlives %q: Prove() = %+v, %v, want %s", outlives, evidence, err, want)
		}
		now = now.Add(20 * time.Minute)
		if evidence, err := b.Prove(t.Context(), []broker.Grant{g}); err != nil || evidence[0].Outcome != broker.OutcomeDead {
			t.Errorf("outlives %q, later: Prove() = %+v, %v, want dead", outlives, evidence, err)
		}
	}
}
