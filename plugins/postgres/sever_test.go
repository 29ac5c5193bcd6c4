package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

func configNow(now func() time.Time) postgres.Config {
	return postgres.Config{Now: now, CollectEvery: -1}
}

// cursor opens a session with an open cursor, of which it reads the first row.
func (t *target) cursor(c credential) *pgx.Conn {
	t.Helper()
	conn := t.login(c)
	for _, sql := range []string{
		"BEGIN", "DECLARE c CURSOR FOR SELECT o.id FROM orders o, generate_series(1, 1000)", "FETCH c",
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s = %v, want nil", sql, err)
		}
	}
	return conn
}

// sessionEnded reports whether the server has closed the session.
func (t *target) sessionEnded(conn *pgx.Conn) bool {
	_, err := conn.Exec(t.Context(), "FETCH c")
	return err != nil && conn.IsClosed()
}

// each runs f for 0 to n-1, at most limit at once.
func each(n, limit int, f func(i int)) {
	var g errgroup.Group
	g.SetLimit(limit)
	for i := range n {
		g.Go(func() error { f(i); return nil })
	}
	_ = g.Wait() // nil: f reports its failures to the test
}

// TestSeverMany severs 1,000 logins with an open cursor each. It logs the time.
func TestSeverMany(tt *testing.T) {
	n := 1000
	if testing.Short() {
		n = 100
	}
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true, MaxConnections: n + 50}))
	creds, grants, conns := make([]credential, n), make([]broker.Grant, n), make([]*pgx.Conn, n)
	t.mint(`{"tables":["orders"]}`) // makes the shape
	each(n, 8, func(i int) {
		creds[i] = t.mint(`{"tables":["orders"]}`)
		grants[i] = creds[i].grant
		conns[i] = t.cursor(creds[i])
	})
	start := time.Now()
	t.sever(grants...)
	t.Logf("severed %d logins with a session each in %v", n, time.Since(start))
	start = time.Now()
	for i, e := range t.prove(grants...) {
		if e.Outcome != broker.OutcomeDead {
			t.Errorf("Prove(%s) = %v %q, want dead", grants[i].ID, e.Outcome, e.Answer)
		}
	}
	t.Logf("proved %d dead in %v", n, time.Since(start))
	each(n, 8, func(i int) {
		if !t.sessionEnded(conns[i]) {
			t.Errorf("the session of %s is open after Sever", creds[i].User)
		}
		if !t.refusesLogin(creds[i]) {
			t.Errorf("%s logs in after Sever", creds[i].User)
		}
	})
}

// TestSeverRefusesFirst checks that pawl.sever commits the removal of LOGIN and rights before it terminates the first
// session. The server takes a second to end a thousand sessions. Meanwhile none may log in again or run a statement.
func TestSeverRefusesFirst(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	conn := t.login(c)
	revoker := t.as("revoker")
	for i, want := range [][2]int{{1, 0}, {0, 1}} {
		var severed, sessions int
		const sql = "SELECT severed, sessions FROM pawl.sever(ARRAY[$1])"
		if err := revoker.QueryRow(t.Context(), sql, string(c.grant.ID)).Scan(&severed, &sessions); err != nil {
			t.Fatalf("sever = %v, want nil", err)
		}
		if got := [2]int{severed, sessions}; got != want {
			t.Errorf("call %d of sever: severed, sessions = %v, want %v", i+1, got, want)
		}
		if !t.refusesLogin(c) {
			t.Errorf("%s logs in after call %d of sever", c.User, i+1)
		}
		var pg *pgconn.PgError
		_, err := conn.Exec(t.Context(), "SELECT FROM orders")
		if i == 0 && (!errors.As(err, &pg) || pg.Code != "42501") {
			t.Errorf("SELECT in an open session after sever = %v, want 42501", err)
		}
	}
	if !t.sessionEnded(conn) {
		t.Error("the session is open after sever")
	}
}

