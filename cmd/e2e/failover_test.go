package e2e_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestFailoverForgetsRevocation promotes a standby that never received a revocation that is CLOSED. The logins work at
// the new primary, so the revocation must not be CLOSED any more. The broker ends them there, and proves it again once a
// DBA has said that the old primary has stopped for good.
func TestFailoverForgetsRevocation(t *testing.T) {
	t.Parallel()
	need(t, true)
	for name, down := range map[string]bool{"under the broker": false, "while the broker is down": true} {
		t.Run(name, func(t *testing.T) { failover(t, down) })
	}
}

func failover(t *testing.T, down bool) {
	env := newEnv(t, dev.Config{})
	standby := parts.OwnStandby(t, env.Postgres)
	w := newWorld(t, env, func(c *wire.Config) {
		shop := c.Backends["shop"]
		shop.DSN = failoverDSN(shop.DSN, env.Postgres, standby)
		c.Backends = maps.Clone(c.Backends)
		c.Backends["shop"] = shop
	})
	said := &logBuffer{}
	log := slog.New(slog.NewTextHandler(io.MultiWriter(said, keptLog(t, w.file)),
		&slog.HandlerOptions{Level: slog.LevelWarn}))
	server := w.here(log, nil)
	w.vaultFollows(standby)
	there := w.superuserAt(standby)
	defer there.Close(context.Background()) //nolint:errcheck // all is done

	d, err := w.agent("planner").Open(t.Context(), agent.Chain{Task: "failover", Rights: rights("db.read")})
	if err != nil {
		t.Fatal(err)
	}
	var logins []login
	for range each {
		_, l, err := take(t.Context(), d, 0)
		if err != nil {
			t.Fatal(err)
		}
		l.Host, l.Port, _ = strings.Cut(standby.Address(), ":")
		logins = append(logins, l)
		w.await(there, "SELECT count(*) FROM pg_roles WHERE rolname = '"+l.Username+"'")
	}
	for _, sql := range []string{"ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()"} {
		if _, err := there.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	w.await(there, "SELECT (count(*) = 0)::int FROM pg_stat_wal_receiver")

	o := w.operator()
	rv, err := o.Revoke(t.Context(), api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "failover"})
	if err != nil {
		t.Fatal(err)
	}
	w.closed(o, rv.ID, each)
	if down {
		server.Close()
	}
	if err := env.Postgres.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := there.Exec(t.Context(), "SELECT pg_promote()"); err != nil {
		t.Fatal(err)
	}
	promoted := time.Now()
	if down {
		w.here(log, nil)
	}
	for _, l := range logins {
		if !within(30*time.Second, func() bool { return !w.oracle.works(l) }) {
			t.Errorf("login %s works at the new primary", l.Username)
		}
	}
	t.Logf("no login works %v after the promotion", time.Since(promoted))
	if !within(30*time.Second, func() bool { return slices.Contains(w.closures(o, rv.ID), "PARTIAL") }) {
		t.Error("the revocation stays CLOSED, although its logins worked again")
	}
	// The broker cannot see that the old primary has stopped, and it would take these logins.
	if _, err := there.Exec(t.Context(), "SELECT pawl.adopt_logins()"); err != nil {
		t.Fatal(err)
	}
	w.closed(o, rv.ID, each)
	closures := w.closures(o, rv.ID)
	if at := slices.Index(closures, "CLOSED"); at < 0 || !slices.Contains(closures[at:], "PARTIAL") ||
		closures[len(closures)-1] != "CLOSED" {
		t.Errorf("the closures were %v, want CLOSED, PARTIAL, and CLOSED in the end", closures)
	}
	if want := fmt.Sprintf("%d secrets that were proven dead work again at shop", each); !strings.Contains(said.String(), want) {
		t.Errorf("the log does not say %q:\n%s", want, said)
	}
	w.allClosed(bound)
}

// failoverDSN is the DSN of a primary and its standby.
func failoverDSN(dsn string, primary, standby *parts.PostgresServer) string {
	host, port, _ := strings.Cut(primary.Address(), ":")
	other, otherPort, _ := strings.Cut(standby.Address(), ":")
	return strings.NewReplacer("host="+host, "host="+host+","+other, "port="+port, "port="+port+","+otherPort).Replace(dsn) +
		" target_session_attrs=read-write"
}

// vaultFollows makes Vault's connection lead to the primary of the two servers.
func (w *world) vaultFollows(standby *parts.PostgresServer) {
	w.t.Helper()
	_, database, _ := strings.Cut(w.config.Backends["shop"].DSN, "dbname=")
	database, _, _ = strings.Cut(database, " ")
	_, err := w.oracle.vault.Logical().WriteWithContext(w.t.Context(), "database/config/shop", map[string]any{
		"plugin_name": "postgresql-database-plugin",
		"connection_url": fmt.Sprintf("postgresql://{{username}}:{{password}}@%s,%s/%s?sslmode=disable&target_session_attrs=read-write",
			w.env.Postgres.Address(), standby.Address(), database),
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// superuserAt connects to the database at another server.
func (w *world) superuserAt(s *parts.PostgresServer) *pgx.Conn {
	w.t.Helper()
	conn, err := pgx.Connect(w.t.Context(), strings.Replace(w.env.Database, w.env.Postgres.Address(), s.Address(), 1))
	if err != nil {
		w.t.Fatal("connecting to the other server: " + stateOf(err))
	}
	return conn
}

// closed follows a revocation until it is CLOSED with the given number of dead grants.
func (w *world) closed(o *operator.Client, id string, dead int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	var rv api.Revocation
	if err := o.Follow(ctx, id, func(now api.Revocation) error { rv = now; return nil }); err != nil {
		w.t.Fatalf("following the revocation: %v; it is %+v", err, rv)
	}
	if rv.Closure != string(broker.ClosureClosed) || rv.Dead != dead {
		w.t.Errorf("closure = %s with %d dead, want CLOSED with %d", rv.Closure, rv.Dead, dead)
	}
}

// closures reads the closures that a revocation has had from the audit log.
func (w *world) closures(o *operator.Client, id string) (all []string) {
	w.t.Helper()
	var after uint64
	for {
		page, err := o.Audit(w.t.Context(), after, 0)
		if err != nil {
			w.t.Fatal(err)
		}
		if len(page.Entries) == 0 {
			return all
		}
		for _, e := range page.Entries {
			if e.Revocation == id && e.Op == string(broker.OpClosure) {
				closure, _, _ := strings.Cut(e.Detail, ":")
				all = append(all, closure)
			}
		}
		after = page.Next
	}
}
