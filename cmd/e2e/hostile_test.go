package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
)

// innocents is how many logins, with one session each, a hostile login must not hold up.
const innocents = 40

// inside is a login with an open session, in the midst of reading.
type inside struct {
	login
	conn *pgx.Conn
}

// enter logs in and begins to read.
func (l login) enter(ctx context.Context) (inside, error) {
	conn, err := l.connect(ctx)
	if err != nil {
		return inside{}, errors.New("logging in: " + stateOf(err))
	}
	// On a slow machine others take longer to enter than a session may be idle.
	_, err = conn.Exec(ctx, "SET idle_in_transaction_session_timeout = 0; BEGIN; "+
		"DECLARE c NO SCROLL CURSOR FOR SELECT generate_series(1, 1000000), item FROM orders")
	if err != nil {
		return inside{}, errors.New("beginning to read: " + stateOf(err))
	}
	return inside{l, conn}, nil
}

// reads reports whether the session reads on. An error other than one by PostgreSQL, or the end of the connection, is
// no answer.
func (i inside) reads(ctx context.Context) bool {
	_, err := i.conn.Exec(ctx, "FETCH 1 FROM c")
	return err == nil
}

// stateOf gives the SQLSTATE of an error. pgx's own text quotes the DSN.
func stateOf(err error) string {
	var refusal *pgconn.PgError
	if errors.As(err, &refusal) {
		return "SQLSTATE " + refusal.Code
	}
	return fmt.Sprintf("%T", err)
}

// crowd takes n steps under one delegation and enters with each secret.
func (w *world) crowd(ctx context.Context, d *agent.Delegation, n int) []inside {
	w.t.Helper()
	all := make([]inside, n)
	var g errgroup.Group
	g.SetLimit(8)
	for i := range all {
		g.Go(func() error {
			_, l, err := take(ctx, d, 0)
			if err != nil {
				return err
			}
			all[i], err = l.enter(ctx)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		for _, i := range all {
			_ = i.conn.Close(context.WithoutCancel(ctx)) // most were severed
		}
	})
	return all
}

// working counts the logins of a crowd that can be used and the sessions that are open. It asks PostgreSQL over a
// connection that agents cannot take.
func working(ctx context.Context, super *pgx.Conn, all []inside) (logins, sessions int, err error) {
	names := make([]string, len(all))
	for i := range all {
		names[i] = all[i].Username
	}
	err = super.QueryRow(ctx, `SELECT (SELECT count(*) FROM pg_authid WHERE rolname = ANY ($1) AND rolcanlogin),
		(SELECT count(*) FROM pg_stat_activity WHERE usename = ANY ($1))`, names).Scan(&logins, &sessions)
	return logins, sessions, err
}

// untilDead waits until no login and no session of the crowd works, and returns when that was. It tries each raw secret
// and each session.
func (w *world) untilDead(super *pgx.Conn, all []inside, d time.Duration) (dead time.Time) {
	w.t.Helper()
	var logins, sessions int
	if !within(d, func() bool {
		var err error
		if logins, sessions, err = working(w.t.Context(), super, all); err != nil {
			w.t.Fatal(err)
		}
		return logins+sessions == 0
	}) {
		w.t.Errorf("after %v %d of %d logins can be used and %d sessions are open", d, logins, len(all), sessions)
	}
	dead = time.Now()
	for _, i := range all {
		if w.oracle.works(i.login) {
			w.t.Errorf("login %s works", i.Username)
		}
		if i.reads(w.t.Context()) {
			w.t.Errorf("the session of %s reads on", i.Username)
		}
	}
	return dead
}

// hostility is what a hostile agent does with its own secret, beside an innocent one. If release is not nil, the hostile
// login cannot be ended before it is called.
type hostility func(t *testing.T, hostile inside, innocent login) (release func())

// does executes statements in the session of the hostile login.
func does(statements ...string) hostility {
	return func(t *testing.T, hostile inside, innocent login) func() {
		t.Helper()
		ctx := t.Context()
		for _, sql := range append([]string{"ROLLBACK", "SET idle_in_transaction_session_timeout = 0"}, statements...) {
			sql = strings.NewReplacer("INNOCENT", innocent.Username, "ITSELF", hostile.Username).Replace(sql)
			if _, err := hostile.conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
				t.Fatalf("%.60s = %s, want nil", sql, stateOf(err))
			}
		}
		return nil
	}
}

// logsInAgain keeps several connections, each of which locks the login's own row. It logs in again when PostgreSQL ends
// one of them, until its secret is refused.
func logsInAgain(t *testing.T, hostile inside, _ login) func() {
	ctx, stop := context.WithCancel(t.Context())
	holding := make(chan struct{}, 1)
	var g errgroup.Group
	for range 4 {
		g.Go(func() error {
			for ctx.Err() == nil {
				conn, err := hostile.connect(ctx)
				if refusal := new(pgconn.PgError); errors.As(err, &refusal) && strings.HasPrefix(refusal.Code, "28") {
					return nil
				}
				if err != nil {
					continue
				}
				_, _ = conn.Exec(ctx, "BEGIN; ALTER ROLE CURRENT_USER PASSWORD '"+hostile.Password+"'")
				select {
				case holding <- struct{}{}:
				default:
				}
				_ = conn.PgConn().WaitForNotification(ctx) // until it is terminated
				_ = conn.Close(context.WithoutCancel(ctx))
			}
			return nil
		})
	}
	t.Cleanup(func() { stop(); _ = g.Wait() }) // it returns nil
	<-holding
	return nil
}