// TestSeverReadsEachOnce counts the rows that severing reads when the statistics do not know the logins, as after mints
// since the last ANALYZE. Three times as many logins may cost three times as many rows, not nine times.
func TestSeverReadsEachOnce(tt *testing.T) {
	t := newTarget(tt)
	shape := t.mint(`{"tables":["orders"]}`).User[len("pawl-gr000000000000000000000000-"):][:12]
	const few, many = 100, 300
	before, after := t.severReads(shape, few), t.severReads(shape, many)
	if before < few || after > before*(many/few)*4/3 {
		t.Errorf("rows read: %d for %d logins and %d for %d, want about %d for each",
			before, few, after, many, before/few)
	}
}

// severReads returns how many rows of roles, memberships and logins it takes to sever n logins. It rolls all of it
// back.
func (t *target) severReads(shape string, n int) (rows int) {
	t.Helper()
	tx, err := t.root.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background()) //nolint:errcheck // the test keeps none of the changes
	verifier, err := postgres.Verifier("x")
	if err != nil {
		t.Fatal(err)
	}
	var batch pgx.Batch
	batch.Queue(`SELECT pawl.grant_login(format('pawl-gr%s-%s-abcdEFGH', lpad(i::text, 24, '0'), $1::text),
			$2, now() + interval '1 minute')
		FROM generate_series(1, $3::int) i`, shape, verifier, n)
	batch.Queue("SET LOCAL allow_system_table_mods = on")
	batch.Queue(`UPDATE pg_class SET reltuples = 1, relpages = 1000
		WHERE oid IN ('pg_authid'::regclass, 'pg_auth_members'::regclass, 'pawl.logins'::regclass)`)
	if err := tx.SendBatch(t.Context(), &batch).Close(); err != nil {
		t.Fatal(err)
	}
	read := func() (n int) {
		t.Helper()
		if err := tx.QueryRow(t.Context(), `SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::int
			FROM pg_stat_xact_all_tables
			WHERE relid IN ('pg_authid'::regclass, 'pg_auth_members'::regclass, 'pawl.logins'::regclass)`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := read()
	for _, want := range []int{n, 0} {
		var severed int
		err := tx.QueryRow(t.Context(), `SELECT severed FROM pawl.sever((SELECT array_agg(grant_id) FROM pawl.roles
			WHERE name LIKE '%abcdEFGH' AND grant_id LIKE 'gr00000%'))`).Scan(&severed)
		if err != nil || severed != want {
			t.Fatalf("sever of %d logins = %d, %v, want %d", n, severed, err, want)
		}
	}
	return read() - before
}

// TestSeverHard severs a login with 100 sessions and with objects and locks that prevent DROP ROLE. Then Vault ends it.
func TestSeverHard(tt *testing.T) {
	t := newTarget(tt)
	t.exec("GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC") // as in a database that has large objects
	c := t.mint(`{"tables":["orders"]}`)
	conns := make([]*pgx.Conn, 100)
	each(len(conns), 4, func(i int) { conns[i] = t.cursor(c) })
	if _, err := conns[0].Exec(t.Context(), `CREATE TEMP TABLE mine AS SELECT * FROM orders;
		SELECT lo_create(0); COMMIT; BEGIN; LOCK mine`); err != nil {
		t.Fatal(err)
	}
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive || e.Answer != "100 sessions are open" {
		t.Errorf("Prove(%s) = %v %q, want alive with 100 sessions", c.grant.ID, e.Outcome, e.Answer)
	}
	t.sever(c.grant)
	for i, conn := range conns {
		if !t.sessionEnded(conn) {
			t.Errorf("session %d is open after Sever", i)
		}
	}
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
		t.Errorf("Prove(%s) = %v %q, want dead", c.grant.ID, e.Outcome, e.Answer)
	}
	for range 2 { // Vault retries a revocation with an unknown outcome
		if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User); err != nil {
			t.Errorf("end_logins(%s) = %v, want nil", c.User, err)
		}
	}
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = $1", c.User); n != 0 {
		t.Errorf("roles named %s = %d, want 0", c.User, n)
	}
}

