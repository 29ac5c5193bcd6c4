package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pawlsec/pawl/attest/workload"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/wire"
)

// runPawl runs one command of pawl, as root and with the default answers.
func runPawl(ctx context.Context, args ...string) (out string, err error) {
	var stdout, stderr bytes.Buffer
	c := command()
	c.SetArgs(args)
	c.SetOut(&stdout)
	c.SetErr(&stderr)
	err = c.ExecuteContext(ctx)
	return stdout.String() + stderr.String(), err
}

// TestFreezeThatNobodyCanLift freezes where root at the local socket is the only operator. Each place says so, and root
// lifts the freeze on the stopped broker. The audit log and every later report show that.
func TestFreezeThatNobodyCanLift(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Fatal("the tests run as root")
	}
	ctx := t.Context()
	dir, err := os.MkdirTemp("", "pawl") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	identities, err := workload.New(workload.Config{TrustDomain: "example.org"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = identities.Close() }) // its sockets end with it
	config, public, _ := wiredConfig(t, dir, identities)
	raw, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "pawl.yaml")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	var log recordedLog
	s, err := wire.Start(ctx, config, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	agent := broker.Caller{ID: identities.ID("/agent"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	open := func(s *wire.Server) (broker.Delegation, error) {
		return s.Broker.Open(ctx, agent, broker.OpenRequest{Task: "t", Rights: []broker.Right{{Tool: "notes.read", Use: true}}})
	}
	root, err := open(s)
	if err != nil {
		t.Fatal(err)
	}
	socket := []string{"--socket", config.Listen.Socket}
	pawl := func(args ...string) (string, error) { return runPawl(ctx, append(args, socket...)...) }

	out, err := pawl("freeze", "chain:"+string(root.Chain), "--yes", "--reason", "r", "--json")
	text, warning, _ := strings.Cut(out, "pawl: warning: ")
	var frozen api.Revocation
	if err != nil || json.Unmarshal([]byte(text), &frozen) != nil || !frozen.Freeze || !frozen.Uncounted || frozen.Grants != 0 {
		t.Fatalf("pawl freeze = %q, %v, want it frozen, and not counted", out, err)
	}
	_, again := pawl("unfreeze", frozen.ID)
	problem, _ := again.(*api.Problem)
	if problem == nil || problem.Code != "second_person_needed" {
		t.Fatalf("pawl unfreeze = %v, want second_person_needed", again)
	}
	doctor, _ := runDoctor(ctx, file)
	for place, said := range map[string]string{"the answer": warning, "the API": frozen.Warning, "the refusal": problem.Remedy,
		"the doctor": doctor, "the log": log.String()} {
		for _, want := range []string{"nobody can lift a freeze here", "listen.operators", "pawl unfreeze --offline"} {
			if !strings.Contains(said, want) {
				t.Errorf("%s says %q, want %q", place, said, want)
			}
		}
	}
	offline := []string{"unfreeze", frozen.ID, "--offline", "--config", file, "--reason", "nobody else is here"}
	if out, err := runPawl(ctx, offline...); err == nil || !strings.Contains(err.Error(), "the broker must be stopped") {
		t.Errorf("pawl unfreeze --offline beside a running broker = %q, %v, want refused", out, err)
	}
	if out, err := runPawl(ctx, offline[:5]...); err == nil || !strings.Contains(err.Error(), "--reason") {
		t.Errorf("pawl unfreeze --offline without a reason = %q, %v, want refused", out, err)
	}
	s.Close()
	if out, err := runPawl(ctx, offline...); err != nil || !strings.Contains(out, frozen.ID+" is lifted by one person") {
		t.Fatalf("pawl unfreeze --offline = %q, %v", out, err)
	}

	if s, err = wire.Start(ctx, config, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	status, err := s.Broker.Status(ctx, agent, root.ID)
	if err != nil || status.Fence != nil {
		t.Errorf("Status after the freeze was lifted = %+v, %v, want no fence", status, err)
	}
	out, err = pawl("audit")
	if want := "lifted by one person on a stopped broker: nobody else is here"; err != nil || !strings.Contains(out, want) {
		t.Errorf("pawl audit = %q, %v, want %q", out, err, want)
	}
	other, err := open(s)
	if err != nil {
		t.Fatal(err)
	}
	out, err = pawl("revoke", "chain:"+string(other.Chain), "--yes", "--reason", "later", "--no-follow", "--json")
	var later api.Revocation
	if err != nil || json.Unmarshal([]byte(out), &later) != nil {
		t.Fatalf("pawl revoke = %q, %v", out, err)
	}
	c, err := operator.New(operator.Config{Address: "unix:" + config.Listen.Socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	for _, id := range []string{frozen.ID, later.ID} {
		jws, err := c.Report(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		r, err := audit.VerifyReport(jws, public)
		if err != nil || len(r.LiftedAlone) != 1 || string(r.LiftedAlone[0].Revocation) != frozen.ID ||
			r.LiftedAlone[0].Reason != "nobody else is here" {
			t.Errorf("the report of %s = %+v, %v, want the lifted freeze in it", id, r.LiftedAlone, err)
		}
		if text := r.Markdown(); !strings.Contains(text, "One person lifted freeze "+frozen.ID) {
			t.Errorf("the report of %s as text lacks the lifted freeze:\n%s", id, text)
		}
	}
}

// recordedLog is a log. Safe for concurrent use.
type recordedLog struct {
	mu   sync.Mutex // guards text
	text strings.Builder
}

func (l *recordedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *recordedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
