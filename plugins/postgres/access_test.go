package postgres_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestWhoMayCall checks which role may call which function, as PostgreSQL's catalog has it.
func TestWhoMayCall(tt *testing.T) {
	t := newTarget(tt)
	want := map[string]string{
		"version": "pawl_revoker pawl_shaper pawl_vault", "grant_login": "pawl_vault", "end_logins": "pawl_vault",
		"grant_service_login": "pawl_vault", "end_service_login": "pawl_vault", "ensure_shape": "pawl_shaper",
		"sever": "pawl_revoker", "bar": "pawl_revoker", "inspect": "pawl_revoker", "remove": "pawl_revoker",
		"recorded": "pawl_revoker", "prepared": "pawl_revoker", "lend": "pawl_revoker", "give_back": "pawl_revoker",
		"collect": "pawl_revoker", "cut": "pawl_revoker", "position": "pawl_revoker",
		"check_primary": "pawl_revoker", "known": "pawl_revoker", "limits": "pawl_revoker pawl_shaper pawl_vault",
	}
	// The setup's role calls these.
	forDBA := map[string]bool{"sequence_grants": true, "list_shapes": true, "drop_views": true, "adopt_logins": true}
	rows, err := t.root.Query(t.Context(), `SELECT p.proname::text, coalesce(string_agg(r.name, ' ' ORDER BY r.name), ''),
			p.prosecdef, coalesce(p.proconfig::text, '') LIKE '%search_path=pg_catalog, pg_temp%'
		FROM pg_proc p LEFT JOIN unnest(ARRAY['public', 'pawl_vault', 'pawl_shaper', 'pawl_revoker']) r(name)
			ON has_function_privilege(r.name, p.oid, 'EXECUTE')
		WHERE p.pronamespace = 'pawl'::regnamespace GROUP BY p.oid`)
	if err != nil {
		t.Fatal(err)
	}
	var name, callers string
	var definer, pinned bool
	n := 0
	if _, err := pgx.ForEachRow(rows, []any{&name, &callers, &definer, &pinned}, func() error {
		n++
		if callers != want[name] {
			t.Errorf("callers of pawl.%s = %q, want %q", name, callers, want[name])
		}
		if called := want[name] != "" && name != "version" || forDBA[name]; definer != called || definer && !pinned {
			t.Errorf("pawl.%s: security definer = %v, search_path pinned = %v, want both %v", name, definer, pinned, called)
		}
		return nil
	}); err != nil || n < len(want) {
		t.Errorf("functions = %d, %v, want at least %d", n, err, len(want))
	}
	for _, relation := range []string{"shapes", "logins", "roles"} {
		for _, role := range []string{"public", "pawl_vault", "pawl_shaper", "pawl_revoker"} {
			const sql = "SELECT has_table_privilege($1, 'pawl.' || $2, 'SELECT, INSERT, UPDATE, DELETE')::int"
			if n := t.count(sql, role, relation); n != 0 {
				t.Errorf("%s has a privilege on pawl.%s, want none", role, relation)
			}
		}
	}
}

// as returns a pool with one of the broker's own credentials.
func (t *target) as(p postgres.Purpose) *pgxpool.Pool {
	t.Helper()
	user, password, _, err := t.creds.Credential(t.Context(), p)
	if err != nil {
		t.Fatalf("a credential for %s: %v", p, sqlState(err))
	}
	return pool(t.T, t.server.DSNFor(user, password, t.name))
}