// TestEndLogins runs Vault's revocation alone. Sessions end with the login. A role that owns objects in another
// database remains, but cannot log in.
func TestEndLogins(tt *testing.T) {
	t := newTarget(tt)
	c, stuck := t.mint(`{"tables":["orders"]}`), t.mint(`{"tables":["orders"]}`)
	conn := t.cursor(c)
	elsewhere, err := pgx.Connect(t.Context(), strings.Replace(stuck.URL, t.name, "postgres", 1))
	if err != nil {
		t.Fatalf("connecting to another database: %v", sqlState(err))
	}
	if _, err := elsewhere.Exec(t.Context(), "SELECT lo_create(0)"); err != nil {
		t.Fatal(err)
	}
	_ = elsewhere.Close(t.Context())
	if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins($1)", []string{c.User, stuck.User}); err != nil {
		t.Fatalf("end_logins = %v, want nil", err)
	}
	if !t.sessionEnded(conn) {
		t.Errorf("the session is open after end_logins")
	}
	for _, c := range []credential{c, stuck} {
		if e := t.prove(c.grant)[0]; !t.refusesLogin(c) || e.Outcome != broker.OutcomeDead {
			t.Errorf("Prove(%s) after end_logins = %v %q, want dead", c.grant.ID, e.Outcome, e.Answer)
		}
	}
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)", []string{c.User, stuck.User}); n != 1 {
		t.Errorf("roles left = %d, want the one that owns something in another database", n)
	}
}

// TestSeverWhileLoggingIn severs while agents log in as fast as they can.
func TestSeverWhileLoggingIn(tt *testing.T) {
	t := newTarget(tt)
	for range 5 {
		c := t.mint(`{"tables":["orders"]}`)
		ctx, stop := context.WithCancel(t.Context())
		var in sync.WaitGroup
		var logins atomic.Int64
		started := make(chan struct{}, 4)
		held := make(chan *pgx.Conn, 1000)
		for range 4 {
			in.Go(func() {
				for first := true; ctx.Err() == nil && len(held) < 90; first = false {
					if conn, err := pgx.Connect(ctx, c.URL); err == nil {
						logins.Add(1)
						held <- conn
					}
					if first {
						started <- struct{}{}
					}
				}
			})
		}
		for range 4 {
			<-started
		}
		t.sever(c.grant)
		e := t.prove(c.grant)[0]
		stop()
		in.Wait()
		close(held)
		if e.Outcome != broker.OutcomeDead {
			t.Errorf("Prove after Sever beside %d logins = %v %q, want dead", logins.Load(), e.Outcome, e.Answer)
		}
		for conn := range held {
			if _, err := conn.Exec(t.Context(), "SELECT 1"); err == nil {
				t.Error("a session is open after Sever")
			}
			_ = conn.Close(t.Context())
		}
		if n := t.count("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", c.User); n != 0 {
			t.Errorf("sessions of %s = %d, want 0", c.User, n)
		}
	}
}

// TestSeverBesideEnding runs Sever and Vault's revocation of the same logins concurrently.
func TestSeverBesideEnding(tt *testing.T) {
	t := newTarget(tt)
	var grants []broker.Grant
	var names []string
	for range 100 {
		c := t.mint(`{"tables":["orders"]}`)
		grants, names = append(grants, c.grant), append(names, c.User)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { t.sever(grants...) })
	}
	each(len(names), 4, func(i int) {
		if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", names[i]); err != nil {
			t.Errorf("end_logins beside Sever = %v, want nil", err)
		}
	})
	wg.Wait()
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)", names); n != 0 {
		t.Errorf("roles left = %d, want 0", n)
	}
}

