package token_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/token"
)

// real is a Vault with two secrets, a policy for each, and a tool with an argument that selects one.
type real struct {
	address string
	http    *http.Client
	root    string // token
	broker  string // token of the broker: it may look up and revoke by accessor, and nothing else
	name    string // unique for each test
	tool    broker.Tool

	mu     sync.Mutex // guards the fields below
	steps  map[broker.GrantID]string
	opened map[string]string // unwrapped tokens, by wrapping token
}

func newReal(t *testing.T) *real {
	server := parts.NeedVault(t)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(server.CAPEM())
	v := &real{address: server.Address(), root: server.RootToken(), name: "token-" + strings.NewReplacer("/", "-", "_", "-").Replace(strings.ToLower(t.Name())), steps: map[broker.GrantID]string{}, opened: map[string]string{},
		http: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, Timeout: 10 * time.Second}}
	t.Cleanup(v.http.CloseIdleConnections)
	v.tool = broker.Tool{Name: "vault.read", Backend: "token", Narrowing: broker.NarrowNative, Path: brokertest.Path("auth/token/create/" + v.name),
		Policy: "pawl-tool-" + v.name, Arguments: map[string]broker.Parameter{"env": {Kind: "string", Required: true}},
		Settings: map[string]string{"policies.env.test": v.name + "-test", "policies.env.prod": v.name + "-prod"}}
	v.must(t, "sys/mounts/"+v.name, map[string]any{"type": "kv"})
	for _, env := range []string{"test", "prod"} {
		v.must(t, v.name+"/"+env, map[string]any{"value": env})
		v.policy(t, v.name+"-"+env, fmt.Sprintf(`path "%s/%s" { capabilities = ["read"] }`, v.name, env))
	}
	v.policy(t, v.tool.Policy, fmt.Sprintf(`path "auth/token/create/%s" { capabilities = ["create", "update"] }`, v.name))
	v.policy(t, "broker-"+v.name, `path "auth/token/lookup-accessor" { capabilities = ["update"] }
path "auth/token/revoke-accessor" { capabilities = ["update"] }`)
	path, role, err := token.Role(v.tool)
	if err != nil {
		t.Fatal(err)
	}
	v.must(t, path.String(), role)
	v.broker, _ = v.make(t.Context(), "broker-"+v.name)
	return v
}

// ask sends one request. Numbers in the response keep their digits, as in plugins/vault.
func (v *real) ask(ctx context.Context, token, method, path string, body any) (status int, answer map[string]any, err error) {
	return v.send(ctx, token, method, path, body, "")
}

// send requests a wrapped response if wrap is not empty: wrap is the TTL of the wrapping token.
func (v *real) send(ctx context.Context, token, method, path string, body any, wrap string) (status int, answer map[string]any, err error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return 0, nil, err
	}
	r, err := http.NewRequestWithContext(ctx, method, v.address+"/v1/"+path, bytes.NewReader(raw))
	if err != nil {
		return 0, nil, err
	}
	r.Header.Set("X-Vault-Token", token)
	if wrap != "" {
		r.Header.Set("X-Vault-Wrap-TTL", wrap)
	}
	resp, err := v.http.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }() // only read
	d := json.NewDecoder(resp.Body)
	d.UseNumber()
	_ = d.Decode(&answer) // 204 has none
	return resp.StatusCode, answer, nil
}

func (v *real) must(t *testing.T, path string, body map[string]any) {
	t.Helper()
	if status, answer, err := v.ask(t.Context(), v.root, "POST", path, body); err != nil || status >= 300 {
		t.Fatalf("writing %s = %d, %v, %v", path, status, answer["errors"], err)
	}
}

func (v *real) policy(t *testing.T, name, text string) {
	t.Helper()
	v.must(t, "sys/policies/acl/"+name, map[string]any{"policy": text})
}

// make creates a token with one policy, as the broker does for a step.
func (v *real) make(ctx context.Context, policy string) (token, accessor string) {
	_, answer, _ := v.ask(ctx, v.root, "POST", "auth/token/create",
		map[string]any{"policies": []string{policy}, "no_default_policy": true, "ttl": "10m", "renewable": false})
	auth, _ := answer["auth"].(map[string]any)
	token, _ = auth["client_token"].(string)
	accessor, _ = auth["accessor"].(string)
	return token, accessor
}

// Kill and TokensGone do the same as those of plugins/vault's Client, with the broker's token.
func (v *real) Kill(ctx context.Context, accessor string) error {
	status, answer, err := v.ask(ctx, v.broker, "POST", "auth/token/revoke-accessor", map[string]string{"accessor": accessor})
	if err == nil && status != 204 && status != 200 && !invalid(status, answer) { // 200 warns of an unknown one
		err = fmt.Errorf("vault answered %d", status)
	}
	return err
}

