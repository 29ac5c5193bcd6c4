package vault_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
)

// wrappedMint returns a mint of a token that asks for a wrapped response.
func wrappedMint(path broker.VaultPath) broker.Mint {
	m := plainMint(path)
	m.Leased, m.Auth, m.Wrap = false, true, true
	m.Finish = func(data map[string]any, _ time.Time) (broker.Finished, error) {
		token, _ := data["token"].(string)
		inside, _ := data["auth"].(map[string]any)
		if inside["accessor"] != data["wrapped_accessor"] {
			return broker.Finished{}, errors.New("the wrapped token is not described")
		}
		ref := fmt.Sprint(data["wrapped_accessor"], ",", data["accessor"])
		return broker.Finished{Secret: broker.NewSecret([]byte(token)), Ref: ref}, nil
	}
	return m
}

// TestMintWrapped checks the outcome of each response to a wrapped mint. In every case the client sends the mint once,
// and it revokes a wrapping token that it refuses.
func TestMintWrapped(t *testing.T) {
	const response = `{"data":null,"auth":null,"wrap_info":{"token":"` + marker + `","accessor":"acc-w","ttl":60,` +
		`"creation_path":"auth/token/own/app","wrapped_accessor":"acc-i"}}`
	const inside = `{"data":{"accessor":"acc-i","path":"auth/token/own/app","type":"service",` +
		`"orphan":false,"ttl":60,"policies":["p"]}}`
	const bare = `{"auth":{"client_token":"` + marker + `","accessor":"acc-i","lease_duration":60,"token_type":"service"}}`
	in := func(old, new string) [2]string { return [2]string{response, strings.Replace(inside, old, new, 1)} }
	out := func(old, new string) [2]string { return [2]string{strings.Replace(response, old, new, 1), inside} }
	for name, row := range map[string]struct {
		bodies [2]string // of the mint and of the look-up
		ok     bool
	}{
		"good":                 {out("", ""), true},
		"not wrapped":          {[2]string{bare, inside}, false},
		"both":                 {out(`"auth":null`, `"auth":{"client_token":"x","accessor":"y"}`), false},
		"data beside it":       {out(`"data":null`, `"data":{}`), false},
		"another path":         {out("own/app", "own/apps"), false},
		"made by wrapping":     {out("auth/token/own/app", "sys/wrapping/wrap"), false},
		"no path":              {out(`"auth/token/own/app"`, `""`), false},
		"too long":             {out(`"ttl":60`, `"ttl":61`), false},
		"endless":              {out(`"ttl":60`, `"ttl":0`), false},
		"no accessor inside":   {out(`,"wrapped_accessor":"acc-i"`, ""), false},
		"no accessor":          {out(`"acc-w"`, `""`), false},
		"one accessor":         {out(`"acc-w"`, `"acc-i"`), false},
		"no token":             {out(`"`+marker+`"`, `""`), false},
		"twice":                {out(`"accessor"`, `"accessor":"b","accessor"`), false},
		"in capitals":          {out(`"wrapped_accessor"`, `"Wrapped_Accessor":"b","wrapped_accessor"`), false},
		"another token inside": {in("acc-i", "acc-x"), false},
		"made elsewhere":       {in("own/app", "create"), false},
		"an orphan inside":     {in("false", "true"), false},
		"orphan or not":        {in(`"orphan":false,`, ""), false},
		"a batch token inside": {in("service", "batch"), false},
		"inside too long":      {in("60", "61"), false},
		"endless inside":       {in("60", "0"), false},
		"no such token inside": {[2]string{response, `{"errors":["invalid accessor"]}`}, false},
		"an empty look-up":     {[2]string{response, `{"data":null}`}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var calls []string // X-Vault-Wrap-TTL of the mint, and the accessors that were revoked
			f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
				var body struct{ Accessor string }
				_ = json.NewDecoder(r.Body).Decode(&body) // the mint names no accessor
				mu.Lock()
				defer mu.Unlock()
				switch {
				case strings.HasSuffix(r.URL.Path, "/own/app"):
					calls = append(calls, "wrap "+r.Header.Get("X-Vault-Wrap-TTL"))
					respond(200, row.bodies[0])(w, r)
				case strings.HasSuffix(r.URL.Path, "/lookup-accessor"):
					respond(200, row.bodies[1])(w, r)
				default:
					calls = append(calls, "revoke "+body.Accessor)
					respond(204, "")(w, r)
				}
			})
			c := f.client(t, nil)
			h := child(t, c, rootID, time.Minute, "pawl-tool-a")
			lease, secret, err := c.Mint(t.Context(), h, wrappedMint(brokertest.Path("auth/token/own/app")))
			if (err == nil) != row.ok || errors.Is(err, broker.ErrNotMinted) ||
				err != nil && strings.Contains(err.Error(), marker) {
				t.Errorf("Mint() = %v, want ok = %v, and otherwise an unknown outcome", err, row.ok)
			}
			if err == nil && (string(secret.Reveal()) != marker || lease.Ref != "acc-i,acc-w" ||
				time.Until(lease.Expires) > time.Minute) {
				t.Errorf("Mint() = %+v, want the lease of the response", lease)
			}
			if err != nil && !secret.Empty() {
				t.Error("Mint() returned a secret with its error")
			}
			want := "wrap 60s"
			if !row.ok && strings.Contains(row.bodies[0], `"acc-w"`) && name != "twice" && name != "in capitals" {
				want += ",revoke acc-w"
			}
			mu.Lock()
			defer mu.Unlock()
			// With one accessor for both tokens, revoking the wrapped token is as good.
			if got := strings.Join(calls, ","); got != want && !(name == "one accessor" && got == "wrap 60s,revoke acc-i") {
				t.Errorf("requests = %q, want %q", got, want)
			}
		})
	}
	// The client refuses a wrapped response that it did not ask for. It asks for one only with a mint of a token.
	f := newFake(t, respond(200, response))
	c := f.client(t, nil)
	m := wrappedMint(brokertest.Path("auth/token/own/app"))
	m.Wrap = false
	if _, _, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m); err == nil {
		t.Error("Mint() accepted a wrapped response that it did not ask for")
	}
	m.Wrap, m.Auth = true, false
	_, _, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m)
	if !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() of a wrapped lease = %v, want ErrNotMinted", err)
	}
}