// hostileNames returns malformed and foreign names that an attacker might pass in place of a real one.
func hostileNames(real string) []string {
	return []string{
		"", " ", real + " ", " " + real, real + "\n", real + "'", real + `"`, real + "; DROP TABLE orders",
		strings.ToUpper(real), "postgres", "pawl_vault", "pawl_maker", "pawl_revoker", "pg_signal_backend", "public",
		"%", "pawl-%", "pawl-shape-0123456789ab", `x" SUPERUSER --`, `'; DROP TABLE orders; --`,
		"pawl-gr" + strings.Repeat("i", 24) + "-0123456789ab-abcdefgh",
		"_" + real, real + "-x", strings.Repeat("a", 100), "$1", `\`,
	}
}

// TestNameTricks passes hostile names to every function of every caller. The database refuses each and changes nothing.
func TestNameTricks(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	service := t.as(postgres.Revoker)
	var user string
	if err := service.QueryRow(t.Context(), "SELECT current_user").Scan(&user); err != nil {
		t.Fatal(err)
	}
	shape := strings.Split(c.User, "-")[2]
	verifier, err := postgres.Verifier("x")
	if err != nil {
		t.Fatal(err)
	}
	before := t.roles()
	try := func(conn *pgxpool.Pool, sql string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, args...); !strings.HasPrefix(sqlState(err), "22") {
			t.Errorf("%s with %.70q = %v, want class 22", sql, args, sqlState(err))
		}
	}
	soon := time.Now().Add(time.Minute)
	fresh := "pawl-" + string(newGrant(`{}`).ID) + "-" + shape + "-abcdefgh"
	for _, name := range hostileNames(c.User) {
		try(t.vault, "SELECT pawl.grant_login($1, $2, $3)", name, verifier, soon)
		try(t.vault, "SELECT pawl.end_logins(ARRAY[$1])", name)
		try(t.vault, "SELECT pawl.end_logins(ARRAY[$1, $2])", c.User, name)
		try(t.vault, "SELECT pawl.grant_login($1, $2, $3)", fresh, name, soon)
	}
	for _, name := range append(hostileNames(user), c.User, fresh, user+"i") {
		if !strings.HasPrefix(name, "pawl-cert") {
			try(t.vault, "SELECT pawl.grant_service_login($1, $2, $3, 'revoker')", name, verifier, soon)
			try(t.vault, "SELECT pawl.end_service_login($1)", name)
		}
		try(t.vault, "SELECT pawl.grant_service_login('pawl-x-abcdefgh', $2, $3, $1)", name, verifier, soon)
	}
	for _, name := range append(hostileNames(string(c.grant.ID)), user, c.User) {
		for _, f := range []string{"sever", "bar", "remove"} {
			try(service, "SELECT pawl."+f+"(ARRAY[$1])", name)
		}
	}
	for _, f := range []string{"sever", "bar", "remove"} {
		try(service, "SELECT pawl."+f+"(NULL)")
		try(service, "SELECT pawl."+f+"(ARRAY[NULL::text])")
	}
	try(t.vault, "SELECT pawl.end_logins(NULL)")
	for _, end := range []any{nil, time.Now().Add(-time.Second), time.Now().Add(2 * time.Hour), "infinity"} {
		try(t.vault, "SELECT pawl.grant_login($1, $2, $3::text::timestamptz)", fresh, verifier, textOf(end))
	}
	// A shape that does not exist.
	try(t.vault, "SELECT pawl.grant_login($1, $2, $3)", strings.Replace(fresh, shape, "0123456789ab", 1), verifier, soon)
	if after := t.roles(); after != before {
		t.Errorf("roles after the refusals = %s, want %s", after, before)
	}
	if n := t.count("SELECT count(*) FROM orders"); n != 300 {
		t.Errorf("orders = %d, want 300", n)
	}
}

func textOf(end any) any {
	if at, ok := end.(time.Time); ok {
		return at.Format(time.RFC3339)
	}
	return end
}

// roles returns all roles and their attributes in one text.
func (t *target) roles() (all string) {
	t.Helper()
	if err := t.root.QueryRow(t.Context(), `SELECT string_agg(
			format('%s/%s/%s/%s', rolname, rolcanlogin, rolsuper, rolcreaterole), ' ' ORDER BY rolname)
		FROM pg_roles WHERE rolname NOT LIKE 'pawl-cert-%'`).Scan(&all); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestSpecTricks passes specifications to ensure_shape that the broker would never send. The database checks them
// itself.
func TestSpecTricks(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"],"filter_column":"customer","filter_value":"1"}`)
	shaper := t.as(postgres.Shaper)
	view := "pawl_" + strings.Split(c.User, "-")[2]
	spec := func(tables, verbs, more string) string {
		return fmt.Sprintf(`{"connections":4,"database":%q,%s"idle_ms":1000,"statement_ms":1000,"tables":%s,"verbs":%s}`,
			t.name, more, tables, verbs)
	}
	good := spec(`[["public","orders"]]`, `["select"]`, "")
	if _, err := shaper.Exec(t.Context(), "SELECT pawl.ensure_shape($1, $2)", hashOf(good), good); err != nil {
		t.Fatalf("ensure_shape(%s) = %v, want no error", good, err)
	}
	before := t.roles()
	for fault, text := range map[string]string{
		"no grant option": spec(`[["public","salaries"]]`, `["select"]`, ""),
		"verb without":    spec(`[["public","items"]]`, `["delete"]`, ""),
		"catalog":         spec(`[["pg_catalog","pg_authid"]]`, `["select"]`, ""),
		"own records":     spec(`[["pawl","logins"]]`, `["select"]`, ""),
		"another's view":  spec(fmt.Sprintf(`[[%q,"orders"]]`, view), `["select"]`, ""),
		"nothing there":   spec(`[["public","nowhere"]]`, `["select"]`, ""),
		"a sequence":      spec(`[["public","orders_id_seq"]]`, `["select"]`, ""),
		"quotes":          spec(`[["public","orders\" TO PUBLIC --"]]`, `["select"]`, ""),
		"verb text":       spec(`[["public","orders"]]`, `["select ON orders TO PUBLIC --"]`, ""),
		"all":             spec(`[["public","orders"]]`, `["all"]`, ""),
		"no verb":         spec(`[["public","orders"]]`, `[]`, ""),
		"no table":        spec(`[]`, `["select"]`, ""),
		"tables no list":  spec(`{"public":"orders"}`, `["select"]`, ""),
		"pair of three":   spec(`[["public","orders","x"]]`, `["select"]`, ""),
		"null":            spec(`[["public",null]]`, `["select"]`, ""),
		"half a filter":   spec(`[["public","orders"]]`, `["select"]`, `"filter":{"column":"customer"},`),
		"filter column": spec(`[["public","orders"]]`, `["select"]`,
			`"filter":{"column":"customer = 1 OR id","value":"1"},`),
		"filter value": spec(`[["public","orders"]]`, `["select"]`,
			`"filter":{"column":"customer","value":"1 OR true"},`),
		"network by pattern": spec(`[["public","orders"]]`, `["select"]`, `"network":"a%",`),
		"network is a role":  spec(`[["public","orders"]]`, `["select"]`, `"network":"a\" SUPERUSER --",`),
		"network is null":    spec(`[["public","orders"]]`, `["select"]`, `"network":null,`),
		"network is open":    spec(`[["public","orders"]]`, `["select"]`, `"network":"nowhere",`),
		"unknown member":     spec(`[["public","orders"]]`, `["select"]`, `"superuser":true,`),
		"another database":   strings.Replace(good, t.name, "postgres", 1),
		"too many sessions":  strings.Replace(good, `"connections":4`, `"connections":1000`, 1),
		"no limit":           strings.Replace(good, `"connections":4,`, ``, 1),
		"not JSON":           "x", "empty": "", "null alone": "null", "a list": "[]",
		"too long": strings.Repeat(" ", 70000) + good,
	} {
		if _, err := shaper.Exec(t.Context(), "SELECT pawl.ensure_shape($1, $2)", hashOf(text), text); err == nil {
			t.Errorf("%s: ensure_shape(%.200s) = nil, want an error", fault, text)
		}
	}
	// The name of another specification.
	for _, shape := range []any{strings.Split(c.User, "-")[2], "", nil, "%", hashOf(good) + "0"} {
		if _, err := shaper.Exec(t.Context(), "SELECT pawl.ensure_shape($1, $2)", shape, good); sqlState(err) != "22023" {
			t.Errorf("ensure_shape(%v, another specification) = %v, want 22023", shape, sqlState(err))
		}
	}
	if after := t.roles(); after != before {
		t.Errorf("roles after the refusals = %s, want %s", after, before)
	}
	if n := t.count("SELECT count(*) FROM pawl.shapes"); n != 2 {
		t.Errorf("shapes = %d, want 2", n)
	}
}

