package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/goccy/go-yaml"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/wire"
)

// lifecycle runs `pawl server` in one process after another on one ledger. Two keys must sign its bundles.
type lifecycle struct {
	t          *testing.T
	config     wire.Config
	file       string // of config
	keys       []jose.JSONWebKey
	identities *workload.Server
	cmd        *exec.Cmd
	lines      chan logLine // its log; closed when the process ends
	agents     string       // the address of its agents' listener
}

type logLine struct {
	raw  string
	Msg  string `json:"msg"`
	text map[string]any
}

func newLifecycle(t *testing.T) *lifecycle {
	t.Helper()
	dir, err := os.MkdirTemp("", "pawl") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	l := &lifecycle{t: t, file: filepath.Join(dir, "pawl.yaml")}
	if l.identities, err = workload.New(workload.Config{TrustDomain: "example.org"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.identities.Close() }) // its sockets end with it
	l.config, _, _ = wiredConfig(t, dir, l.identities)
	var public []jose.JSONWebKey
	for range 2 {
		private, open, err := policy.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		l.keys, public = append(l.keys, private), append(public, open)
	}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: public})
	if err != nil {
		t.Fatal(err)
	}
	l.config.Backends["hosts"] = wire.Backend{Plugin: "ssh"}
	l.config.Policy.Need, l.config.Policy.Candidate = 2, filepath.Join(dir, "candidate.jws")
	l.write(l.config.Policy.Keys, keys)
	config, err := yaml.Marshal(l.config)
	if err != nil {
		t.Fatal(err)
	}
	l.write(l.file, config)
	return l
}

func (l *lifecycle) write(path string, raw []byte) {
	l.t.Helper()
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		l.t.Fatal(err)
	}
}

const notesTool = `{name: notes.read, backend: notes, narrowing: none, arguments: {page: {kind: string}}, ` +
	`vault: {policy: pawl-notes, path: secret/notes}}`

const notesPermit = "@id(\"all\")\n@any(\"action tool\")\n" +
	"permit (principal in TrustDomain::\"example.org\", action, resource);\n"

// bundle makes a version of the policy, signed by n of the keys, and its digest.
func (l *lifecycle) bundle(version int, tool, cedar string, n int) (jws []byte, digest string) {
	l.t.Helper()
	source, err := policy.Build(fstest.MapFS{
		"bundle.yaml": {Data: fmt.Appendf(nil, "{name: notes, version: %d}", version)},
		"tools.yaml":  {Data: []byte("tools:\n  - " + tool + "\n")},
		"main.cedar":  {Data: []byte(cedar)},
	})
	if err != nil {
		l.t.Fatal(err)
	}
	if jws, err = policy.Sign(source, l.keys[:n]...); err != nil {
		l.t.Fatal(err)
	}
	return jws, source.Digest()
}

// start runs the server until it serves or ends, and returns its log until then.
func (l *lifecycle) start(flags ...string) (log string, serving bool) {
	l.t.Helper()
	l.cmd = exec.Command("pawl", append([]string{"server", "--config", l.file}, flags...)...)
	stderr, err := l.cmd.StderrPipe()
	if err == nil {
		err = l.cmd.Start()
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.lines = make(chan logLine, 1000)
	go func(lines chan<- logLine, in *bufio.Scanner) {
		defer close(lines)
		for in.Scan() {
			line := logLine{raw: in.Text()}
			_ = json.Unmarshal(in.Bytes(), &line)      // an error line is not JSON
			_ = json.Unmarshal(in.Bytes(), &line.text) // the same
			lines <- line
		}
	}(l.lines, bufio.NewScanner(stderr))
	var lines []string
	for line := range l.lines {
		lines = append(lines, line.raw)
		if line.Msg == "serving" {
			l.agents, _ = line.text["agents"].(string)
			l.t.Cleanup(l.stop)
			return strings.Join(lines, "\n"), true
		}
	}
	_ = l.cmd.Wait() // it failed; the caller checks its log
	return strings.Join(lines, "\n"), false
}

func (l *lifecycle) mustServe(flags ...string) {
	l.t.Helper()
	if log, serving := l.start(flags...); !serving {
		l.t.Fatalf("pawl server %v ended:\n%s", flags, log)
	}
}

// stop may be called again.
func (l *lifecycle) stop() {
	_ = l.cmd.Process.Signal(syscall.SIGTERM) // the process may have ended
	for range l.lines {
	}
	_ = l.cmd.Wait() // the same
}

// await waits for a log line with one of the messages.
func (l *lifecycle) await(msg ...string) logLine {
	l.t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		select {
		case line, open := <-l.lines:
			if !open {
				l.t.Fatalf("the server ended before it logged one of %q", msg)
			}
			for _, m := range msg {
				if line.Msg == m {
					return line
				}
			}
		case <-deadline:
			l.t.Fatalf("the server did not log one of %q within 30 s", msg)
		}
	}
}

