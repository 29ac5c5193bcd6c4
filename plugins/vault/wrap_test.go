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
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
)

// wrapped is a mint of a token whose answer is to be wrapped.
func wrapped(path ...string) broker.Mint {
	m := plain(path...)
	m.Leased, m.Auth, m.Wrap = false, true, true
	m.Finish = func(data map[string]any, _ time.Time) (broker.Finished, error) {
		token, _ := data["token"].(string)
		inside, _ := data["auth"].(map[string]any)
		if inside["accessor"] != data["wrapped_accessor"] {
			return broker.Finished{}, errors.New("what is inside is not shown")
		}
		ref := fmt.Sprint(data["wrapped_accessor"], ",", data["accessor"])
		return broker.Finished{Secret: broker.NewSecret([]byte(token)), Ref: ref}, nil
	}
	return m
}

// TestMintWrapped holds the rows of a mint whose answer Vault keeps. Whatever is wrong, the mint
// was sent once and a wrapping token that is known is ended.
func TestMintWrapped(t *testing.T) {
	const answer = `{"data":null,"auth":null,"wrap_info":{"token":"` + marker + `","accessor":"acc-w","ttl":60,` +
		`"creation_path":"auth/token/own/app","wrapped_accessor":"acc-i"}}`
	const inside = `{"data":{"accessor":"acc-i","path":"auth/token/own/app","type":"service","orphan":false,"ttl":60,"policies":["p"]}}`
	in := func(old, new string) [2]string { return [2]string{answer, strings.Replace(inside, old, new, 1)} }
	out := func(old, new string) [2]string { return [2]string{strings.Replace(answer, old, new, 1), inside} }
	for name, row := range map[string]struct {
		says [2]string
		ok   bool
	}{
		"good":                     {out("", ""), true},
		"not wrapped":              {[2]string{`{"auth":{"client_token":"` + marker + `","accessor":"acc-i","lease_duration":60,"token_type":"service"}}`, inside}, false},
		"both":                     {out(`"auth":null`, `"auth":{"client_token":"x","accessor":"y"}`), false},
		"data beside it":           {out(`"data":null`, `"data":{}`), false},
		"another path":             {out("own/app", "own/apps"), false},
		"made by wrapping":         {out("auth/token/own/app", "sys/wrapping/wrap"), false},
		"no path":                  {out(`"auth/token/own/app"`, `""`), false},
		"too long":                 {out(`"ttl":60`, `"ttl":61`), false},
		"endless":                  {out(`"ttl":60`, `"ttl":0`), false},
		"no accessor inside":       {out(`,"wrapped_accessor":"acc-i"`, ""), false},
		"no accessor":              {out(`"acc-w"`, `""`), false},
		"one accessor":             {out(`"acc-w"`, `"acc-i"`), false},
		"no token":                 {out(`"`+marker+`"`, `""`), false},
		"twice":                    {out(`"accessor"`, `"accessor":"b","accessor"`), false},
		"in capitals":              {out(`"wrapped_accessor"`, `"Wrapped_Accessor":"b","wrapped_accessor"`), false},
		"another token inside":     {in("acc-i", "acc-x"), false},
		"made elsewhere":           {in("own/app", "create"), false},
		"an orphan inside":         {in("false", "true"), false},
		"orphan or not":            {in(`"orphan":false,`, ""), false},
		"a batch token inside":     {in("service", "batch"), false},
		"inside too long":          {in("60", "61"), false},
		"endless inside":           {in("60", "0"), false},
		"no such token inside":     {[2]string{answer, `{"errors":["invalid accessor"]}`}, false},
		"the look-up says nothing": {[2]string{answer, `{"data":null}`}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var asked []string // X-Vault-Wrap-TTL of the mint; accessors that were ended
			f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
				var body struct{ Accessor string }
				_ = json.NewDecoder(r.Body).Decode(&body) // the mint's has none
				mu.Lock()
				defer mu.Unlock()
				switch {
				case strings.HasSuffix(r.URL.Path, "/own/app"):
					asked = append(asked, "for "+r.Header.Get("X-Vault-Wrap-TTL"))
					say(200, row.says[0])(w, r)
				case strings.HasSuffix(r.URL.Path, "/lookup-accessor"):
					say(200, row.says[1])(w, r)
				default:
					asked = append(asked, "end "+body.Accessor)
					say(204, "")(w, r)
				}
			})
			c := f.client(t, nil)
			lease, secret, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), wrapped("auth", "token", "own", "app"))
			if (err == nil) != row.ok || errors.Is(err, broker.ErrNotMinted) || err != nil && strings.Contains(err.Error(), marker) {
				t.Errorf("Mint() = %v, want ok %v, and otherwise an unknown outcome", err, row.ok)
			}
			if err == nil && (string(secret.Reveal()) != marker || lease.Ref != "acc-i,acc-w" || time.Until(lease.Expires) > time.Minute) {
				t.Errorf("Mint() = %+v", lease)
			}
			if err != nil && !secret.Empty() {
				t.Error("Mint() gave a secret with its error")
			}
			want := "for 60s"
			if !row.ok && row.says[0] != "" && strings.Contains(row.says[0], `"acc-w"`) && name != "twice" && name != "in capitals" {
				want += ",end acc-w"
			}
			mu.Lock()
			defer mu.Unlock()
			// An accessor that is the token's own ends the token: as good.
			if got := strings.Join(asked, ","); got != want && !(name == "one accessor" && got == "for 60s,end acc-i") {
				t.Errorf("the fake was asked %q, want %q", got, want)
			}
		})
	}
	// Where a wrapping is not asked for, one is refused; and none can be asked for what is no token.
	f := newFake(t, say(200, answer))
	c := f.client(t, nil)
	m := wrapped("auth", "token", "own", "app")
	m.Wrap = false
	if _, _, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m); err == nil {
		t.Error("Mint() took a wrapping that nobody asked for")
	}
	m.Wrap, m.Auth = true, false
	if _, _, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() of a wrapped lease = %v, want ErrNotMinted", err)
	}
}

