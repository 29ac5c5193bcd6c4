package exec_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/exec"
)

// keyServer is a target that keeps one key for each name and accepts the keys that it keeps.
type keyServer struct {
	*httptest.Server
	admin string

	mu   sync.Mutex // guards the fields below
	n    int
	keys map[string]string
}

func newKeyServer(t *testing.T) *keyServer {
	s := &keyServer{admin: "admin-" + t.Name(), keys: map[string]string{}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *keyServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-Admin") != s.admin {
		http.Error(w, "{}", http.StatusForbidden)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var answer any = struct{}{}
	switch r.Method + " " + r.URL.Path {
	case "GET /keys":
		names := []string{}
		for name := range s.keys {
			names = append(names, name)
		}
		answer = names
	case "DELETE " + r.URL.Path:
		delete(s.keys, strings.TrimPrefix(r.URL.Path, "/keys/"))
	}
	_ = json.NewEncoder(w).Encode(answer)
}

// mint does the work of Vault for a write at the tool's path.
func (s *keyServer) mint(_ context.Context, g *broker.Grant, m broker.Mint, _ string) (broker.Secret, error) {
	raw, err := json.Marshal(m.Data)
	var data struct{ Scope, Name string }
	if err = errors.Join(err, json.Unmarshal(raw, &data)); err != nil || m.Path.String() != "keys/creds/app" || data.Scope == "" {
		return broker.Secret{}, fmt.Errorf("the mint is %v %s, %w", m.Path, raw, err)
	}
	s.mu.Lock()
	s.n++
	key := fmt.Sprintf("key-marker-%d", s.n)
	s.keys[data.Name] = key
	s.mu.Unlock()
	f, err := m.Finish(map[string]any{"name": data.Name, "key": key, "internal": "not for the agent"}, time.Time{})
	g.Lease = broker.Lease{Ref: f.Ref, Expires: g.Expires}
	return f.Secret, err
}

func (s *keyServer) works(_ context.Context, _ broker.Grant, secret broker.Secret) (bool, error) {
	var members map[string]string
	if err := json.Unmarshal(secret.Reveal(), &members); err != nil || len(members) != 2 {
		return false, errors.New("the secret does not have the two requested members")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys[members["name"]] == members["key"], nil
}

func (s *keyServer) count(context.Context) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.keys), nil
}

// program writes a program to a file of the test and returns its configuration.
func program(t *testing.T, text string) exec.Program {
	t.Helper()
	p := exec.Program{Path: filepath.Join(t.TempDir(), "plugin"), SHA256: sum(text)}
	replace(t, p, text)
	return p
}

func sum(text string) string {
	s := sha256.Sum256([]byte(text))
	return hex.EncodeToString(s[:])
}

func replace(t *testing.T, p exec.Program, text string) {
	t.Helper()
	if err := os.WriteFile(p.Path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
}

// python returns the program in testdata, run by this machine's interpreter.
func python(t *testing.T, s *keyServer, args ...string) exec.Program {
	t.Helper()
	interpreter := parts.NeedPython(t)
	raw, err := os.ReadFile("testdata/keys.py")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), "\n")
	p := program(t, "#!"+interpreter+" -IS\n"+rest)
	p.Args = args
	p.Env = []string{"KEYS=" + s.Listener.Addr().String(), "KEYS_ADMIN=" + s.admin}
	return p
}

func backend(t *testing.T, cfg exec.Config) *exec.Backend {
	t.Helper()
	if cfg.Name == "" {
		cfg.Name = "keys"
	}
	b, err := exec.New(cfg)
	if err != nil {
		t.Fatalf("New() = %v", err)
	}
	return b
}

func tool() broker.Tool {
	return broker.Tool{Name: "keys", Backend: "exec", Path: brokertest.Path("keys/creds/app"),
		Arguments: map[string]broker.Parameter{"scope": {Kind: "string", Required: true}},
		Settings:  map[string]string{"pawl.mint": "write", "pawl.lease": "none", "pawl.ref": "name"}}
}

