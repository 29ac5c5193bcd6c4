package token_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/token"
)

// tokens is a Vault that knows some accessors.
type tokens struct {
	mu    sync.Mutex // guards the fields below
	known map[string]bool
	err   error
}

func (v *tokens) Kill(_ context.Context, accessor string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.known, accessor)
	return v.err
}

func (v *tokens) TokensGone(_ context.Context, accessors []string) (gone []bool, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, a := range accessors {
		gone = append(gone, !v.known[a])
	}
	return gone, v.err
}

var noon = time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC)

func backend(t *testing.T, v token.Tokens, now time.Time) *token.Backend {
	t.Helper()
	b, err := token.New(token.Config{Vault: v, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tool(settings ...string) broker.Tool {
	t := broker.Tool{Name: "vault.read", Backend: "token", Narrowing: broker.NarrowNative, Path: brokertest.Path("auth/token/create/app"),
		Arguments: map[string]broker.Parameter{"env": {Kind: "string", Required: true}},
		Settings:  map[string]string{"policies": "base", "policies.env.test": "app-test", "policies.env.prod": "app-prod,audit", "uses": "3", "wrap": "false"}}
	for i := 0; i < len(settings); i += 2 {
		t.Settings[settings[i]] = settings[i+1]
	}
	return t
}

func grant(t *testing.T, raw string) broker.Grant {
	t.Helper()
	a, err := args.Parse([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	return broker.Grant{ID: "gr000000000000000000000001", Chain: "ch000000000000000000000001", Args: a, Created: noon, Expires: noon.Add(time.Minute)}
}

func TestLoad(t *testing.T) {
	b := backend(t, &tokens{}, noon)
	at := func(path broker.VaultPath) broker.Tool {
		t := tool()
		t.Path = path
		return t
	}
	more := func(name string, p broker.Parameter) broker.Tool {
		t := tool("policies."+name+".x", "p")
		t.Arguments[name] = p
		return t
	}
	silent := tool()
	silent.Arguments["other"] = broker.Parameter{Kind: "string", Required: true}
	none := tool()
	none.Arguments, none.Settings = nil, nil
	fixed := tool()
	fixed.Arguments, fixed.Settings = nil, map[string]string{"policies": "a,b-c.d_e"}
	chosen := tool()
	delete(chosen.Settings, "policies")
	for name, row := range map[string]struct {
		tool broker.Tool
		ok   bool
	}{
		"good": {tool(), true}, "only fixed policies": {fixed, true}, "only chosen policies": {chosen, true},
		"a value with dots and spaces": {tool("policies.env.eu.west 1", "p"), true},
		"no path":                      {at(broker.VaultPath{}), false}, "no role": {at(brokertest.Path("auth/token/create")), false},
		"an orphan":            {at(brokertest.Path("auth/token/create-orphan/app")), false},
		"another mount":        {at(brokertest.Path("auth/other/create/app")), false},
		"more path":            {at(brokertest.Path("auth/token/create/app/x")), false},
		"no policies":          {none, false},
		"an argument unused":   {silent, false},
		"an optional argument": {more("opt", broker.Parameter{Kind: "string"}), false},
		"a list":               {more("list", broker.Parameter{Kind: "list", Required: true}), false},
		"an unknown argument":  {tool("policies.region.eu", "p"), false},
		"an unknown setting":   {tool("polices", "p"), false},
		"outlives":             {tool("outlives", "24h"), true},
		"outlives too long":    {tool("outlives", "25h"), false},
		"an argument alone":    {tool("policies.env", "p"), false},
		"root":                 {tool("policies", "root"), false},
		"default":              {tool("policies", "a,default"), false},
		"a tool's of Pawl":     {tool("policies", "pawl-tool-db"), false},
		"a delegation's":       {tool("policies.env.test", "pawl-delegation"), false},
		"capitals":             {tool("policies", "Root"), false},
		"a blank":              {tool("policies", "a, b"), false},
		"an empty one":         {tool("policies", "a,"), false},
		"a pattern":            {tool("policies", "*"), false},
		"a placeholder":        {tool("policies", "app-{{env}}"), false},
		"no uses":              {tool("uses", "0"), false},
		"too many uses":        {tool("uses", "1001"), false},
		"uses in words":        {tool("uses", "+3"), false},
		"wrapped":              {tool("wrap", "true"), true},
		"wrap in words":        {tool("wrap", "yes"), false},
	} {
		if err := b.Load(row.tool); (err == nil) != row.ok {
			t.Errorf("Load(%s) = %v, want ok %v", name, err, row.ok)
		}
	}
	if _, err := token.New(token.Config{}); err == nil {
		t.Error("New() without a Vault succeeded")
	}
}

func TestPrepare(t *testing.T) {
	b := backend(t, &tokens{}, noon.Add(100*time.Millisecond))
	m, name, err := b.Prepare(t.Context(), tool(), grant(t, `{"env":"prod"}`))
	if err != nil || !m.Auth || m.Leased || m.TTL != time.Minute || name != "gr000000000000000000000001" || m.Path.String() != "auth/token/create/app" {
		t.Fatalf("Prepare() = %+v, %q, %v", m, name, err)
	}
	body, err := json.Marshal(m.Data)
	digest := grant(t, `{"env":"prod"}`).Args.Digest()
	want := `{"display_name":"gr000000000000000000000001","explicit_max_ttl":"60s","meta":{"pawl_args":"` + hex.EncodeToString(digest[:]) +
		`","pawl_chain":"ch000000000000000000000001","pawl_grant":"gr000000000000000000000001","pawl_tool":"vault.read"},` +
		`"no_default_policy":true,"num_uses":3,"policies":["app-prod","audit","base"],"renewable":false,"ttl":"60s","type":"service"}`
	if err != nil || string(body) != want {
		t.Errorf("the mint's body = %s, %v, want %s", body, err, want)
	}
	for _, args := range []string{`{}`, `{"env":"dev"}`, `{"env":""}`, `{"env":["prod"]}`, `{"env":"PROD"}`} {
		if _, _, err := b.Prepare(t.Context(), tool(), grant(t, args)); !errors.Is(err, broker.Malformed) {
			t.Errorf("Prepare(%s) = %v, want Malformed", args, err)
		}
	}
	late := grant(t, `{"env":"prod"}`)
	late.Expires = noon
	if _, _, err := b.Prepare(t.Context(), tool(), late); !errors.Is(err, broker.Expired) {
		t.Errorf("Prepare(an expired grant) = %v, want Expired", err)
	}
}

// TestFinish checks that a token with more rights or a longer lifetime than requested is not delivered.
func TestFinish(t *testing.T) {
	b := backend(t, &tokens{}, noon)
	m, _, err := b.Prepare(t.Context(), tool(), grant(t, `{"env":"test"}`))
	if err != nil {
		t.Fatal(err)
	}
	good := map[string]any{"client_token": "hvs.marker", "accessor": "acc-1", "token_type": "service", "orphan": false, "renewable": false,
		"token_policies": []any{"base", "app-test"}, "identity_policies": nil, "num_uses": json.Number("3"), "lease_duration": json.Number("60")}
	f, err := m.Finish(good, noon.Add(time.Minute))
	if err != nil || f.Ref != "acc-1" || string(f.Secret.Reveal()) != `{"token":"hvs.marker"}` {
		t.Fatalf("Finish() = ref %q, %v", f.Ref, err)
	}
	if want := []broker.ValueDigest{broker.DigestValue("hvs.marker")}; !slices.Equal(f.Digests, want) {
		t.Errorf("Finish() returns the digests %v, want %v, the token's", f.Digests, want)
	}
	for name, change := range map[string]any{
		"client_token": "", "client_token ": "a b", "accessor": nil, "accessor ": 7, "token_type": "batch", "token_type ": nil,
		"orphan": true, "orphan ": nil, "renewable": true,
		"token_policies": []any{"base", "app-test", "default"}, "token_policies ": []any{"base"}, "token_policies  ": nil, "token_policies   ": "base",
		"token_policies    ": []any{"base", 1}, "identity_policies": []any{"more"}, "identity_policies ": "more",
		"num_uses": json.Number("0"), "num_uses ": nil, "num_uses  ": json.Number("4"),
	} {
		auth := maps.Clone(good)
		auth[strings.TrimSpace(name)] = change
		if f, err := m.Finish(auth, noon); err == nil || !f.Secret.Empty() || strings.Contains(err.Error(), "marker") {
			t.Errorf("Finish(%s: %v) = %v, want a refusal that shows no token", name, change, err)
		}
	}
}

// TestFinishWrapped checks the same for a wrapped token.
func TestFinishWrapped(t *testing.T) {
	b := backend(t, &tokens{}, noon)
	m, _, err := b.Prepare(t.Context(), tool("wrap", "true"), grant(t, `{"env":"test"}`))
	if err != nil || !m.Wrap || !b.Wraps(tool("wrap", "true")) || b.Wraps(tool()) {
		t.Fatalf("Prepare() = wrap %v, %v", m.Wrap, err)
	}
	inside := map[string]any{"accessor": "acc-1", "type": "service", "orphan": false, "renewable": false,
		"policies": []any{"base", "app-test"}, "num_uses": json.Number("3"), "ttl": json.Number("60")}
	good := map[string]any{"token": "hvs.marker", "accessor": "acc-2", "wrapped_accessor": "acc-1", "creation_path": "auth/token/create/app",
		"ttl": json.Number("60"), "auth": inside}
	f, err := m.Finish(good, noon.Add(time.Minute))
	if err != nil || f.Ref != "acc-1,acc-2" || string(f.Secret.Reveal()) != `{"creation_path":"auth/token/create/app","wrapping_token":"hvs.marker"}` {
		t.Fatalf("Finish() = ref %q, %v", f.Ref, err)
	}
	for name, change := range map[string]any{
		"token": "", "accessor": nil, "accessor ": "a,b", "wrapped_accessor": nil, "wrapped_accessor ": "", "creation_path": "", "auth": nil, "auth ": "x",
		"auth/type": "batch", "auth/orphan": true, "auth/orphan ": nil, "auth/renewable": true, "auth/num_uses": json.Number("0"),
		"auth/policies": []any{"base", "app-test", "default"}, "auth/policies ": nil, "auth/identity_policies": []any{"more"},
	} {
		answer := maps.Clone(good)
		key, within, ok := strings.Cut(strings.TrimSpace(name), "/")
		if ok {
			bent := maps.Clone(inside)
			bent[within] = change
			change = bent
		}
		answer[key] = change
		if f, err := m.Finish(answer, noon); err == nil || !f.Secret.Empty() || strings.Contains(err.Error(), "marker") {
			t.Errorf("Finish(%s: %v) = %v, want a refusal that shows no token", name, change, err)
		}
	}
}

func TestSeverAndProve(t *testing.T) {
	v := &tokens{known: map[string]bool{"one": true, "other": true}}
	named := func(ref string) broker.Grant {
		g := grant(t, `{}`)
		g.Token.Accessor, g.Lease.Ref, g.MintDeadline = "step", ref, noon.Add(100*time.Second)
		return g
	}
	grants := []broker.Grant{named("one"), named(""), named("other"), grant(t, `{}`), named("gone")}
	prove := func(now time.Time, want ...broker.Outcome) {
		t.Helper()
		found, err := backend(t, v, now).Prove(t.Context(), grants)
		var got []broker.Outcome
		for _, e := range found {
			got = append(got, e.Outcome)
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Prove() at %v = %q, %v, want %q", now, got, err, want)
		}
	}
	const alive, dead, unknown = broker.OutcomeAlive, broker.OutcomeDead, broker.OutcomeUnknown
	prove(noon, alive, unknown, alive, dead, dead)
	pairs := []broker.Grant{named("gone,other"), named("other,gone"), named("gone,gone")}
	if found, err := backend(t, v, noon).Prove(t.Context(), pairs); err != nil || found[0].Outcome != alive || found[1].Outcome != alive || found[2].Outcome != dead {
		t.Errorf("Prove() of wrapped tokens = %v, %v, want dead only without both", found, err)
	}
	for range 2 {
		if err := backend(t, v, noon).Sever(t.Context(), grants[:2]); err != nil {
			t.Errorf("Sever() = %v", err)
		}
	}
	prove(noon.Add(161*time.Second), dead, unknown, alive, dead, dead)
	prove(noon.Add(162*time.Second), dead, dead, alive, dead, dead) // MintDeadline, a minute of lifetime, a second for rounding
	v.err = errors.New("permission denied")
	if found, err := backend(t, v, noon).Prove(t.Context(), grants); err == nil {
		t.Errorf("Prove() with a Vault that refuses = %v, want an error", found)
	}
	if err := backend(t, v, noon).Sever(t.Context(), grants); err == nil {
		t.Error("Sever() with a Vault that refuses = nil, want an error")
	}
	if found, err := backend(t, v, noon).Prove(t.Context(), nil); err != nil || len(found) != 0 {
		t.Errorf("Prove(nothing) = %v, %v", found, err)
	}
}