// TestBarred checks that a mint after Sever makes no login, and that a grant gets at most one credential.
func TestBarred(tt *testing.T) {
	t := newTarget(tt)
	g := newGrant(`{"tables":["orders"]}`)
	t.sever(g, g)
	if _, err := t.tryMint(g); sqlState(err) != "23505" {
		t.Errorf("minting after Sever = %v, want 23505", sqlState(err))
	}
	c := t.mint(`{"tables":["orders"]}`)
	if _, err := t.tryMint(c.grant); sqlState(err) != "23505" {
		t.Errorf("a second mint for one grant = %v, want 23505", sqlState(err))
	}
	if e := t.prove(g, c.grant); e[0].Outcome != broker.OutcomeDead || e[1].Outcome != broker.OutcomeAlive {
		t.Errorf("Prove = %v, %v, want dead, alive", e[0].Outcome, e[1].Outcome)
	}
}

// TestBarWaits checks that Sever waits for a mint in flight and severs the login that it makes.
func TestBarWaits(tt *testing.T) {
	t := newTarget(tt)
	g := newGrant(`{"tables":["orders"]}`)
	m, display, err := t.backend.Prepare(t.Context(), tool(), g)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := postgres.Verifier("some password")
	if err != nil {
		t.Fatal(err)
	}
	tx, err := t.vault.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT pawl.grant_login($1, $2, $3)",
		"pawl-"+display+"-"+random8(), verifier, time.Now().Add(m.TTL)); err != nil {
		t.Fatal(err)
	}
	severed := make(chan error, 1)
	go func() { severed <- t.backend.Sever(t.Context(), []broker.Grant{g}) }()
	t.await("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pawl.bar%' AND wait_event_type = 'Lock'", 1)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-severed; err != nil {
		t.Errorf("Sever beside a mint = %v, want nil", err)
	}
	if e := t.prove(g)[0]; e.Outcome != broker.OutcomeDead || e.Answer == "no role, no session" {
		t.Errorf("Prove after Sever beside a mint = %v %q, want dead, with a role", e.Outcome, e.Answer)
	}
}

// await polls until the query returns at least n.
func (t *target) await(sql string, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for t.count(sql) < n {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s = less than %d after 10 s", sql, n)
		}
	}
}

// TestGhost checks that the backend finds and terminates a session of a dropped role: dropping a role does not prove
// that its credential is dead.
func TestGhost(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	conn := t.cursor(c)
	t.exec(`DROP ROLE "` + c.User + `"`)
	if t.sessionEnded(conn) {
		t.Fatal("PostgreSQL ended the session of a dropped role, so this test checks nothing")
	}
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive {
		t.Errorf("Prove(a session without a role) = %v %q, want alive", e.Outcome, e.Answer)
	}
	if found := t.find(); !found[c.grant.ID] {
		t.Errorf("Find() = %v, want the grant of the session without a role", found)
	}
	t.sever(c.grant)
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead || !t.sessionEnded(conn) {
		t.Errorf("Prove(a session without a role) after Sever = %v %q, want dead", e.Outcome, e.Answer)
	}
}

// TestGhostAppears severs a session of a dropped role that was still starting up when pawl.inspect ran. The test
// replaces inspect with a function that returns no row.
func TestGhostAppears(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	conn := t.cursor(c)
	t.exec(`DROP ROLE "` + c.User + `"`)
	t.exec(`CREATE OR REPLACE FUNCTION pawl.inspect(grants text[]) RETURNS TABLE (
		grant_id text, name text, role oid, can_login boolean, in_group boolean, valid_until timestamptz, sessions int)
		LANGUAGE sql AS 'SELECT NULL::text, NULL::text, NULL::oid, NULL::boolean, NULL::boolean,
			NULL::timestamptz, 0 WHERE false'`)
	var sessions int
	err := t.root.QueryRow(t.Context(), "SELECT sessions FROM pawl.sever(ARRAY[$1])", string(c.grant.ID)).Scan(&sessions)
	if err != nil || sessions != 1 {
		t.Errorf("sever = %d sessions, %v, want the one that inspect missed", sessions, err)
	}
	if !t.sessionEnded(conn) {
		t.Error("the session is open after sever")
	}
}