func hashOf(spec string) string {
	sum := sha256.Sum256([]byte(spec))
	return hex.EncodeToString(sum[:])[:12]
}

// TestServiceLogins checks that the broker's own logins have the rights of their purpose and no others.
func TestServiceLogins(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	for purpose, more := range map[postgres.Purpose][]string{
		postgres.Shaper:  {"SELECT pawl.sever(ARRAY['" + string(c.grant.ID) + "'])", "SELECT * FROM pawl.inspect(NULL)"},
		postgres.Revoker: {"SELECT pawl.ensure_shape('a', 'b')", "SELECT pawl.end_logins(ARRAY['" + c.User + "'])"},
	} {
		conn := t.as(purpose)
		for _, sql := range append(more, "SELECT * FROM orders", "SELECT pawl.grant_login('a', 'b', now())",
			"SELECT pawl.end_service_login('a')", "SELECT pawl.disable(ARRAY['postgres'])", "CREATE ROLE x",
			"SET ROLE pawl_maker", `SET ROLE "`+c.User+`"`, `ALTER ROLE "`+c.User+`" NOLOGIN`, "SELECT * FROM pawl.logins",
			"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pawl_vault'",
			"CREATE TABLE x (id int)") {
			if _, err := conn.Exec(t.Context(), sql); sqlState(err) != "42501" {
				t.Errorf("%s: %s = %v, want 42501", purpose, sql, sqlState(err))
			}
		}
	}
	for _, sql := range []string{
		"SELECT pawl.sever(NULL)", "SELECT pawl.ensure_shape('a', 'b')", "CREATE ROLE x", "SELECT * FROM orders",
		`DROP ROLE "` + c.User + `"`,
	} {
		if _, err := t.vault.Exec(t.Context(), sql); sqlState(err) != "42501" {
			t.Errorf("pawl_vault: %s = %v, want 42501", sql, sqlState(err))
		}
	}
}

