package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
)

// innocents is how many logins with one session each a hostile login must not hold up.
const innocents = 40

// ownTarget is a target on a server of its own that allows prepared transactions.
func ownTarget(tt *testing.T) *target {
	return targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true, Settings: map[string]string{
		"max_prepared_transactions": "5",
	}}))
}

// run executes each statement in the session.
func (t *target) run(conn *pgx.Conn, statements ...string) {
	t.Helper()
	for _, sql := range statements {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%.80s = %v, want nil", sql, sqlState(err))
		}
	}
}

// alterItself changes the login's own password in a transaction that stays open. So PostgreSQL lets no other
// transaction alter the login.
func (t *target) alterItself(c credential) {
	t.Helper()
	conn := t.login(c)
	t.run(conn, "SET idle_in_transaction_session_timeout = 0", "BEGIN", "ALTER ROLE CURRENT_USER PASSWORD 'x'")
}

// alterItselfAgain is alterItself from eight connections, each of which logs in again when it is terminated.
func (t *target) alterItselfAgain(c credential) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	holding := make(chan struct{}, 1)
	go func() {
		defer close(done)
		each(8, 8, func(int) {
			for ctx.Err() == nil {
				conn, err := pgx.Connect(ctx, c.URL)
				if refused := new(pgconn.PgError); errors.As(err, &refused) && strings.HasPrefix(refused.Code, "28") {
					return
				}
				if err != nil {
					continue
				}
				// The password stays the same, so that the login keeps working.
				_, _ = conn.Exec(ctx, "BEGIN; ALTER ROLE CURRENT_USER PASSWORD '"+conn.Config().Password+"'")
				select {
				case holding <- struct{}{}:
				default:
				}
				_ = conn.PgConn().WaitForNotification(ctx) // until it is terminated
				_ = conn.Close(context.WithoutCancel(ctx))
			}
		})
	}()
	t.Cleanup(func() { stop(); <-done })
	<-holding
}

// alterItselfPrepared is alterItself with a prepared transaction, which outlives its session.
func (t *target) alterItselfPrepared(c credential) {
	t.Helper()
	t.run(t.login(c), "BEGIN", "ALTER ROLE CURRENT_USER PASSWORD 'x'", "PREPARE TRANSACTION '"+c.User+"'")
}

// severInnocents severs 40 logins with an open session each, and the given one if it is not nil. It returns the time
// until the last of the 40 could not log in, had no rights and no session.
func (t *target) severInnocents(hostile *credential) time.Duration {
	t.Helper()
	creds, conns := make([]credential, innocents), make([]*pgx.Conn, innocents)
	var grants []broker.Grant
	var names []string
	for i := range creds {
		creds[i] = t.mint(`{"tables":["orders"]}`)
		conns[i] = t.cursor(creds[i])
		grants, names = append(grants, creds[i].grant), append(names, creds[i].User)
	}
	if hostile != nil {
		grants = append([]broker.Grant{hostile.grant}, grants...)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	start := time.Now()
	severed := make(chan error, 1)
	go func() { severed <- t.backend.Sever(ctx, grants) }()
	t.awaitNone(`SELECT (SELECT count(*) FROM pg_roles r WHERE r.rolname = ANY ($1) AND (r.rolcanlogin
			OR EXISTS (SELECT FROM pg_auth_members m WHERE m.member = r.oid)))
		+ (SELECT count(*) FROM pg_stat_activity WHERE usename = ANY ($1))`, names)
	took := time.Since(start)
	err := <-severed
	t.Logf("innocents dead in %v; Sever = %v in %v", took, err, time.Since(start))
	for i, c := range creds {
		if !t.refusesLogin(c) || !t.sessionEnded(conns[i]) {
			t.Errorf("%s works after Sever", c.User)
		}
	}
	for i, e := range t.prove(grants...) {
		if e.Outcome != broker.OutcomeDead && (hostile == nil || i > 0) {
			t.Errorf("Prove(an innocent login) = %v %q, want dead", e.Outcome, e.Answer)
		}
	}
	return took
}

// awaitNone polls until the query returns zero.
func (t *target) awaitNone(sql string, args ...any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for t.count(sql, args...) > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%.40s… is not zero after a minute", sql)
		}
	}
}

// with returns the target for a subtest.
func (t *target) with(tt *testing.T) *target {
	return &target{T: tt, server: t.server, name: t.name, root: t.root, vault: t.vault, backend: t.backend, creds: t.creds}
}