func (t *target) find() map[broker.GrantID]bool {
	t.Helper()
	ids, err := t.backend.Find(t.Context())
	if err != nil {
		t.Fatalf("Find() = %v, want nil", err)
	}
	found := map[broker.GrantID]bool{}
	for _, id := range ids {
		found[id] = true
	}
	return found
}

// TestFind checks that Find lists the live logins of this database and no others.
func TestFind(tt *testing.T) {
	t := newTarget(tt)
	a, b := t.mint(`{"tables":["orders"]}`), t.mint(`{"tables":["items"],"verbs":["select"]}`)
	other := newTarget(tt)
	foreign := other.mint(`{"tables":["orders"]}`)
	t.sever(b.grant)
	found := t.find()
	if len(found) != 1 || !found[a.grant.ID] || found[foreign.grant.ID] {
		t.Errorf("Find() = %v, want only %v", found, a.grant.ID)
	}
	if err := t.backend.Remove(t.Context(), []broker.GrantID{a.grant.ID, b.grant.ID}); err != nil {
		t.Errorf("Remove = %v, want nil", err)
	}
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)", []string{a.User, b.User}); n != 0 {
		t.Errorf("roles after Remove = %d, want 0", n)
	}
}

// TestMintMany makes 1,200 logins on 5 tables each, over 8 connections. None may fail.
func TestMintMany(tt *testing.T) {
	t := newTarget(tt)
	start := time.Now()
	each(1200, 8, func(i int) {
		args := `{"tables":["t1","t2","t3","t4","t5"],"verbs":["select"]}`
		if i%2 == 1 {
			args = `{"tables":["t1","t2","t3","t4","t5"]}`
		}
		if _, err := t.tryMint(newGrant(args)); err != nil {
			t.Errorf("mint %d: %v", i, err)
		}
	})
	t.Logf("1200 mints in %v", time.Since(start))
	if n := t.count("SELECT count(*) FROM pawl.shapes"); n != 2 {
		t.Errorf("shapes = %d, want 2", n)
	}
}

// TestShapesAtOnce makes many shapes over the same tables concurrently, each by several callers. There are no retries
// of the backend, so the lock in the database must prevent every conflict.
func TestShapesAtOnce(tt *testing.T) {
	t := newTarget(tt)
	shaper := t.as(postgres.Shaper)
	each(160, 8, func(i int) {
		spec := fmt.Sprintf(`{"connections":%d,"database":%q,"idle_ms":1000,"statement_ms":1000,`+
			`"tables":[["public","t1"],["public","t2"],["public","orders"]],"verbs":["select"]}`, i%40+1, t.name)
		if _, err := shaper.Exec(t.Context(), "SELECT pawl.ensure_shape($1, $2)", hashOf(spec), spec); err != nil {
			t.Errorf("ensure_shape %d: %v", i, err)
		}
	})
	if n := t.count("SELECT count(*) FROM pawl.shapes"); n != 40 {
		t.Errorf("shapes = %d, want 40", n)
	}
}

// TestSeverWithVaultDown checks that severing works with the present credential while Vault is down. The backend
// fetches the next credential after half of its life, and replaces one that the database refuses.
func TestSeverWithVaultDown(tt *testing.T) {
	t := newTarget(tt)
	var clock atomic.Int64
	clock.Store(time.Now().UnixNano())
	t.backend = t.newBackend(configNow(func() time.Time { return time.Unix(0, clock.Load()) }))
	if err := t.backend.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.creds.set(func(s *serviceLogins) { s.hangs = true })
	clock.Add(int64(40 * time.Minute))
	c := newGrant(`{"tables":["orders"]}`)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := t.backend.Sever(ctx, []broker.Grant{c}); err != nil {
		t.Errorf("Sever past half the credential's life with Vault hanging = %v, want nil", err)
	}
	t.creds.set(func(s *serviceLogins) { s.hangs, s.down = false, true })
	t.sever(c)
	clock.Add(int64(30 * time.Minute))
	if err := t.backend.Sever(t.Context(), []broker.Grant{c}); err == nil {
		t.Error("Sever with an expired credential = nil, want an error")
	}
	t.creds.set(func(s *serviceLogins) { s.down, s.ttl = false, 3*time.Hour })
	t.sever(c)
	// Vault ends all leases: the broker's sessions and logins are gone. The next call must fetch a new credential.
	for _, name := range t.creds.names() {
		if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_service_login($1)", name); err != nil {
			t.Fatal(err)
		}
	}
	t.sever(c)
}