func (v *real) TokensGone(ctx context.Context, accessors []string) (gone []bool, err error) {
	for _, a := range accessors {
		status, answer, err := v.ask(ctx, v.broker, "POST", "auth/token/lookup-accessor", map[string]string{"accessor": a})
		if err == nil && status != 200 && !invalid(status, answer) {
			err = fmt.Errorf("vault answered %d", status)
		}
		if err != nil {
			return nil, err
		}
		gone = append(gone, status != 200)
	}
	return gone, nil
}

func invalid(status int, answer map[string]any) bool {
	return status == 400 && strings.Contains(fmt.Sprint(answer["errors"]), "invalid accessor")
}

func (v *real) mint(ctx context.Context, g *broker.Grant, m broker.Mint, _ string) (broker.Secret, error) {
	step, accessor := v.make(ctx, v.tool.Policy)
	g.Token.Accessor, g.MintDeadline = accessor, time.Now().Add(time.Minute)
	v.mu.Lock()
	v.steps[g.ID] = accessor
	v.mu.Unlock()
	wrap := ""
	if m.Wrap {
		wrap = fmt.Sprintf("%ds", int64(m.TTL/time.Second))
	}
	status, answer, err := v.send(ctx, step, "POST", m.Path.String(), m.Data, wrap)
	got, ok := answer["auth"].(map[string]any)
	if m.Wrap {
		if got, ok = answer["wrap_info"].(map[string]any); ok {
			got["auth"] = v.lookUp(ctx, got["wrapped_accessor"])
		}
	}
	if err != nil || !ok {
		return broker.Secret{}, fmt.Errorf("vault answered %d %v, %w", status, answer["errors"], err)
	}
	f, err := m.Finish(got, g.Expires)
	g.Lease = broker.Lease{Ref: f.Ref, Expires: g.Expires, Outlives: f.Outlives}
	return f.Secret, err
}

// lookUp returns a token's data as Vault's root token sees it; nil if there is no such token.
func (v *real) lookUp(ctx context.Context, accessor any) map[string]any {
	_, answer, _ := v.ask(ctx, v.root, "POST", "auth/token/lookup-accessor", map[string]any{"accessor": accessor})
	data, _ := answer["data"].(map[string]any)
	return data
}

// members decodes a secret.
func members(s broker.Secret) (m struct {
	Token    string
	Wrapping string `json:"wrapping_token"`
	Path     string `json:"creation_path"`
}) {
	_ = json.Unmarshal(s.Reveal(), &m) // on an error m is empty and gives no access
	return m
}

// raw returns the token of a secret. It unwraps a wrapped token once, like a tool, and remembers it.
func (v *real) raw(ctx context.Context, s broker.Secret) string {
	m := members(s)
	if m.Wrapping == "" {
		return m.Token
	}
	v.mu.Lock()
	token, ok := v.opened[m.Wrapping]
	v.mu.Unlock()
	if ok {
		return token
	}
	_, token, _ = v.unwrap(ctx, m.Wrapping)
	if token != "" {
		v.mu.Lock()
		v.opened[m.Wrapping] = token
		v.mu.Unlock()
	}
	return token
}

func (v *real) unwrap(ctx context.Context, wrapping string) (status int, token string, err error) {
	status, answer, err := v.ask(ctx, wrapping, "POST", "sys/wrapping/unwrap", nil)
	auth, _ := answer["auth"].(map[string]any)
	token, _ = auth["client_token"].(string)
	return status, token, err
}

func (v *real) rig(t *testing.T) brokertest.Rig {
	b, err := token.New(token.Config{Vault: v})
	if err != nil {
		t.Fatal(err)
	}
	wrong := v.tool
	wrong.Path = brokertest.Path("auth/token/create-orphan/" + v.name)
	return brokertest.Rig{Backend: b, Tool: v.tool, Wrong: []broker.Tool{wrong}, Args: grant(t, `{"env":"test"}`).Args,
		Outside: []args.Args{grant(t, `{"env":"dev"}`).Args, {}}, Mint: v.mint,
		End: func(ctx context.Context, g broker.Grant) error {
			v.mu.Lock()
			accessor := v.steps[g.ID]
			v.mu.Unlock()
			if accessor == "" {
				return nil
			}
			return v.Kill(ctx, accessor)
		},
		Works: func(ctx context.Context, _ broker.Grant, s broker.Secret) (bool, error) {
			raw := v.raw(ctx, s)
			if raw == "" {
				return false, nil // it cannot be unwrapped
			}
			status, _, err := v.ask(ctx, raw, "GET", v.name+"/test", nil)
			if status != 200 && status != 403 {
				err = errors.Join(err, fmt.Errorf("vault answered %d", status))
			}
			return status == 200, err
		},
		Credentials: func(ctx context.Context) (int, error) {
			_, answer, err := v.ask(ctx, v.root, "LIST", "auth/token/accessors", nil)
			data, _ := answer["data"].(map[string]any)
			keys, _ := data["keys"].([]any)
			return len(keys), err
		},
	}
}

