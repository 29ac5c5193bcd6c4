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
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/token"
)

// real is a Vault with two secrets, a policy for each, and a tool whose argument chooses one.
type real struct {
	address string
	http    *http.Client
	root    string // token
	broker  string // token of the broker: it may look up and revoke by accessor, and no more
	name    string // unlike any other test's
	tool    broker.Tool

	mu    sync.Mutex // guards steps
	steps map[broker.GrantID]string
}

func newReal(t *testing.T) *real {
	server := parts.NeedVault(t)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(server.CAPEM())
	v := &real{address: server.Address(), root: server.RootToken(), name: "token-" + strings.ToLower(t.Name()), steps: map[broker.GrantID]string{},
		http: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, Timeout: 10 * time.Second}}
	t.Cleanup(v.http.CloseIdleConnections)
	v.tool = broker.Tool{Name: "vault.read", Backend: "token", Narrowing: broker.NarrowNative, Path: []string{"auth", "token", "create", v.name},
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
	v.must(t, strings.Join(path, "/"), role)
	v.broker, _ = v.make(t.Context(), "broker-"+v.name)
	return v
}

// ask sends one request. Numbers of the answer keep their digits, as in plugins/vault.
func (v *real) ask(ctx context.Context, token, method, path string, body any) (status int, answer map[string]any, err error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return 0, nil, err
	}
	r, err := http.NewRequestWithContext(ctx, method, v.address+"/v1/"+path, bytes.NewReader(raw))
	if err != nil {
		return 0, nil, err
	}
	r.Header.Set("X-Vault-Token", token)
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

// make makes a token with one policy, as the broker does for a step.
func (v *real) make(ctx context.Context, policy string) (token, accessor string) {
	_, answer, _ := v.ask(ctx, v.root, "POST", "auth/token/create",
		map[string]any{"policies": []string{policy}, "no_default_policy": true, "ttl": "10m", "renewable": false})
	auth, _ := answer["auth"].(map[string]any)
	token, _ = auth["client_token"].(string)
	accessor, _ = auth["accessor"].(string)
	return token, accessor
}

// Kill and TokensGone are those of plugins/vault's Client, with the broker's token.
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
	g.Token.Accessor, g.Settles = accessor, time.Now().Add(time.Minute)
	v.mu.Lock()
	v.steps[g.ID] = accessor
	v.mu.Unlock()
	status, answer, err := v.ask(ctx, step, "POST", strings.Join(m.Path, "/"), m.Data)
	auth, ok := answer["auth"].(map[string]any)
	if err != nil || !ok {
		return broker.Secret{}, fmt.Errorf("vault answered %d %v, %w", status, answer["errors"], err)
	}
	f, err := m.Finish(auth, g.Expires)
	g.Lease = broker.Lease{Ref: f.Ref, Expires: g.Expires}
	return f.Secret, err
}

func reveal(s broker.Secret) string {
	var members struct{ Token string }
	_ = json.Unmarshal(s.Reveal(), &members) // then it is empty and opens nothing
	return members.Token
}

func (v *real) rig(t *testing.T) brokertest.Rig {
	b, err := token.New(token.Config{Vault: v})
	if err != nil {
		t.Fatal(err)
	}
	wrong := v.tool
	wrong.Path = []string{"auth", "token", "create-orphan", v.name}
	return brokertest.Rig{Backend: b, Tool: v.tool, Wrong: []broker.Tool{wrong}, Args: grant(t, `{"env":"test"}`).Args,
		Outside: []broker.Args{grant(t, `{"env":"dev"}`).Args, {}}, Mint: v.mint,
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
			status, _, err := v.ask(ctx, reveal(s), "GET", v.name+"/test", nil)
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
	v := newReal(t)
	// A step's token is a credential that the engine makes, not Prepare: the count stays.
	brokertest.Backend(t, v.rig(t))
}

// TestRealNarrow takes the raw secret and tries what its step was not for: Vault refuses.
func TestRealNarrow(t *testing.T) {
	v := newReal(t)
	v.tool.Settings["uses"] = "20"
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
	raw := reveal(secret)
	for _, row := range []struct {
		method, path string
		body         any
		want         int
	}{
		{"GET", v.name + "/test", nil, 200},
		{"GET", v.name + "/prod", nil, 403},                                                                  // another environment's secret
		{"POST", v.name + "/test", map[string]string{"value": "x"}, 403},                                     // writing what it may read
		{"POST", "auth/token/create", map[string]any{}, 403},                                                 // a child of its own
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
	_, answer, err := v.ask(t.Context(), v.root, "POST", "auth/token/lookup-accessor", map[string]string{"accessor": g.Lease.Ref})
	data, _ := answer["data"].(map[string]any)
	if err != nil || fmt.Sprint(data["explicit_max_ttl"]) != "30" || fmt.Sprint(data["renewable"]) != "false" || fmt.Sprint(data["num_uses"]) != "11" ||
		!strings.Contains(fmt.Sprint(data["meta"]), string(g.ID)) {
		t.Errorf("Vault says of the token: %v, %v", data, err)
	}
	// The step's token ends it.
	if err := r.End(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if works, err := r.Works(t.Context(), g, secret); works || err != nil {
		t.Errorf("after the step's token was killed Vault takes the secret: %v, %v", works, err)
	}
}

// TestRealRole holds that Vault's own role keeps a step's token from making anything else, and
// that a role which gives more than was asked for is noticed.
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
			t.Errorf("a step's token makes one with %s: %d, orphan %v, %v", name, status, auth["orphan"], err)
		}
		if status < 400 && name != "without a parent" {
			t.Errorf("a step's token makes one with %s, want a refusal", name)
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
		v.must(t, strings.Join(path, "/"), wider)
		g := grant(t, `{"env":"test"}`)
		g.Expires = time.Now().Add(time.Minute)
		m, display, err := r.Backend.Prepare(t.Context(), v.tool, g)
		if err != nil {
			t.Fatal(err)
		}
		if name == "token_no_default_policy" { // what the request says counts as well
			delete(m.Data, "no_default_policy")
		}
		if secret, err := v.mint(t.Context(), &g, m, display); err == nil || !secret.Empty() {
			t.Errorf("a role with %s = %v gives a token that is taken", name, value)
		}
	}
}