// TestRealWrap mints a wrapped token from a real Vault, where the tool's policy allows no unwrapped response. It then
// revokes both tokens by the accessors in the lease.
func TestRealWrap(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	name := s.setup.TokenRole + "-app"
	tool := vault.Access{Policy: "pawl-tool-" + name, Path: brokertest.Path("auth/token/create/" + name),
		Write: true, Wrap: true}
	s.setup.Tools = append(s.setup.Tools, tool)
	if _, err := vault.Setup(t.Context(), s.admin, s.setup); err != nil {
		t.Fatalf("Setup() = %v", err)
	}
	s.write(t, "auth/token/roles/"+name, map[string]any{"allowed_policies": []string{name}, "orphan": false,
		"renewable": false, "token_no_default_policy": true})
	c := newClient(t, s.config())
	branch(t, c, delegation(rootID, ""), tool.Policy)
	mint := func(m broker.Mint) (broker.Lease, error) {
		m.Data = map[string]any{"policies": []string{name}, "ttl": "60s", "explicit_max_ttl": "60s", "renewable": false}
		lease, secret, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, tool.Policy), m)
		if err == nil && secret.Empty() {
			t.Error("Mint() returned an empty secret")
		}
		return lease, err
	}
	lease, err := mint(wrappedMint(tool.Path))
	if err != nil {
		t.Fatalf("Mint() = %v", err)
	}
	both := strings.Split(lease.Ref, ",")
	if gone, err := c.TokensGone(t.Context(), both); err != nil || countTrue(gone) != 0 || len(both) != 2 {
		t.Fatalf("TokensGone(%d accessors) = %v, %v, want both known", len(both), gone, err)
	}
	for _, accessor := range both {
		if err := c.Kill(t.Context(), accessor); err != nil {
			t.Errorf("Kill() = %v", err)
		}
	}
	if gone, err := s.rootClient(t).TokensGone(t.Context(), both); err != nil || countTrue(gone) != 2 {
		t.Errorf("TokensGone() after Kill() = %v, %v, want both gone", gone, err)
	}
	bare := wrappedMint(tool.Path)
	bare.Wrap = false
	if _, err := mint(bare); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() without wrapping = %v, want ErrNotMinted: the policy must refuse it", err)
	}
}