func (s *serviceLogins) set(f func(*serviceLogins)) { s.mu.Lock(); defer s.mu.Unlock(); f(s) }

func (s *serviceLogins) names() []string { s.mu.Lock(); defer s.mu.Unlock(); return s.made }

// TestCollect checks that collect removes expired logins and unused shapes, and nothing else.
func TestCollect(tt *testing.T) {
	t := newTarget(tt)
	old := t.mint(`{"tables":["orders"],"filter_column":"customer","filter_value":"1"}`)
	used := t.mint(`{"tables":["t1"]}`)
	t.exec("UPDATE pawl.shapes SET last_used = now() - interval '2 hours'")
	t.exec(`ALTER ROLE "` + old.User + `" VALID UNTIL '2020-01-01'`)
	if e := t.prove(old.grant)[0]; e.Outcome != broker.OutcomeUnknown {
		t.Errorf("Prove(an expired login) = %v %q, want unknown", e.Outcome, e.Answer)
	}
	if err := t.backend.Collect(t.Context(), time.Minute); err == nil {
		t.Error("Collect(1 minute) = nil, want an error")
	}
	if err := t.backend.Collect(t.Context(), time.Hour); err != nil {
		t.Fatalf("Collect(1 hour) = %v, want nil", err)
	}
	if n := t.count("SELECT count(*) FROM pawl.shapes"); n != 1 {
		t.Errorf("shapes left = %d, want the one in use", n)
	}
	if n := t.count("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'pawl\\_%'"); n != 0 {
		t.Errorf("schemas of shapes left = %d, want 0", n)
	}
	if e := t.prove(old.grant, used.grant); e[0].Answer != "no role, no session" || e[1].Outcome != broker.OutcomeAlive {
		t.Errorf("Prove = %q, %v, want no role, alive", e[0].Answer, e[1].Outcome)
	}
	t.backend = t.newBackend(configNow(nil))
	t.mint(`{"tables":["orders"],"filter_column":"customer","filter_value":"1"}`)
}

// TestCollectLeftover checks that collect drops a login that ended but could not be dropped, long before its expiry.
func TestCollectLeftover(tt *testing.T) {
	t := newTarget(tt)
	ended := t.mint(`{"tables":["orders"]}`)
	pooled, err := t.root.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer pooled.Release()
	holder := pooled.Conn()
	t.run(holder, "BEGIN", `COMMENT ON ROLE "`+ended.User+`" IS 'held'`)
	if _, err := t.vault.Exec(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", ended.User); err != nil {
		t.Fatalf("end_logins = %v", sqlState(err))
	}
	t.run(holder, "COMMIT")
	if !t.refusesLogin(ended) || t.count("SELECT count(*) FROM pg_roles WHERE rolname = '"+ended.User+"'") != 1 {
		t.Fatalf("%s logs in, or is gone: the holder did not hold it", ended.User)
	}
	alive := t.mint(`{"tables":["orders"]}`)
	if err := t.backend.Collect(t.Context(), time.Hour); err != nil {
		t.Fatalf("Collect = %v, want nil", err)
	}
	if e := t.prove(ended.grant, alive.grant); e[0].Answer != "no role, no session" || e[1].Outcome != broker.OutcomeAlive {
		t.Errorf("Prove = %q, %v, want no role, alive", e[0].Answer, e[1].Outcome)
	}
}