const (
	msgRefused = "the policy bundle on disk is refused; the running one stays"
	msgInForce = "policy bundle in force"
)

// reload writes a bundle to disk, sends HUP, and returns the first line with one of the messages; by default
// those of a reload.
func (l *lifecycle) reload(jws []byte, msg ...string) logLine {
	l.t.Helper()
	l.write(l.config.Policy.Bundle, jws)
	if err := l.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		l.t.Fatal(err)
	}
	if len(msg) == 0 {
		msg = []string{msgRefused, msgInForce}
	}
	return l.await(msg...)
}

// open opens a chain over the network.
func (l *lifecycle) open() (*agent.Delegation, error) {
	l.t.Helper()
	c, err := agent.New(agent.Config{Address: "https://" + l.agents,
		Source: l.identities.Source(l.identities.ID("/agent")), ServerID: l.identities.ID("/pawl")})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = c.Close() }) // it always succeeds
	return c.Open(l.t.Context(), agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
}

// audit returns the entries with an op, oldest first.
func (l *lifecycle) audit(op broker.Op) (found []api.Entry) {
	l.t.Helper()
	c, err := operator.New(operator.Config{Address: "unix:" + l.config.Listen.Socket})
	if err != nil {
		l.t.Fatal(err)
	}
	defer c.Close()
	page, err := c.Audit(l.t.Context(), 0, 1000)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, e := range page.Entries {
		if e.Op == string(op) {
			found = append(found, e)
		}
	}
	return found
}

// TestPolicyLifecycle holds that a bundle comes into force only by the rules, at a reload and at a restart. The
// log has the cause of a refusal, the running bundle still decides, and the audit has each change with the
// responsible user.
func TestPolicyLifecycle(t *testing.T) {
	t.Parallel()
	l := newLifecycle(t)
	good := func(version int) []byte { jws, _ := l.bundle(version, notesTool, notesPermit, 2); return jws }
	tool := func(old, new string) []byte {
		jws, _ := l.bundle(4, strings.Replace(notesTool, old, new, 1), notesPermit, 2)
		return jws
	}
	interpolating, _ := l.bundle(4, `{name: notes.read, backend: hosts, narrowing: native,
    arguments: {page: {kind: string, required: true}}, settings: {arg.page: principal, force_command: "cat {{page}}"},
    vault: {policy: pawl-notes, path: ssh/notes}}`, notesPermit, 2)
	other, _ := l.bundle(3, notesTool, notesPermit+"// not the same\n", 2)
	under, _ := l.bundle(4, notesTool, notesPermit, 1)
	_, digest := l.bundle(3, notesTool, notesPermit, 2)
	l.write(l.config.Policy.Bundle, good(3))
	l.mustServe()
	for _, row := range []struct {
		name, want string
		jws        []byte
	}{
		{"older", "version 2, and 3 is running", good(2)},
		{"the version again, with other content", "version 3 again, with other content", other},
		{"tampered", "signature does not fit the bundle", tampered(t, good(4))},
		{"under-signed", "2 needed, 1 valid", under},
		{"oversized", "bundle is too large", bytes.Repeat([]byte(" "), policy.MaxBundle+1)},
		{"nonsense", "not a signed bundle", []byte("version: 4\n")},
		{"a tool without a backend", `names backend "diary", which is not configured`,
			tool("backend: notes", "backend: diary")},
		{"a tool with a false label", "labelled none, not native", tool("narrowing: none", "narrowing: native")},
		{"a tool that would interpolate", "never a template", interpolating},
	} {
		line := l.reload(row.jws)
		cause, _ := line.text["error"].(string)
		if line.Msg != msgRefused || !strings.Contains(cause, row.want) || line.text["bundle"] != digest {
			t.Errorf("%s: %s, want it refused with %q while %s runs", row.name, line.raw, row.want, digest)
		}
		if _, err := l.open(); err != nil {
			t.Errorf("%s: Open = %v, want a chain", row.name, err)
		}
		if opened := l.audit(broker.OpOpen); opened[len(opened)-1].Bundle != digest {
			t.Errorf("%s: %s decided, want %s to stay", row.name, opened[len(opened)-1].Bundle, digest)
		}
	}
	idle, newer := l.bundle(5, notesTool,
		notesPermit+`@id("idle") forbid (principal == Agent::"spiffe://example.org/idle", action, resource);`, 2)
	if line := l.reload(idle); line.Msg != msgInForce || line.text["bundle"] != newer {
		t.Fatalf("a newer bundle: %s", line.raw)
	}
	l.stop()

	// After a restart the ledger still has the bundle that was in force.
	l.write(l.config.Policy.Bundle, good(3))
	for flag, want := range map[string]string{
		"":                          `older than version 5`,
		"--allow-policy-rollback=2": "the rollback is to version 2",
	} {
		log, serving := l.start(strings.Fields(flag)...)
		if serving || !strings.Contains(log, want) {
			t.Fatalf("pawl server %s with an older bundle, serving %v, logs:\n%s\nwant %q", flag, serving, log, want)
		}
		if _, hint, _ := strings.Cut(log, "hint: "); flag == "" && !strings.Contains(hint, "--allow-policy-rollback 3") {
			t.Fatalf("pawl server with an older bundle logs:\n%s\nwant a hint with the flag", log)
		}
	}
	l.mustServe("--allow-policy-rollback=3")
	l.stop()
	l.mustServe() // version 3 was in force last
	changes := l.audit(broker.OpPolicy)
	want := []struct{ actor, bundle, detail string }{
		{"pawl", digest, "notes version 3; signed by "},
		{"pawl", newer, "notes version 5 follows notes version 3; signed by "},
		{fmt.Sprintf("local:uid=%d", os.Getuid()), digest,
			"notes version 3 follows notes version 5, rolled back; signed by "},
	}
	if len(changes) != len(want) {
		t.Fatalf("the audit has the changes %+v, want %d", changes, len(want))
	}
	for i, w := range want {
		e := changes[i]
		if e.Actor != w.actor || e.Bundle != w.bundle || !strings.HasPrefix(e.Detail, w.detail) ||
			strings.Count(e.Detail, ", ") != strings.Count(w.detail, ", ")+1 {
			t.Errorf("change %d in the audit = %+v, want %+v and two signers", i+1, e, w)
		}
	}
}

