package jwt_test

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

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
