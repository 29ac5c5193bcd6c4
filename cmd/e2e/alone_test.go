package e2e_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestSeverAlone revokes a chain while the synchronous standby of its database is gone and Vault is paused, also while
// agents hold every connection of the server. No login and no session of the chain may wait for either. `go run
// ./cmd/bench -only alone` measures the time, of which two seconds are promised.
func TestSeverAlone(t *testing.T) {
	t.Parallel()
	need(t, true)
	for name, full := range map[string]bool{"room for more connections": false, "all connections taken": true} {
		t.Run(name, func(t *testing.T) {
			env := newEnv(t, dev.Config{MaxConnections: 60, PostgresSettings: map[string]string{"synchronous_commit": "on"}})
			w := newWorld(t, env, nil)
			w.here(nil, nil)
			super := w.oracle.superuser()
			t.Cleanup(func() { _ = super.Close(context.WithoutCancel(t.Context())) })
			standby := w.synchronousStandby(super)
			d, err := w.agent("planner").Open(t.Context(), agent.Chain{Task: "alone", Rights: rights("db.read")})
			if err != nil {
				t.Fatal(err)
			}
			steps := w.crowd(t.Context(), d, innocents)
			all := steps
			if full {
				all = w.fill(super, steps)
			}
			if err := standby.Kill(); err != nil {
				t.Fatal(err)
			}
			w.commitsWait(super)
			if err := env.Vault.Pause(); err != nil {
				t.Fatal(err)
			}

			o := w.operator()
			rv, err := o.Revoke(t.Context(), api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "alone"})
			if err != nil {
				t.Fatal(err)
			}
			acknowledged := time.Now()
			dead := w.untilDead(super, all, 10*time.Second)
			t.Logf("%d logins and %d sessions were dead %v after the acknowledgement", len(steps), len(all),
				dead.Sub(acknowledged))
			if rv, err = o.Revocation(t.Context(), rv.ID); err != nil || rv.Closure == string(broker.ClosureClosed) {
				t.Errorf("closure = %s, %v while Vault is paused, want no CLOSED", rv.Closure, err)
			}

			if err := env.Vault.Continue(); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := o.Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
				t.Fatal(err)
			}
			if rv.Closure != string(broker.ClosureClosed) || rv.Dead != len(steps) {
				t.Errorf("closure = %s with %d dead, want CLOSED with %d", rv.Closure, rv.Dead, len(steps))
			}
		})
	}
}

// synchronousStandby starts a standby without which the server completes no commit.
func (w *world) synchronousStandby(super *pgx.Conn) *parts.PostgresServer {
	w.t.Helper()
	standby := parts.OwnStandby(w.t, w.env.Postgres)
	for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"} {
		if _, err := super.Exec(w.t.Context(), sql); err != nil {
			w.t.Fatal(err)
		}
	}
	w.await(super, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
	return standby
}

// await waits until a query counts something.
func (w *world) await(super *pgx.Conn, sql string) {
	w.t.Helper()
	if !within(30*time.Second, func() bool { return w.count(super, sql) > 0 }) {
		w.t.Fatalf("after 30 s there is none: %s", sql)
	}
}

func (w *world) count(super *pgx.Conn, sql string) (n int) {
	w.t.Helper()
	if err := super.QueryRow(w.t.Context(), sql).Scan(&n); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// commitsWait checks that a commit waits for the standby.
func (w *world) commitsWait(super *pgx.Conn) {
	w.t.Helper()
	w.await(super, "SELECT (count(*) = 0)::int FROM pg_stat_replication")
	ctx, cancel := context.WithCancel(w.t.Context())
	writer, written := w.oracle.superuser(), make(chan struct{})
	go func() {
		defer close(written)
		_, _ = writer.Exec(ctx, "CREATE TABLE waits ()") // it is canceled
	}()
	w.await(super, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
	cancel()
	<-written
	_ = writer.Close(context.WithoutCancel(ctx)) // it was canceled
}

// fill enters again with the secrets of the crowd until the server has room for nobody else, and returns all sessions.
func (w *world) fill(super *pgx.Conn, all []inside) []inside {
	w.t.Helper()
	const room = `SELECT current_setting('max_connections')::int
			- current_setting('superuser_reserved_connections')::int - count(*)
		FROM pg_stat_activity WHERE backend_type = 'client backend'`
	steps := len(all)
	for i := 0; w.count(super, room) > 0; i++ {
		again, err := all[i%steps].enter(w.t.Context())
		if err != nil && strings.HasSuffix(err.Error(), "53300") { // a refused session takes a connection for a moment
			continue
		}
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { _ = again.conn.Close(context.WithoutCancel(w.t.Context())) }) // it was severed
		all = append(all, again)
	}
	return all
}