// selfLocks are the ways in which a login can prevent that another transaction alters it.
var selfLocks = map[string]func(*target, credential){
	"open transaction":     (*target).alterItself,
	"logging in again":     (*target).alterItselfAgain,
	"prepared transaction": (*target).alterItselfPrepared,
}

// TestHostileLogin checks that a login that locks itself holds up the end of no other login. While its raw secret works
// it is not called dead.
func TestHostileLogin(tt *testing.T) {
	t := ownTarget(tt)
	alone := max(t.severInnocents(nil), 200*time.Millisecond)
	for name, lock := range selfLocks {
		tt.Run(name, func(tt *testing.T) {
			t := t.with(tt)
			hostile := t.mint(`{"tables":["orders"]}`)
			lock(t, hostile)
			if took := t.severInnocents(&hostile); took > 3*alone {
				t.Errorf("the innocent logins were dead after %v, want at most 3 times %v", took, alone)
			}
			t.endHostile(hostile)
		})
	}
}

// endHostile checks the state of a hostile login after one attempt to end it. Then it severs it.
func (t *target) endHostile(c credential) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.URL)
	if e := t.prove(c.grant)[0]; e.Outcome == broker.OutcomeDead && err == nil {
		t.Errorf("Prove(the hostile login) = dead %q, want alive: it logs in", e.Answer)
	}
	if err == nil {
		if _, err := conn.Exec(t.Context(), "SELECT FROM orders"); sqlState(err) != "42501" {
			t.Errorf("SELECT with a secret that was to be severed = %v, want 42501", sqlState(err))
		}
		_ = conn.Close(t.Context())
	}
	t.sever(c.grant)
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead || !t.refusesLogin(c) {
		t.Errorf("Prove(the hostile login) after Sever = %v %q, want dead", e.Outcome, e.Answer)
	}
}

// TestHostileLoginEnds checks that Vault's revocation of a login that locks itself returns in time. Vault makes and
// ends the logins of a database one at a time.
func TestHostileLoginEnds(tt *testing.T) {
	t := ownTarget(tt)
	for name, lock := range selfLocks {
		tt.Run(name, func(tt *testing.T) {
			t := t.with(tt)
			hostile := t.mint(`{"tables":["orders"]}`)
			lock(t, hostile)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if _, err := t.vault.Exec(ctx, "SELECT pawl.end_logins(ARRAY[$1])", hostile.User); err != nil {
				t.Errorf("end_logins of a login that locked itself = %v, want nil", err)
			}
			t.endHostile(hostile)
		})
	}
}

// TestManyLargeObjects ends a login that owns more objects than one transaction can drop. It must lose LOGIN at once,
// in Vault's revocation too, and hold up the collection of no other login.
func TestManyLargeObjects(tt *testing.T) {
	t := ownTarget(tt)
	t.exec("GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC") // as in a database that has large objects
	const objects = 60000
	hostile, other := t.mint(`{"tables":["orders"]}`), t.mint(`{"tables":["orders"]}`)
	conn := t.login(hostile)
	t.run(conn, "SELECT lo_create(0) FROM generate_series(1, 60000)")
	if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", hostile.User); err != nil {
		t.Errorf("end_logins of a login with %d large objects = %v, want nil", objects, err)
	}
	if e := t.prove(hostile.grant)[0]; e.Outcome != broker.OutcomeDead || !t.refusesLogin(hostile) {
		t.Errorf("Prove after end_logins = %v %q, want dead", e.Outcome, e.Answer)
	}
	for _, c := range []credential{hostile, other} {
		t.exec(`ALTER ROLE "` + c.User + `" VALID UNTIL '2020-01-01'`)
	}
	start := time.Now()
	if err := t.backend.Collect(t.Context(), time.Hour); err != nil {
		t.Fatalf("Collect = %v, want nil", err)
	}
	t.Logf("collected %d large objects in %v", objects, time.Since(start))
	names := []string{hostile.User, other.User}
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)", names); n != 0 {
		t.Errorf("roles after Collect = %d, want 0", n)
	}
	if n := t.count("SELECT count(*) FROM pg_largeobject_metadata"); n != 0 {
		t.Errorf("large objects after Collect = %d, want 0", n)
	}
}

// within runs f, which must return nil in the given time.
func (t *target) within(limit time.Duration, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	start := time.Now()
	if err := f(ctx); err != nil {
		t.Errorf("%s = %v after %v, want nil within %v", what, err, time.Since(start), limit)
	}
}

// prepare makes a shape for the arguments, with a backend that knows no shape yet.
func (t *target) prepare(ctx context.Context, args string) error {
	_, _, err := t.newBackend(configNow(nil)).Prepare(ctx, tool(), newGrant(args))
	return err
}

