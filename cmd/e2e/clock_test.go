package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// byVaultsClock are the tools with secrets that end by Vault's clock.
var byVaultsClock = map[string]agent.Call{
	"tls.call":    {Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}},
	"host.uptime": {Tool: "host.uptime"},
}

// at starts a broker whose clock is ahead by some nanoseconds, and opens a chain for the tools.
func (w *world) at(ahead *atomic.Int64, tools ...string) *agent.Delegation {
	w.t.Helper()
	if _, err := w.start(slog.New(slog.NewTextHandler(keptLog(w.t, w.file), nil)),
		wire.Hooks{Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }}); err != nil {
		w.t.Fatal(err)
	}
	chain := agent.Chain{Task: "the clock"}
	for _, tool := range tools {
		chain.Rights = append(chain.Rights, agent.Right{Tool: tool, Use: true})
	}
	d, err := w.agent("planner").Open(w.t.Context(), chain)
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

// ask reads a page of the broker over the operators' socket.
func (w *world) ask(path string) (status int, page string) {
	w.t.Helper()
	socket := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", w.config.Listen.Socket)
		}}}
	answer, err := socket.Get("http://socket" + path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	raw, err := io.ReadAll(answer.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer.StatusCode, string(raw)
}

// vaultsClock reads how far Vault's clock is ahead, as the metric has it.
func (w *world) vaultsClock() float64 {
	w.t.Helper()
	_, page := w.ask("/metrics")
	found := regexp.MustCompile(`(?m)^pawl_vault_clock_seconds (\S+)$`).FindStringSubmatch(page)
	if len(found) != 2 {
		w.t.Fatal("there is no metric of the clock")
	}
	ahead, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		w.t.Fatal(err)
	}
	return ahead
}

// TestVaultAhead takes forty steps of pki and ssh tools with a Vault whose clock is two seconds ahead, and behind. Each
// gets its secret, and ends.
func TestVaultAhead(t *testing.T) {
	t.Parallel()
	need(t, false)
	env := newEnv(t, dev.Config{NoPostgres: true})
	for _, ahead := range []time.Duration{-2 * time.Second, 2 * time.Second} {
		w := newWorld(t, env, nil)
		var clock atomic.Int64
		clock.Store(int64(ahead))
		d := w.at(&clock, "tls.call", "host.uptime")
		var all sync.WaitGroup
		failed := make(chan error, 40)
		turns := make(chan struct{}, 8) // steps that wait longer than a mint may are refused
		for name, call := range byVaultsClock {
			for range 20 {
				all.Go(func() {
					turns <- struct{}{}
					defer func() { <-turns }()
					step, err := d.Begin(t.Context(), call)
					if err == nil {
						err = step.Close(t.Context())
					}
					if err != nil {
						failed <- fmt.Errorf("%s with the broker %v ahead: %w", name, ahead, err)
					}
				})
			}
		}
		all.Wait()
		close(failed)
		for err := range failed {
			t.Error(err)
		}
	}
}

// TestClockOff sets the clock of a running broker five seconds off. Within ten seconds its health, its metric and the
// agent's error name the clock. Nothing is minted, and tools with other secrets work. Once the clock is right, so is the
// rest.
func TestClockOff(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	for _, ahead := range []time.Duration{-5 * time.Second, 5 * time.Second} {
		w := newWorld(t, env, nil)
		var clock atomic.Int64
		d := w.at(&clock, "tls.call", "host.uptime", "db.read")
		status := func(want int) func() bool {
			return func() bool { got, _ := w.ask("/healthz"); return got == want }
		}
		if !within(10*time.Second, status(http.StatusOK)) {
			t.Fatal("the broker does not become ready")
		}
		clock.Store(int64(ahead))
		if !within(10*time.Second, status(http.StatusServiceUnavailable)) {
			t.Errorf("/healthz is 200 with the broker %v ahead, want 503", ahead)
		}
		if off := w.vaultsClock() + ahead.Seconds(); off < -1 || off > 1 {
			t.Errorf("pawl_vault_clock_seconds = %v, want about %v", w.vaultsClock(), -ahead.Seconds())
		}
		for name, call := range byVaultsClock {
			_, err := d.Begin(t.Context(), call)
			unavailable(t, fmt.Sprintf("%s with the broker %v ahead", name, ahead), err, broker.CodeClockSkew)
			var problem *agent.Error
			if errors.As(err, &problem) && (!strings.Contains(problem.Detail, "clock") || problem.RetryAfter() <= 0) {
				t.Errorf("the agent gets %+v, want a detail that names the clock, and a time to retry", problem)
			}
		}
		w.healthy(d)
		for _, g := range w.grants() {
			if g.Tool != "db.read" && g.Lease != "" {
				t.Errorf("grant %s of %s has a lease", g.ID, g.Tool)
			}
		}
		clock.Store(0)
		if !within(10*time.Second, status(http.StatusOK)) {
			t.Error("/healthz is 503 with the clock set right")
		}
		for name, call := range byVaultsClock {
			if _, err := d.Begin(t.Context(), call); err != nil {
				t.Errorf("%s with the clock set right: %v", name, err)
			}
		}
	}
}