// TestRealWrap mints wrapped from a real Vault, whose policy for the tool gives the answer in no
// other way, and ends both tokens by what the lease names.
func TestRealWrap(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	name := s.setup.TokenRole + "-app"
	tool := vault.Access{Policy: "pawl-tool-" + name, Path: []string{"auth", "token", "create", name}, Write: true, Wrap: true}
	s.setup.Tools = append(s.setup.Tools, tool)
	if _, err := vault.Setup(t.Context(), s.admin, s.setup); err != nil {
		t.Fatalf("Setup() = %v", err)
	}
	s.write(t, "auth/token/roles/"+name, map[string]any{"allowed_policies": []string{name}, "orphan": false, "renewable": false, "token_no_default_policy": true})
	c := open(t, s.config())
	branch(t, c, delegation(rootID, ""), tool.Policy)
	mint := func(m broker.Mint) (broker.Lease, error) {
		m.Data = map[string]any{"policies": []string{name}, "ttl": "60s", "explicit_max_ttl": "60s", "renewable": false}
		lease, secret, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, tool.Policy), m)
		if err == nil && secret.Empty() {
			t.Error("Mint() gave nothing")
		}
		return lease, err
	}
	lease, err := mint(wrapped(tool.Path...))
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
	if gone, err := s.root(t).TokensGone(t.Context(), both); err != nil || countTrue(gone) != 2 {
		t.Errorf("TokensGone() after Kill() = %v, %v, want both gone", gone, err)
	}
	bare := wrapped(tool.Path...)
	bare.Wrap = false
	if _, err := mint(bare); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("a step's token makes a token that is not wrapped: %v, want Vault's refusal", err)
	}
}