// TestHostileGrant has an agent grant something to another agent's login in a transaction that stays open. PostgreSQL
// cannot drop that login meanwhile. Its end and the mints of others must not wait.
func TestHostileGrant(tt *testing.T) {
	t := ownTarget(tt)
	hostile, victim := t.mint(`{"tables":["orders"]}`), t.mint(`{"tables":["orders"]}`)
	t.mint(`{"tables":["t1"]}`)
	conn := t.login(hostile)
	t.run(conn, "SET idle_in_transaction_session_timeout = 0", "CREATE TEMP TABLE mine (id int)", "BEGIN",
		`GRANT SELECT ON mine TO "`+victim.User+`"`)
	t.within(3*time.Second, "end_logins of a login that another one has locked", func(ctx context.Context) error {
		_, err := t.vault.Exec(ctx, "SELECT pawl.end_logins(ARRAY[$1])", victim.User)
		return err
	})
	if e := t.prove(victim.grant)[0]; e.Outcome != broker.OutcomeDead || !t.refusesLogin(victim) {
		t.Errorf("Prove after end_logins = %v %q, want dead", e.Outcome, e.Answer)
	}
	t.run(conn, "COMMIT")
	t.sever(hostile.grant)
	for _, c := range []credential{hostile, victim} {
		t.exec(`ALTER ROLE "` + c.User + `" VALID UNTIL '2020-01-01'`)
	}
	for range 2 { // the victim's login can be dropped after the other one
		if err := t.backend.Collect(t.Context(), time.Hour); err != nil {
			t.Errorf("Collect = %v, want nil", err)
		}
	}
	names := []string{hostile.User, victim.User}
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)", names); n != 0 {
		t.Errorf("roles after Collect = %d, want 0", n)
	}
}

// TestHostileLocks checks that no lock of an agent delays the making of a shape that does not need the locked table.
func TestHostileLocks(tt *testing.T) {
	t := ownTarget(tt)
	conn := t.login(t.mint(`{"tables":["orders"],"verbs":["select","update"]}`))
	t.run(conn, "SET idle_in_transaction_session_timeout = 0", "SELECT pg_advisory_lock(hashtext('pawl.shapes'))")
	t.within(3*time.Second, "Prepare beside an advisory lock", func(ctx context.Context) error {
		return t.prepare(ctx, `{"tables":["t1"]}`)
	})
	// An agent that may update a table may also lock it.
	t.run(conn, "BEGIN", "LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
	ctx, stop := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	defer func() { stop(); waiting.Wait() }()
	for i := range 3 {
		waiting.Go(func() {
			filter := fmt.Sprintf(`{"tables":["orders"],"filter_column":"customer","filter_value":"%d"}`, i)
			err := t.prepare(ctx, filter)
			var e *broker.Error
			if !errors.As(err, &e) || e.Kind != broker.Unavailable || !strings.Contains(fmt.Sprint(e.Unwrap()), "pawl-gr") {
				t.Errorf("Prepare of a locked table = %v (%v), want unavailable, with the login's name", err, errors.Unwrap(err))
			}
		})
	}
	t.await("SELECT count(*) FROM pg_locks WHERE NOT granted", 3)
	t.within(time.Second, "Prepare beside a locked table", func(ctx context.Context) error {
		return t.prepare(ctx, `{"tables":["t2"],"filter_column":"id","filter_value":"1"}`)
	})
	waiting.Wait()
	t.run(conn, "ROLLBACK")
	t.within(3*time.Second, "Prepare of the table afterwards", func(ctx context.Context) error {
		return t.prepare(ctx, `{"tables":["orders"],"filter_column":"customer","filter_value":"1"}`)
	})
}

// TestWaitsAreBounded checks that each function that a caller may call has a lock_timeout.
func TestWaitsAreBounded(tt *testing.T) {
	t := newTarget(tt)
	const sql = `SELECT count(*), coalesce(string_agg(proname, ' ' ORDER BY proname)
			FILTER (WHERE NOT coalesce(proconfig::text, '') LIKE '%lock_timeout=%'), '')
		FROM pg_proc WHERE pronamespace = 'pawl'::regnamespace AND prosecdef`
	var n int
	var unbounded string
	if err := t.root.QueryRow(t.Context(), sql).Scan(&n, &unbounded); err != nil || n < 10 || unbounded != "" {
		t.Errorf("functions without lock_timeout = %q of %d, %v, want none", unbounded, n, err)
	}
}