// tampered changes one byte of the signed payload.
func tampered(t *testing.T, jws []byte) []byte {
	t.Helper()
	var e map[string]json.RawMessage
	if err := json.Unmarshal(jws, &e); err != nil {
		t.Fatal(err)
	}
	payload := bytes.Clone(e["payload"])
	payload[len(payload)/2] ^= 1
	e["payload"] = payload
	raw, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestCandidate holds that a candidate gets the running bundle's questions and changes no answer. Each difference
// is logged and counted, without arguments.
func TestCandidate(t *testing.T) {
	t.Parallel()
	l := newLifecycle(t)
	live, _ := l.bundle(3, notesTool, notesPermit, 2)
	stricter, _ := l.bundle(4, notesTool, notesPermit+
		`@id("no-steps") @violation("freeze-caller") forbid (principal, action == Action::"use", resource);`, 2)
	unsigned, _ := l.bundle(4, notesTool, notesPermit, 1)
	l.write(l.config.Policy.Bundle, live)
	l.write(l.config.Policy.Candidate, stricter)
	l.mustServe()
	d, err := l.open()
	if err != nil {
		t.Fatal(err)
	}
	const marker = "page-that-only-the-agent-may-know"
	begin := func(step string) {
		t.Helper()
		_, err := d.Begin(t.Context(), agent.Call{Tool: "notes.read", Args: agent.Args{"page": marker}})
		if p := new(agent.Error); !errors.As(err, &p) || p.Status != http.StatusServiceUnavailable {
			t.Fatalf("a step %s = %v, want 503: policy allows it and Vault is down", step, err)
		}
	}
	begin("that the candidate forbids")
	line := l.await("the candidate policy differs")
	if strings.Contains(line.raw, marker) ||
		!strings.Contains(line.raw, `live allow by [\"all\"], candidate deny (freeze-caller) by [\"no-steps\"]`) {
		t.Errorf("the log has %s, want both answers and no argument", line.raw)
	}
	page := scrape(t, l.config.Listen.Socket)
	for _, want := range []string{
		`pawl_shadow_differences_total{action="use",tool="notes.read"} 1`,
		"pawl_shadow_candidate 1", "pawl_shadow_missed_total 0",
	} {
		if !strings.Contains(page, "\n"+want+"\n") {
			t.Errorf("/metrics lacks %q", want)
		}
	}
	if strings.Contains(page, `pawl_shadow_differences_total{action="open"`) || strings.Contains(page, marker) {
		t.Error("/metrics counts an equal answer, or has an argument")
	}

	// An invalid candidate, and a candidate that is already in force, are not evaluated.
	l.write(l.config.Policy.Candidate, unsigned)
	line = l.reload(live, "the candidate policy bundle is refused; nothing is compared")
	if !strings.Contains(line.raw, "2 needed, 1 valid") {
		t.Errorf("an under-signed candidate: %s", line.raw)
	}
	begin("beside a refused candidate")
	if page := scrape(t, l.config.Listen.Socket); !strings.Contains(page, "\npawl_shadow_candidate 0\n") {
		t.Error("/metrics has a candidate")
	}
	newer, _ := l.bundle(5, notesTool, notesPermit, 2)
	l.write(l.config.Policy.Candidate, newer)
	l.reload(newer, "the candidate policy bundle is in force; there is nothing to compare")
}