// TestRightsEndWithTheSession checks what PostgreSQL still runs in a session after its login lost LOGIN and its rights.
// Prove must call the grant alive until Sever has ended the session.
func TestRightsEndWithTheSession(tt *testing.T) {
	t := newTarget(tt)
	revoker := t.as("revoker")
	for name, mode := range map[string]struct {
		open func(group string) []string
		read string
	}{
		"prepared statement in an open transaction": {func(string) []string {
			return []string{"BEGIN", "PREPARE p AS SELECT count(*) FROM orders", "EXECUTE p"}
		}, "EXECUTE p"},
		"cursor": {func(string) []string {
			return []string{"BEGIN", "DECLARE c CURSOR FOR SELECT o.id FROM orders o, generate_series(1, 1000)"}
		}, "FETCH c"},
		"role of the group": {func(group string) []string {
			return []string{`SET ROLE "` + group + `"`}
		}, "SELECT count(*) FROM orders"},
	} {
		c := t.mint(`{"tables":["orders"]}`)
		conn := t.login(c)
		t.run(conn, mode.open("pawl-shape-"+strings.Split(c.User, "-")[2])...)
		if _, err := revoker.Exec(t.Context(), "SELECT pawl.sever(ARRAY[$1])", string(c.grant.ID)); err != nil {
			t.Fatalf("sever = %v", sqlState(err))
		}
		if !t.refusesLogin(c) {
			t.Errorf("%s: %s logs in after sever", name, c.User)
		}
		if _, err := conn.Exec(t.Context(), mode.read); err != nil {
			t.Errorf("%s: reading without rights = %v: PostgreSQL ends them sooner than pawl.disable says", name, sqlState(err))
		}
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeAlive {
			t.Errorf("%s: Prove = %v %q, want alive", name, e.Outcome, e.Answer)
		}
		t.sever(c.grant)
		if _, err := conn.Exec(t.Context(), mode.read); err == nil {
			t.Errorf("%s: reading after Sever = nil, want an error", name)
		}
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
			t.Errorf("%s: Prove after Sever = %v %q, want dead", name, e.Outcome, e.Answer)
		}
	}
}

// TestLastRead severs logins while each of their sessions reads on with a prepared statement. No session may read after
// Sever has returned. It logs when the last reads were.
func TestLastRead(tt *testing.T) {
	t := newTarget(tt)
	const n = 100
	grants, conns, last := make([]broker.Grant, n), make([]*pgx.Conn, n), make([]time.Time, n)
	var reading sync.WaitGroup
	started := make(chan error, n)
	t.mint(`{"tables":["orders"]}`) // makes the shape
	for i := range n {
		c := t.mint(`{"tables":["orders"]}`)
		grants[i] = c.grant
		conns[i] = t.login(c)
		t.run(conns[i], "BEGIN", "PREPARE p AS SELECT clock_timestamp() FROM orders LIMIT 1")
		reading.Go(func() { // at once: the server ends a session that is idle
			for first := true; ; first = false {
				var read time.Time
				err := conns[i].QueryRow(t.Context(), "EXECUTE p").Scan(&read)
				if first {
					started <- err
				}
				if err != nil {
					return
				}
				last[i] = read
			}
		})
	}
	for range n {
		if err := <-started; err != nil {
			t.Fatalf("the first read = %v, want nil", sqlState(err))
		}
	}
	clock := func() (now time.Time) { // the server's, as in the reads
		if err := t.root.QueryRow(t.Context(), "SELECT clock_timestamp()").Scan(&now); err != nil {
			t.Fatal(err)
		}
		return now
	}
	start := clock()
	t.sever(grants...)
	returned := clock()
	reading.Wait()
	slices.SortFunc(last, time.Time.Compare)
	t.Logf("Sever in %v; the last reads after %v (half of the sessions) and %v (all)",
		returned.Sub(start), last[n/2].Sub(start), last[n-1].Sub(start))
	if late := last[n-1].Sub(returned); late > 0 {
		t.Errorf("a session read %v after Sever had returned", late)
	}
}