// TestShadowing checks that a function that runs as pawl_maker never resolves a name to an object of its caller.
func TestShadowing(tt *testing.T) {
	t := newTarget(tt)
	conn, err := t.vault.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	c := t.mint(`{"tables":["orders"]}`)
	if _, err := conn.Exec(t.Context(), `CREATE TEMP TABLE pg_roles AS
			SELECT 10::oid AS oid, 'pawl_vault'::name AS rolname, true AS rolcanlogin;
		CREATE FUNCTION pg_temp.substr(text, int, int) RETURNS text LANGUAGE sql AS $$ SELECT 'shadow' $$;
		SET search_path = pg_temp, pg_catalog`); err != nil {
		t.Fatal(err)
	}
	var dropped int
	err = conn.QueryRow(t.Context(), "SELECT pawl.end_logins(ARRAY[$1])", c.User).Scan(&dropped)
	if err != nil || dropped != 1 {
		t.Errorf("end_logins with shadowed names = %d, %v, want 1", dropped, err)
	}
	if _, err := conn.Exec(t.Context(), "DISCARD ALL"); err != nil {
		t.Error(err)
	}
}

// TestSetupAgain checks that Setup may be repeated and keeps the existing logins. It must not touch a newer version or
// a schema of another owner.
func TestSetupAgain(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"]}`)
	t.setup()
	if err := t.backend.Check(t.Context()); err != nil {
		t.Errorf("Check() = %v, want nil", err)
	}
	if _, err := t.login(c).Exec(t.Context(), "SELECT * FROM orders"); err != nil {
		t.Errorf("SELECT with a credential from before Setup = %v, want nil", err)
	}
	conn, err := t.root.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	for _, g := range []postgres.Grantable{
		{Table: "orders; DROP TABLE items", Verbs: []string{"select"}}, {Table: "orders", Verbs: []string{"all"}},
		{Table: "pawl.logins", Verbs: []string{"select"}}, {Table: "orders"},
	} {
		cfg := postgres.SetupConfig{Tables: []postgres.Grantable{g}}
		if err := postgres.Setup(t.Context(), conn.Conn(), cfg); err == nil {
			t.Errorf("Setup(%v) = nil, want an error", g)
		}
	}
	t.exec("CREATE OR REPLACE FUNCTION pawl.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1000'")
	if err := postgres.Setup(t.Context(), conn.Conn(), postgres.SetupConfig{}); err == nil {
		t.Error("Setup over a newer version = nil, want an error")
	}
	if err := t.backend.Check(t.Context()); err == nil {
		t.Error("Check() of a newer version = nil, want an error")
	}
	t.exec("DROP SCHEMA pawl CASCADE; CREATE SCHEMA pawl")
	if err := postgres.Setup(t.Context(), conn.Conn(), postgres.SetupConfig{}); err == nil {
		t.Error("Setup over a schema pawl of another owner = nil, want an error")
	}
}

// TestLargeObjectsStay checks that Setup does not take large objects from a database that has some, nor from an
// application that got them back.
func TestLargeObjectsStay(tt *testing.T) {
	t := newTarget(tt)
	const allowed = "SELECT has_function_privilege('public', 'lo_create(oid)', 'EXECUTE')::int"
	if n := t.count(allowed); n != 0 {
		t.Error("PUBLIC may make large objects after the first Setup, want not")
	}
	t.exec("GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC")
	t.setup()
	if n := t.count(allowed); n != 1 {
		t.Error("PUBLIC may not make large objects after another Setup, want the DBA's GRANT to stay")
	}
	t.exec("DROP SCHEMA pawl CASCADE; SELECT lo_create(0)")
	t.setup()
	if n := t.count(allowed); n != 1 {
		t.Error("PUBLIC may not make large objects after Setup of a database that has one, want that it may")
	}
}

// TestNoPasswordInLog searches the log of a server that logs every statement.
func TestNoPasswordInLog(tt *testing.T) {
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{
		NoSync: true, Settings: map[string]string{"log_statement": "all"},
	}))
	c := t.mint(`{"tables":["orders"]}`)
	t.login(c)
	secret := strings.Split(strings.Split(c.URL, "@")[0], ":")[2]
	log := t.server.Log()
	if !strings.Contains(log, c.User) {
		t.Fatal("the log does not contain the mint, so this test checks nothing")
	}
	if strings.Contains(log, secret) || strings.Contains(log, vaultPassword) {
		t.Error("the server's log contains a password")
	}
}