// heldBy has another session lock the hostile login's row: one that the broker may not end.
func heldBy(super *pgx.Conn) hostility {
	return func(t *testing.T, hostile inside, _ login) func() {
		t.Helper()
		execute := func(sql string) {
			if _, err := super.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
				t.Fatalf("%.60s = %s, want nil", sql, stateOf(err))
			}
		}
		execute("BEGIN; ALTER ROLE " + pgx.Identifier{hostile.Username}.Sanitize() + " CONNECTION LIMIT 4")
		return func() { execute("ROLLBACK") }
	}
}

// TestHostileAgent has one agent of forty-one do with its own secret what holds up the end of logins, and revokes their
// chain. The forty others are dead first or with it, and it is dead within its own life. The revocation is not CLOSED
// before.
func TestHostileAgent(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{PostgresSettings: map[string]string{"max_prepared_transactions": "5"}})
	w := newWorld(t, env, nil)
	w.here(nil, nil)
	super, another := w.oracle.superuser(), w.oracle.superuser()
	t.Cleanup(func() {
		for _, conn := range []*pgx.Conn{super, another} {
			_ = conn.Close(context.WithoutCancel(t.Context())) // all is done
		}
	})
	// As in a database that has large objects.
	if _, err := super.Exec(t.Context(), "GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC"); err != nil {
		t.Fatal(err)
	}
	for name, act := range map[string]hostility{
		"nothing":              func(*testing.T, inside, login) func() { return nil },
		"held by another":      heldBy(another),
		"open ALTER ROLE":      does("BEGIN", "ALTER ROLE CURRENT_USER PASSWORD 'x'"),
		"logging in again":     logsInAgain,
		"prepared transaction": does("BEGIN", "ALTER ROLE CURRENT_USER PASSWORD 'x'", "PREPARE TRANSACTION 'ITSELF'"),
		"large objects":        does("SELECT count(lo_create(0)) FROM generate_series(1, 60000)"),
		"advisory lock":        does("SELECT pg_advisory_lock(hashtext('pawl.shapes'))"),
		"grant to another": does("CREATE TEMP TABLE mine (id int)", "BEGIN",
			`GRANT SELECT ON mine TO "INNOCENT"`),
	} {
		t.Run(name, func(t *testing.T) { w.with(t).outdoes(super, act) })
	}
}

// with gives the world for a subtest.
func (w *world) with(t *testing.T) *world {
	sub := *w
	sub.t, sub.oracle.t = t, t
	return &sub
}

func (w *world) outdoes(super *pgx.Conn, act hostility) {
	ctx, cancel := context.WithTimeout(w.t.Context(), 2*time.Minute)
	defer cancel()
	d, err := w.agent("planner").Open(ctx, agent.Chain{Task: "hostile", Rights: rights("db.read")})
	if err != nil {
		w.t.Fatal(err)
	}
	all := w.crowd(ctx, d, innocents+1)
	hostile, others := all[0], all[1:]
	var end time.Time
	if err := super.QueryRow(ctx, "SELECT rolvaliduntil FROM pg_roles WHERE rolname = $1", hostile.Username).
		Scan(&end); err != nil {
		w.t.Fatal(err)
	}
	release := act(w.t, hostile, others[0].login)

	o := w.operator()
	rv, err := o.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "hostile"})
	if err != nil {
		w.t.Fatal(err)
	}
	acknowledged := time.Now()
	dead := w.untilDead(super, others, 20*time.Second)
	w.t.Logf("the innocent logins were dead %v after the acknowledgement", dead.Sub(acknowledged))
	if release != nil {
		w.resists(o, rv.ID, hostile)
		release()
	}
	if err := o.Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
		w.t.Fatal(err)
	}
	if late := time.Since(end); late > 0 {
		w.t.Errorf("the revocation was CLOSED %v after the hostile login's own end, want before", late)
	}
	w.untilDead(super, all[:1], 0)
	if rv.Closure != string(broker.ClosureClosed) || rv.Dead != len(all) {
		w.t.Errorf("closure = %s with %d dead, want CLOSED with %d", rv.Closure, rv.Dead, len(all))
	}
	w.t.Logf("the revocation was CLOSED %v after the acknowledgement", rv.Settled.Sub(acknowledged))
	var left int
	if err := super.QueryRow(ctx, "SELECT count(*) FROM pg_prepared_xact()").Scan(&left); err != nil || left != 0 {
		w.t.Errorf("prepared transactions = %d, %v, want none", left, err)
	}
}

// resists checks that the revocation counts the innocent logins as dead, and is not CLOSED while the hostile one works.
func (w *world) resists(o *operator.Client, id string, hostile inside) {
	w.t.Helper()
	var rv api.Revocation
	if !within(30*time.Second, func() bool {
		var err error
		if rv, err = o.Revocation(w.t.Context(), id); err != nil {
			w.t.Fatal(err)
		}
		return rv.Dead == innocents
	}) {
		w.t.Errorf("%d are called dead, want %d", rv.Dead, innocents)
	}
	if !w.oracle.works(hostile.login) {
		w.t.Error("the hostile login does not work, although it cannot be ended")
	}
	if rv.Closure != string(broker.ClosurePartial) || rv.Alive != 1 {
		w.t.Errorf("closure = %s with %d alive, want PARTIAL with the hostile login", rv.Closure, rv.Alive)
	}
}