func TestRealBackend(t *testing.T) {
	for _, wrap := range []string{"true", "false"} {
		t.Run("wrap "+wrap, func(t *testing.T) {
			v := newReal(t)
			v.tool.Settings["wrap"] = wrap
			// The engine creates a step's token, not Prepare, so the count of credentials does not change.
			brokertest.Backend(t, v.rig(t))
		})
	}
}

// TestRealNarrow makes out-of-scope calls with the raw secret. Vault refuses each.
func TestRealNarrow(t *testing.T) {
	for _, wrap := range []string{"true", "false"} {
		t.Run("wrap "+wrap, func(t *testing.T) { testNarrow(t, wrap) })
	}
}

func testNarrow(t *testing.T, wrap string) {
	v := newReal(t)
	v.tool.Settings["uses"], v.tool.Settings["wrap"] = "20", wrap
	r := v.rig(t)
	g := grant(t, `{"env":"test"}`)
	g.Created = time.Now()
	g.Expires = g.Created.Add(30 * time.Second)
	m, name, err := r.Backend.Prepare(t.Context(), v.tool, g)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := v.mint(t.Context(), &g, m, name)
	if err != nil {
		t.Fatal(err)
	}
	raw := v.raw(t.Context(), secret)
	for _, row := range []struct {
		method, path string
		body         any
		want         int
	}{
		{"GET", v.name + "/test", nil, 200},
		{"GET", v.name + "/prod", nil, 403},                                                                  // another environment's secret
		{"POST", v.name + "/test", map[string]string{"value": "x"}, 403},                                     // writing the readable secret
		{"POST", "auth/token/create", map[string]any{}, 403},                                                 // a child token
		{"POST", "auth/token/create/" + v.name, map[string]any{"policies": []string{v.name + "-prod"}}, 403}, // another one of the role
		{"POST", "auth/token/renew-self", map[string]any{}, 403},                                             // a longer life
		{"GET", "auth/token/lookup-self", nil, 403},                                                          // default's rights
		{"GET", "sys/policies/acl/" + v.name + "-test", nil, 403},
		{"GET", v.name + "/test", nil, 200},
	} {
		status, _, err := v.ask(t.Context(), raw, row.method, row.path, row.body)
		if err != nil || status != row.want {
			t.Errorf("%s %s with the raw secret = %d, %v, want %d", row.method, row.path, status, err, row.want)
		}
	}
	accessor, _, _ := strings.Cut(g.Lease.Ref, ",")
	data := v.lookUp(t.Context(), accessor)
	if fmt.Sprint(data["explicit_max_ttl"]) != "30" || fmt.Sprint(data["renewable"]) != "false" || fmt.Sprint(data["num_uses"]) != "11" ||
		!strings.Contains(fmt.Sprint(data["meta"]), string(g.ID)) {
		t.Errorf("the lookup of the token = %v", data)
	}
	// A kill of the step's token ends it.
	if err := r.End(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if works, err := r.Works(t.Context(), g, secret); works || err != nil {
		t.Errorf("after the step's token was killed Vault accepts the secret: %v, %v", works, err)
	}
}

// TestRealWrap unwraps like a tool, and revokes before and after that. In both cases Vault's root token must see no
// token left.
func TestRealWrap(t *testing.T) {
	v := newReal(t)
	r := v.rig(t)
	mint := func() (broker.Grant, broker.Secret) {
		t.Helper()
		g := grant(t, `{"env":"test"}`)
		g.Expires = time.Now().Add(30 * time.Second)
		m, name, err := r.Backend.Prepare(t.Context(), v.tool, g)
		if err != nil || !m.Wrap {
			t.Fatalf("Prepare() = wrap %v, %v, want wrapped by default", m.Wrap, err)
		}
		secret, err := v.mint(t.Context(), &g, m, name)
		if err != nil {
			t.Fatal(err)
		}
		return g, secret
	}
	alive := func(g broker.Grant) (inside, wrapping bool) {
		t.Helper()
		one, other, ok := strings.Cut(g.Lease.Ref, ",")
		if !ok {
			t.Fatalf("the lease names %q, want two accessors", g.Lease.Ref)
		}
		return v.lookUp(t.Context(), one) != nil, v.lookUp(t.Context(), other) != nil
	}
	revoke := func(when string, g broker.Grant, s broker.Secret) {
		t.Helper()
		prove := func(want broker.Outcome) {
			t.Helper()
			found, err := r.Backend.(broker.Prover).Prove(t.Context(), []broker.Grant{g})
			if err != nil || found[0].Outcome != want {
				t.Errorf("Prove(%s) = %v, %v, want %s", when, found, err, want)
			}
		}
		prove(broker.OutcomeAlive)
		if inside, wrapping := alive(g); !inside || wrapping != (when == "before") {
			t.Errorf("%s the unwrap: the token is known: %v, its wrapping token: %v", when, inside, wrapping)
		}
		if err := r.End(t.Context(), g); err != nil { // kills the step's token and nothing else
			t.Fatal(err)
		}
		if inside, wrapping := alive(g); inside || wrapping != (when == "before") {
			t.Errorf("step's token killed %s the unwrap: the token is known: %v, its wrapping token: %v", when, inside, wrapping)
		}
		if err := r.Backend.(broker.Severer).Sever(t.Context(), []broker.Grant{g}); err != nil {
			t.Errorf("Sever(%s) = %v", when, err)
		}
		if inside, wrapping := alive(g); inside || wrapping {
			t.Errorf("severed %s the unwrap: the token is known: %v, its wrapping token: %v", when, inside, wrapping)
		}
		if status, _, err := v.unwrap(t.Context(), members(s).Wrapping); err != nil || status < 400 {
			t.Errorf("severed %s the unwrap: unwrapping = %d, %v", when, status, err)
		}
		prove(broker.OutcomeDead)
	}
	g, secret := mint()
	if m := members(secret); m.Token != "" || m.Wrapping == "" || m.Path != v.tool.Path.String() {
		t.Errorf("the secret is wrapped: %v, created at %q, and unwrapped: %v", m.Wrapping != "", m.Path, m.Token != "")
	}
	revoke("before", g, secret)

	g, secret = mint()
	if status, _, err := v.ask(t.Context(), members(secret).Wrapping, "GET", v.name+"/test", nil); err != nil || status != 403 {
		t.Errorf("reading with the wrapping token = %d, %v, want 403", status, err)
	}
	revoke("after", g, secret) // the request has consumed the wrapping token's one use

	g, secret = mint()
	status, raw, err := v.unwrap(t.Context(), members(secret).Wrapping)
	if err != nil || status != 200 {
		t.Fatalf("unwrapping = %d, %v", status, err)
	}
	if status, _, err := v.unwrap(t.Context(), members(secret).Wrapping); err != nil || status != 400 {
		t.Errorf("unwrapping again = %d, %v, want 400", status, err)
	}
	if status, _, err := v.ask(t.Context(), raw, "GET", v.name+"/test", nil); err != nil || status != 200 {
		t.Errorf("reading with the unwrapped token = %d, %v, want 200", status, err)
	}
	revoke("after", g, secret)
	if status, _, err := v.ask(t.Context(), raw, "GET", v.name+"/test", nil); err != nil || status != 403 {
		t.Errorf("reading with the unwrapped token after the revocation = %d, %v, want 403", status, err)
	}

	// An interceptor that unwraps the token and wraps it again cannot forge the creation path.
	g, secret = mint()
	_, raw, err = v.unwrap(t.Context(), members(secret).Wrapping)
	if err != nil {
		t.Fatal(err)
	}
	_, answer, err := v.send(t.Context(), v.root, "POST", "sys/wrapping/wrap", map[string]string{"client_token": raw}, "30s")
	forged, _ := answer["wrap_info"].(map[string]any)
	_, seen, errSeen := v.ask(t.Context(), v.root, "POST", "sys/wrapping/lookup", map[string]any{"token": forged["token"]})
	data, _ := seen["data"].(map[string]any)
	if err != nil || errSeen != nil || data["creation_path"] != "sys/wrapping/wrap" {
		t.Errorf("the token that was wrapped again has the creation path %v, %v, %v", data["creation_path"], err, errSeen)
	}
	revoke("after", g, secret)
}

// TestRealRole checks that Vault's token role stops a step's token from creating other tokens. It also checks that a
// token is rejected when the role adds to the request.
func TestRealRole(t *testing.T) {
	v := newReal(t)
	step, _ := v.make(t.Context(), v.tool.Policy)
	create := "auth/token/create/" + v.name
	for name, body := range map[string]map[string]any{
		"root":             {"policies": []string{"root"}},
		"the tool's":       {"policies": []string{v.tool.Policy}},
		"the broker's":     {"policies": []string{"broker-" + v.name}},
		"one too many":     {"policies": []string{v.name + "-test", "default"}},
		"without a parent": {"policies": []string{v.name + "-test"}, "no_parent": true},
	} {
		status, answer, err := v.ask(t.Context(), step, "POST", create, body)
		auth, _ := answer["auth"].(map[string]any)
		if err != nil || status < 400 && auth["orphan"] != false {
			t.Errorf("a step's token creates a token with %s: %d, orphan %v, %v", name, status, auth["orphan"], err)
		}
		if status < 400 && name != "without a parent" {
			t.Errorf("a step's token creates a token with %s, want a refusal", name)
		}
	}
	r := v.rig(t)
	path, role, err := token.Role(v.tool)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]any{"orphan": true, "token_no_default_policy": false, "token_num_uses": 7} {
		wider := map[string]any{}
		for k, val := range role {
			wider[k] = val
		}
		wider[name] = value
		v.must(t, path.String(), wider)
		g := grant(t, `{"env":"test"}`)
		g.Expires = time.Now().Add(time.Minute)
		m, display, err := r.Backend.Prepare(t.Context(), v.tool, g)
		if err != nil {
			t.Fatal(err)
		}
		if name == "token_no_default_policy" { // the request must not ask for it either
			delete(m.Data, "no_default_policy")
		}
		if secret, err := v.mint(t.Context(), &g, m, display); err == nil || !secret.Empty() {
			t.Errorf("a token of a role with %s = %v is accepted", name, value)
		}
	}
}