func given(t *testing.T, raw string) args.Args {
	t.Helper()
	a, err := args.Parse([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func with(t broker.Tool, key, value string) broker.Tool {
	t.Settings = map[string]string{"pawl.mint": "write", "pawl.lease": "none", "pawl.ref": "name", key: value}
	return t
}

func rig(t *testing.T, s *keyServer, b broker.Backend) brokertest.Rig {
	return brokertest.Rig{Backend: b, Tool: tool(), Args: given(t, `{"scope":"read"}`), Outside: []args.Args{{}, given(t, `{"scope":"all"}`)},
		Wrong: []broker.Tool{with(tool(), "pawl.mint", "delete"), with(tool(), "pawl.lease", "no"), with(tool(), "pawl.ref", "a b"), with(tool(), "pawl.x", "y")},
		Mint:  s.mint, Works: s.works, Credentials: s.count}
}

// TestPython checks that a short Python plugin passes the suite, with a second program as the probe.
func TestPython(t *testing.T) {
	s := newKeyServer(t)
	p := python(t, s)
	probe := p
	brokertest.Backend(t, rig(t, s, backend(t, exec.Config{Program: p, Probe: &probe})))
	if n, _ := s.count(t.Context()); n != 0 {
		t.Errorf("%d keys are alive, want none", n)
	}
}

// TestLiar checks that a plugin fails the suite if it claims a revocation that it did not make. In production, an
// honest probe exposes it.
func TestLiar(t *testing.T) {
	s := newKeyServer(t)
	liar := python(t, s, "lie")
	err := brokertest.CheckBackend(t.Context(), rig(t, s, backend(t, exec.Config{Program: liar})))
	if err == nil || !strings.Contains(err.Error(), "the backend lies") {
		t.Errorf("CheckBackend(a liar) = %v, want that it lies", err)
	}
	honest := python(t, s)
	b := backend(t, exec.Config{Program: liar, Probe: &honest})
	g := broker.Grant{ID: "gr000000000000000000000001", Args: given(t, `{"scope":"read"}`), Expires: time.Now().Add(time.Minute)}
	m, _, err := b.Prepare(t.Context(), tool(), g)
	if err != nil {
		t.Fatalf("Prepare() = %v", err)
	}
	if _, err := s.mint(t.Context(), &g, m, ""); err != nil {
		t.Fatal(err)
	}
	if err := b.Sever(t.Context(), []broker.Grant{g}); err != nil {
		t.Fatalf("Sever() = %v", err)
	}
	found, err := b.Prove(t.Context(), []broker.Grant{g})
	if err != nil || found[0].Outcome != broker.OutcomeAlive || found[0].Check != "keys: the server's list of keys" {
		t.Errorf("Prove() by a second program = %v, %v, want alive", found, err)
	}
}

// TestPrepare checks the mint from a plugin's response, and the error from a plugin's refusal.
func TestPrepare(t *testing.T) {
	s := newKeyServer(t)
	b := backend(t, exec.Config{Program: python(t, s)})
	g := broker.Grant{ID: "gr000000000000000000000001", Args: given(t, `{"scope":"read"}`), Expires: time.Now().Add(time.Minute)}
	m, name, err := b.Prepare(t.Context(), tool(), g)
	if err != nil || name != string(g.ID) || m.Leased || m.Auth || m.TTL > time.Minute || m.TTL < 50*time.Second {
		t.Fatalf("Prepare() = %+v, %q, %v", m, name, err)
	}
	body, err := json.Marshal(m.Data)
	if err != nil || string(body) != `{"name":"gr000000000000000000000001","scope":"read"}` {
		t.Errorf("the mint's body = %s, %v", body, err)
	}
	f, err := m.Finish(map[string]any{"name": "n", "key": "k", "other": "x"}, time.Time{})
	if err != nil || f.Ref != "n" || string(f.Secret.Reveal()) != `{"key":"k","name":"n"}` {
		t.Errorf("Finish() = ref %q, %v, want the two members named by the plugin", f.Ref, err)
	}
	for _, answer := range []map[string]any{{"name": "n"}, {"key": "k"}, {"name": 7, "key": "k"}, {"name": "", "key": "k"}, {"name": "a b", "key": "k"}} {
		if _, err := m.Finish(answer, time.Time{}); err == nil {
			t.Errorf("Finish(%v) succeeded", answer)
		}
	}
	g.Args = given(t, `{"scope":"all"}`)
	_, _, err = b.Prepare(t.Context(), tool(), g)
	var e *broker.Error
	if !errors.As(err, &e) || e.Kind != broker.Denied || e.Code != broker.CodeArgumentOutside || strings.Contains(e.Msg, "read or write") {
		t.Errorf("Prepare(refused by the plugin) = %v, want Denied without the plugin's message", err)
	}
	if path, write, leased := new(exec.Backend).Access(tool()); path != tool().Path || !write || leased {
		t.Errorf("Access() = %q, %v, %v", path, write, leased)
	}
	if _, write, leased := new(exec.Backend).Access(broker.Tool{}); write || !leased {
		t.Errorf("Access() of a tool without settings: write %v, leased %v, want a read with a lease", write, leased)
	}
}

// TestBatches checks that a large set of grants is proven in order, over several starts.
func TestBatches(t *testing.T) {
	s := newKeyServer(t)
	b := backend(t, exec.Config{Program: python(t, s)})
	grants := make([]broker.Grant, 1001)
	for i := range grants {
		grants[i] = broker.Grant{ID: broker.GrantID(fmt.Sprintf("gr%024d", i))}
		if i%3 == 0 {
			s.keys[string(grants[i].ID)] = "x"
		}
	}
	found, err := b.Prove(t.Context(), grants)
	if err != nil || len(found) != len(grants) {
		t.Fatalf("Prove() = %d elements of evidence, %v", len(found), err)
	}
	for i, e := range found {
		if alive := e.Outcome == broker.OutcomeAlive; alive != (i%3 == 0) {
			t.Fatalf("evidence %d = %q", i, e.Outcome)
		}
	}
	if ids, err := b.Find(t.Context()); err != nil || len(ids) != 334 {
		t.Errorf("Find() = %d ids, %v, want 334", len(ids), err)
	}
}
