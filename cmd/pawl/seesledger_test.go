package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestOperatorSeesLedgerCheck restarts a broker with a check of the ledger that takes long. Until it ends, fences and
// endings are taken, nothing is handed out, and everything says why. Then all goes on with what was there before, or, if
// the ledger is damaged, everything says that.
func TestOperatorSeesLedgerCheck(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s := newSeen(ctx, t, dev.Config{NoPostgres: true, ForgetfulVault: true, Agents: freeAddress(t)})
	doomed := s.open(ctx)
	call := agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}}
	var alive, ending *agent.Step
	for d, step := range map[*agent.Delegation]**agent.Step{s.d: &alive, doomed: &ending} {
		var err error
		if *step, err = d.Begin(ctx, call); err != nil {
			t.Fatal(err)
		}
	}
	s.env.StopBroker()
	check := s.restart(ctx)

	row := fault{name: "a ledger that is being checked", ready: 503, condition: `code="ledger_checking",part="ledger"`,
		names: []string{"ledger_checking", "only fences and endings are written"},
		tool:  "notes.read", code: "ledger_checking", detail: "has just started and checks its ledger", retryable: true}
	s.named(ctx, row)
	s.refusedEverywhere(ctx, row)
	rv := s.fence(ctx, string(doomed.Info().Chain), "CLOSED")
	select {
	case <-ending.Context().Done():
		if cause := context.Cause(ending.Context()); !errors.Is(cause, agent.ErrRevoked) {
			t.Errorf("the step under the fence ended with %v, want ErrRevoked", cause)
		}
	case <-time.After(10 * time.Second):
		t.Error("the agent under the fence did not get it during the check")
	}
	s.named(ctx, row)

	check()
	s.healthy("after the check")
	if again, err := s.operator().Revocation(ctx, rv.ID); err != nil || again.Closure != "CLOSED" || !again.Fenced.Equal(rv.Fenced) {
		t.Errorf("the revocation after the check = %+v, %v, want it CLOSED, and fenced at %v", again, err, rv.Fenced)
	}
	if _, err := doomed.Begin(ctx, call); !errors.Is(err, agent.ErrRevoked) {
		t.Errorf("a step of the revoked chain = %v, want ErrRevoked", err)
	}
	if err := alive.Context().Err(); err != nil {
		t.Errorf("the step of another chain ended with %v, want it alive", err)
	}
	if err := alive.Close(ctx); err != nil {
		t.Errorf("closing a step from before the restart = %v", err)
	}

	s.env.StopBroker()
	spoil(t, s.env.Config.Ledger)
	check = s.restart(ctx)
	s.named(ctx, row)
	check()
	row = fault{name: "a damaged ledger", ready: 503, condition: `code="ledger_unavailable",part="ledger"`,
		names: []string{"ledger_unavailable", "the ledger is damaged", "treat every secret issued since that copy as alive"},
		tool:  "notes.read", code: "issuing_stopped", detail: "the broker's ledger is damaged", retryable: true}
	s.named(ctx, row)
	s.refusedEverywhere(ctx, row)
	s.fence(ctx, string(s.d.Info().Chain), "PARTIAL") // the secrets of notes.read are static
}

// restart starts the broker again. It returns while the check of the ledger is held; check lets it end, and waits for
// the start to end.
func (s *seen) restart(ctx context.Context) (check func()) {
	s.t.Helper()
	hold, started := make(chan struct{}), make(chan error, 1)
	go func() {
		var err error
		s.env.Broker, err = wire.StartWith(ctx, s.env.Config, slog.New(slog.DiscardHandler), wire.Hooks{Check: func() { <-hold }})
		started <- err
	}()
	check = sync.OnceFunc(func() {
		close(hold)
		if err := <-started; err != nil {
			s.t.Error(err)
		}
	})
	s.t.Cleanup(s.env.StopBroker)
	s.t.Cleanup(check)
	s.within("the operators' socket", func() string {
		conn, err := net.Dial("unix", s.env.Config.Listen.Socket)
		if err != nil {
			return err.Error()
		}
		_ = conn.Close() // it was only tried
		return ""
	})
	return check
}

// refusedEverywhere holds that each request for authority is refused as in the row, and says when to try again.
func (s *seen) refusedEverywhere(ctx context.Context, row fault) {
	s.t.Helper()
	_, opened := s.client.Open(ctx, chain)
	_, delegated := s.d.Delegate(ctx, dev.Agent("fetcher").String(), agent.Share{
		Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
	for what, err := range map[string]error{"open": opened, "delegate": delegated, "step": s.step(row.tool)} {
		var p *agent.Error
		if !errors.As(err, &p) || p.Code != row.code || p.RetryAfter() == 0 {
			s.t.Errorf("%s: %s = %v, want %s and a time to wait", row.name, what, err, row.code)
		}
	}
}

// fence revokes a chain, and waits until it has the closure.
func (s *seen) fence(ctx context.Context, chain, closure string) api.Revocation {
	s.t.Helper()
	rv, err := s.operator().Revoke(ctx, api.RevokeRequest{Selector: "chain:" + chain, Reason: "test"})
	if err != nil || rv.Fenced.IsZero() {
		s.t.Fatalf("Revoke = %+v, %v, want fenced", rv, err)
	}
	s.within("the revocation", func() string {
		if rv, err = s.operator().Revocation(ctx, rv.ID); err != nil {
			return err.Error()
		}
		if rv.Closure != closure || rv.Grants == 0 {
			return rv.Closure
		}
		return ""
	})
	return rv
}

func (s *seen) operator() *operator.Client {
	s.t.Helper()
	c, err := operator.New(operator.Config{Address: "unix:" + s.env.Config.Listen.Socket})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// spoil takes a record out of a ledger that nothing reads at a start.
func spoil(t *testing.T, path string) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoFreelistSync: true})
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("records"))
		k, _ := b.Cursor().Seek([]byte("e/"))
		return b.Delete(bytes.Clone(k))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}