// TestRealObtained obtains another token with the secret, one without a parent, which survives the revocation. With the
// setting outlives the secret is not dead before that has ended.
func TestRealObtained(t *testing.T) {
	for outlives, want := range map[string]broker.Outcome{"": broker.OutcomeDead, "10m": broker.OutcomeUnknown} {
		t.Run(map[bool]string{true: "unset", false: "set"}[outlives == ""], func(t *testing.T) {
			v := newReal(t)
			v.policy(t, v.name+"-test", fmt.Sprintf(`path "auth/token/create-orphan" { capabilities = ["create", "update", "sudo"] }
path "%s/test" { capabilities = ["read"] }`, v.name))
			if outlives != "" {
				v.tool.Settings["outlives"] = outlives
			}
			now := time.Now()
			b, err := token.New(token.Config{Vault: v, Now: func() time.Time { return now }})
			if err != nil {
				t.Fatal(err)
			}
			g := grant(t, `{"env":"test"}`)
			g.Created, g.Expires = now, now.Add(30*time.Second)
			m, name, err := b.Prepare(t.Context(), v.tool, g)
			if err != nil {
				t.Fatal(err)
			}
			secret, err := v.mint(t.Context(), &g, m, name)
			if err != nil {
				t.Fatal(err)
			}
			raw := v.raw(t.Context(), secret)
			_, answer, err := v.ask(t.Context(), raw, "POST", "auth/token/create-orphan", map[string]any{"policies": []string{v.name + "-test"}, "ttl": "10m"})
			auth, _ := answer["auth"].(map[string]any)
			orphan, _ := auth["client_token"].(string)
			if err != nil || orphan == "" {
				t.Fatalf("Vault made no orphan token: %v, %v", answer["errors"], err)
			}
			if err := b.Sever(t.Context(), []broker.Grant{g}); err != nil {
				t.Fatal(err)
			}
			if status, _, err := v.ask(t.Context(), raw, "GET", v.name+"/test", nil); err != nil || status != 403 {
				t.Errorf("the secret after the revocation: %d, %v, want 403", status, err)
			}
			if status, _, err := v.ask(t.Context(), orphan, "GET", v.name+"/test", nil); err != nil || status != 200 {
				t.Errorf("the orphan token after the revocation: %d, %v, want 200", status, err)
			}
			if evidence, err := b.Prove(t.Context(), []broker.Grant{g}); err != nil || evidence[0].Outcome != want {
				t.Errorf("Prove() = %+v, %v, want %s", evidence, err, want)
			}
			now = now.Add(time.Hour)
			if evidence, err := b.Prove(t.Context(), []broker.Grant{g}); err != nil || evidence[0].Outcome != broker.OutcomeDead {
				t.Errorf("later: Prove() = %+v, %v, want dead", evidence, err)
			}
		})
	}
}
