package e2e_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
)

// stepTokens returns the grants of the steps' tokens of a chain that Vault has.
func (w *world) stepTokens(chain agent.ChainID) (grants []string) {
	w.t.Helper()
	root, err := w.env.Vault.Client()
	if err != nil {
		w.t.Fatal(err)
	}
	all, err := root.Logical().ListWithContext(w.t.Context(), "auth/token/accessors")
	if err != nil || all == nil {
		w.t.Fatalf("listing Vault's tokens: %v", err)
	}
	keys, _ := all.Data["keys"].([]any)
	for _, k := range keys {
		accessor, _ := k.(string)
		one, err := root.Auth().Token().LookupAccessorWithContext(w.t.Context(), accessor)
		if err != nil {
			continue // it has just ended
		}
		meta, _ := one.Data["meta"].(map[string]any)
		if id, ok := meta["pawl_grant"].(string); ok && meta["pawl_chain"] == string(chain) {
			grants = append(grants, id)
		}
	}
	return grants
}

// auditedStep is what the test reads of a line of Vault's audit log.
type auditedStep struct {
	Type    string
	Request struct{ Path string }
	Auth    struct {
		DisplayName string `json:"display_name"`
	}
	Response struct {
		Auth struct {
			DisplayName string `json:"display_name"`
		}
	}
}

func auditedSteps(t *testing.T, path string) (lines []auditedStep) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range bytes.Split(bytes.TrimSpace(raw), []byte("\n")) {
		var l auditedStep
		if err := json.Unmarshal(text, &l); err != nil {
			t.Fatalf("a line of Vault's audit log: %v", err)
		}
		lines = append(lines, l)
	}
	return lines
}

// TestTokenAhead makes tokens ahead on a real Vault. After two steps with PostgreSQL, the third waits for one request to
// Vault. A killed broker, an idle chain and a fence leave no token that was made ahead.
func TestTokenAhead(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	w := newWorld(t, env, nil)
	log := filepath.Join(t.TempDir(), "audit")
	w.asRoot("sys/audit/file", map[string]any{"type": "file", "options": map[string]string{"file_path": log}})
	p := startProcess(t, w.file)
	d, err := w.agent("planner").Open(t.Context(), agent.Chain{Task: "ahead", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	chain := d.Info().Chain
	twoSteps := func() {
		t.Helper()
		for range 2 {
			if _, _, err := take(t.Context(), d, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	// unused are the grants of tokens that no step has.
	unused := func() (ids []string) {
		known := map[string]bool{}
		for _, g := range w.grants() {
			known[g.ID] = true
		}
		for _, id := range w.stepTokens(chain) {
			if !known[id] {
				ids = append(ids, id)
			}
		}
		return ids
	}
	untilMade := func() string {
		t.Helper()
		if !within(5*time.Second, func() bool { return len(unused()) == 1 }) {
			t.Fatalf("after two steps the tokens that no step has are of %v, want one", unused())
		}
		return unused()[0]
	}
	untilNone := func(what string, most time.Duration) {
		t.Helper()
		if !within(most, func() bool { return len(unused()) == 0 }) {
			t.Errorf("%s: the tokens of %v are alive, want none", what, unused())
		}
	}
	twoSteps()
	lost := untilMade()
	p.kill()
	p.gone(t)
	p = startProcess(t, w.file)
	untilNone("after a crash and a restart", 10*time.Second)

	twoSteps()
	made := untilMade()
	before := auditedSteps(t, log)
	if !slices.ContainsFunc(before, func(l auditedStep) bool {
		return l.Type == "response" && l.Request.Path == "auth/token/create" && strings.Contains(l.Response.Auth.DisplayName, made)
	}) {
		t.Errorf("Vault's audit log has no token for %s before its step", made)
	}
	third, l, err := take(t.Context(), d, 0)
	if err != nil || string(third.Grant().ID) != made || !w.oracle.works(l) || grantOf(l.Username) != made {
		t.Fatalf("the third step = %v, %v with the login %s; want the grant %s", third, err, l.Username, made)
	}
	var asked []string
	for _, line := range auditedSteps(t, log)[len(before):] {
		if line.Type == "request" && strings.Contains(line.Auth.DisplayName, made) {
			asked = append(asked, line.Request.Path)
		}
		if line.Type == "response" && strings.Contains(line.Response.Auth.DisplayName, made) {
			t.Error("the step's token was made after the step began")
		}
	}
	if len(asked) != 1 || !strings.Contains(asked[0], "/creds/") {
		t.Errorf("the step asked Vault for %v, want one secret", asked)
	}
	untilMade()
	untilNone("of an idle chain", 45*time.Second)

	twoSteps()
	untilMade()
	o := w.operator()
	rv, err := o.Revoke(t.Context(), api.RevokeRequest{Selector: "tool:db.read", Reason: "ahead"})
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Follow(t.Context(), rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
		t.Fatal(err)
	}
	if left := w.stepTokens(chain); rv.Closure != string(broker.ClosureClosed) || len(left) > 0 {
		t.Errorf("closure = %s, and the tokens of %v are alive; want CLOSED and none", rv.Closure, left)
	}
	for _, g := range w.grants() {
		if g.ID == lost {
			t.Errorf("the id %s was given out, of a token that a crash left", lost)
		}
	}
	p.end(t)
}
