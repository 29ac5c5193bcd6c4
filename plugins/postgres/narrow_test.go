package postgres_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// TestNarrow makes out-of-scope calls with the raw secret. PostgreSQL itself must refuse each.
func TestNarrow(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders","items"],"verbs":["select"]}`)
	other := t.mint(`{"tables":["t1"],"verbs":["select","insert"]}`)
	group := "pawl-shape-" + strings.Split(other.User, "-")[2]
	conn := t.login(c)
	ctx := t.Context()
	for _, sql := range []string{"SELECT * FROM orders", "SELECT * FROM " + c.Names["public.items"]} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Errorf("%s = %v, want nil", sql, err)
		}
	}
	const denied = "42501"
	for _, row := range []struct{ name, sql, want string }{
		{"another table", "SELECT * FROM t1", denied},
		{"a table not for agents", "SELECT * FROM salaries", denied},
		{"another schema", "SELECT * FROM closed.t", denied},
		{"insert", "INSERT INTO orders (customer) VALUES (1)", denied},
		{"update", "UPDATE orders SET customer = 1", denied},
		{"delete", "DELETE FROM orders", denied},
		{"truncate", "TRUNCATE orders", denied},
		{"lock", "DO $$BEGIN LOCK orders IN ACCESS EXCLUSIVE MODE; END$$", denied},
		{"alter", "ALTER TABLE orders ADD x int", denied},
		{"drop", "DROP TABLE orders", denied},
		{"create table", "CREATE TABLE public.mine (id int)", denied},
		{"create function", "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'", denied},
		{"create schema", "CREATE SCHEMA mine", denied},
		{"create role", "CREATE ROLE mine", denied},
		{"create database", "CREATE DATABASE mine", denied},
		{"create extension", "CREATE EXTENSION dblink", denied},
		{"policy", "CREATE POLICY p ON orders", denied},
		{"trigger", "CREATE TRIGGER x BEFORE INSERT ON orders EXECUTE FUNCTION suppress_redundant_updates_trigger()",
			denied},
		{"replication slot", "SELECT pg_create_physical_replication_slot('mine')", denied},
		{"logical slot", "SELECT pg_create_logical_replication_slot('mine', 'pgoutput')", denied},
		{"subscription", "CREATE SUBSCRIPTION mine CONNECTION '' PUBLICATION p WITH (connect = false)", denied},
		{"superuser", "SET ROLE postgres", denied},
		{"maker", "SET ROLE pawl_maker", denied},
		{"vault", "SET ROLE pawl_vault", denied},
		{"another shape", `SET ROLE "` + group + `"`, denied},
		{"another agent", `SET ROLE "` + other.User + `"`, denied},
		{"session", "SET SESSION AUTHORIZATION postgres", denied},
		{"join another shape", `GRANT "` + group + `" TO "` + c.User + `"`, denied},
		{"lend itself", `GRANT "` + c.User + `" TO "` + other.User + `"`, denied},
		{"another agent's password", `ALTER ROLE "` + other.User + `" PASSWORD 'x'`, denied},
		{"longer life", `ALTER ROLE "` + c.User + `" VALID UNTIL 'infinity'`, denied},
		{"createrole", `ALTER ROLE "` + c.User + `" CREATEROLE`, denied},
		{"passwords", "SELECT rolpassword FROM pg_authid", denied},
		{"records", "SELECT * FROM pawl.logins", denied},
		{"shapes", "SELECT * FROM pawl.shapes", denied},
		{"functions: sever", "SELECT pawl.sever(ARRAY['" + string(other.grant.ID) + "'])", denied},
		{"functions: grant", "SELECT pawl.grant_login('a', 'b', now())", denied},
		{"functions: shape", "SELECT pawl.ensure_shape('a', 'b')", denied},
		{"functions: disable", "SELECT pawl.disable(ARRAY['" + other.User + "'])", denied},
		{"program", "COPY orders TO PROGRAM 'cat'", denied},
		{"file", "SELECT pg_read_file('postgresql.conf')", denied},
		{"large object", "SELECT lo_create(0)", denied},
		{"large object, old", "SELECT lo_creat(-1)", denied},
		{"large object of bytes", "SELECT lo_from_bytea(0, 'x')", denied},
		{"import", "SELECT lo_import('/etc/hostname')", denied},
		{"server settings", "ALTER SYSTEM SET log_statement = 'all'", denied},
		{"preload", "SET session_preload_libraries = 'x'", denied},
		{"another user's session",
			"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pawl_vault'", denied},
	} {
		if _, err := conn.Exec(ctx, row.sql); sqlState(err) != row.want {
			t.Errorf("%s: %s = %v, want %v", row.name, row.sql, sqlState(err), row.want)
		}
	}
	// PostgreSQL answers a GRANT without the grant option with a warning, so check the privilege itself.
	if _, err := conn.Exec(ctx, "GRANT SELECT ON orders TO PUBLIC"); err != nil && sqlState(err) != denied {
		t.Errorf("GRANT to PUBLIC = %v, want %v or a warning", sqlState(err), denied)
	}
	if n := t.count("SELECT has_table_privilege('public', 'orders', 'SELECT')::int"); n != 0 {
		t.Error("PUBLIC has SELECT on orders after an agent's GRANT, want no privilege")
	}
}

// TestNarrowLimits checks that the server stops a long statement, an idle transaction, and a connection above the
// limit.
func TestNarrowLimits(tt *testing.T) {
	t := newTarget(tt)
	tool := tool()
	tool.Settings["connections"] = "2"
	tool.Settings["statement_timeout"], tool.Settings["idle_timeout"] = "200ms", "100ms"
	c, err := t.tryMintWith(tool, newGrant(`{"tables":["orders"]}`))
	if err != nil {
		t.Fatal(err)
	}
	conn, second := t.login(c), t.login(c)
	if third, err := pgx.Connect(t.Context(), c.URL); sqlState(err) != "53300" {
		t.Errorf("a third connection = %v, %v, want 53300", third != nil, sqlState(err))
	}
	if _, err := conn.Exec(t.Context(), "SELECT pg_sleep(10)"); sqlState(err) != "57014" {
		t.Errorf("a statement of 10 s = %v, want 57014", sqlState(err))
	}
	if _, err := second.Exec(t.Context(), "BEGIN"); err != nil {
		t.Fatal(sqlState(err))
	}
	// The server sends the error without a request and closes the connection, so the test reads to wait for it.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := second.PgConn().ReceiveMessage(ctx); sqlState(err) != "25P03" {
		t.Errorf("an idle transaction = %v, want 25P03", sqlState(err))
	}
}

// TestNarrowVerbs checks that the requested verbs work. INSERT into a serial column needs its sequence.
func TestNarrowVerbs(tt *testing.T) {
	t := newTarget(tt)
	t.exec(`REVOKE ALL ON SEQUENCE orders_id_seq FROM PUBLIC;
		GRANT USAGE ON SEQUENCE orders_id_seq TO pawl_maker WITH GRANT OPTION`)
	conn := t.login(t.mint(`{"tables":["orders"],"verbs":["insert","update","select"]}`))
	if _, err := conn.Exec(t.Context(), `INSERT INTO orders (customer, note) VALUES (7, 'x');
		UPDATE orders SET note = 'y' WHERE customer = 7`); err != nil {
		t.Errorf("insert and update = %v, want nil", err)
	}
	if _, err := conn.Exec(t.Context(), "DELETE FROM orders"); sqlState(err) != "42501" {
		t.Errorf("DELETE = %v, want 42501", sqlState(err))
	}
}

// TestFilter checks that the agent sees and writes the rows of its filter only.
func TestFilter(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"],"verbs":["select","insert","update"],"filter_column":"customer","filter_value":"1"}`)
	conn := t.login(c)
	ctx := t.Context()
	for _, name := range []string{"orders", c.Names["public.orders"]} {
		var rows, others int
		err := conn.QueryRow(ctx, "SELECT count(*), count(*) FILTER (WHERE customer <> 1) FROM "+name).Scan(&rows, &others)
		if err != nil || rows != 100 || others != 0 {
			t.Errorf("rows of %s = %d, %d outside the filter, %v, want 100, 0", name, rows, others, err)
		}
	}
	// The planner must not run a cheap function of the agent on rows that the filter hides.
	leak := `CREATE FUNCTION pg_temp.leak(c int) RETURNS bool LANGUAGE plpgsql COST 0.0001 AS
		$$ BEGIN IF c <> 1 THEN RAISE 'saw %', c; END IF; RETURN true; END $$`
	if _, err := conn.Exec(ctx, leak); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, "SELECT * FROM orders WHERE pg_temp.leak(customer)"); err != nil {
		t.Errorf("SELECT with a function of the agent = %v, want nil: it must see no row outside the filter", err)
	}
	otherView := t.mint(`{"tables":["orders"],"filter_column":"customer","filter_value":"2"}`).Names["public.orders"]
	for sql, want := range map[string]string{
		"SELECT * FROM public.orders":                  "42501",
		"SELECT * FROM " + otherView:                   "42501",
		"INSERT INTO orders (customer) VALUES (2)":     "44000",
		"UPDATE orders SET customer = 2":               "44000",
		"DELETE FROM orders":                           "42501",
		"CREATE OR REPLACE VIEW orders AS SELECT 1 id": "42501",
	} {
		if _, err := conn.Exec(ctx, sql); sqlState(err) != want {
			t.Errorf("%s = %v, want %v", sql, sqlState(err), want)
		}
	}
	_, err := conn.Exec(ctx, "INSERT INTO orders (customer, note) VALUES (1, 'new'); UPDATE orders SET note = 'changed'")
	if err != nil {
		t.Errorf("writing rows of the filter = %v, want nil", err)
	}
	if n := t.count("SELECT count(*) FROM orders WHERE note = 'changed' AND customer <> 1"); n != 0 {
		t.Errorf("changed rows outside the filter = %d, want 0", n)
	}
}

// TestFilterValue checks that a filter value is never parsed as SQL.
func TestFilterValue(tt *testing.T) {
	t := newTarget(tt)
	for _, value := range []string{`1 OR true`, `1'; DROP TABLE orders; --`, `1) OR (1=1`, `$1`, `x`, ``} {
		g := newGrant(`{"tables":["orders"],"filter_column":"customer","filter_value":` + quote(value) + `}`)
		if _, err := t.tryMint(g); broker.KindOf(err) != broker.Denied {
			t.Errorf("filter customer = %q: %v, want denied", value, err)
		}
		g = newGrant(`{"tables":["orders"],"filter_column":"note","filter_value":` + quote(value) + `}`)
		c, err := t.tryMint(g)
		if err != nil {
			t.Errorf("filter note = %q: %v, want a credential that sees no row", value, err)
			continue
		}
		var n int
		if err := t.login(c).QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&n); err != nil || n != 0 {
			t.Errorf("rows with note = %q: %d, %v, want 0", value, n, err)
		}
	}
}

func quote(s string) string { b, _ := args.String(s).MarshalJSON(); return string(b) }

// TestDenied checks that Prepare refuses a table that pawl_maker cannot grant, before the broker makes a token. The
// error does not reveal whether the table exists.
func TestDenied(tt *testing.T) {
	t := newTarget(tt)
	var texts []string
	for _, args := range []string{
		`{"tables":["salaries"],"verbs":["select"]}`, `{"tables":["nowhere"],"verbs":["select"]}`,
		`{"tables":["items"],"verbs":["insert"]}`, `{"tables":["orders","salaries"],"verbs":["select"]}`,
		`{"tables":["closed.t"],"verbs":["select"]}`,
		`{"tables":["orders"],"filter_column":"nowhere","filter_value":"1"}`,
	} {
		_, _, err := t.backend.Prepare(t.Context(), tool(), newGrant(args))
		if broker.KindOf(err) != broker.Denied {
			t.Errorf("Prepare(%s) = %v, want denied", args, err)
			continue
		}
		e := err.(*broker.Error)
		texts = append(texts, e.Msg)
		if e.Msg != texts[0] || e.Code != broker.CodeArgumentOutside {
			t.Errorf("Prepare(%s) = %q %v, want the text of the others: %q", args, e.Msg, e.Code, texts[0])
		}
	}
	if n := t.count("SELECT count(*) FROM pawl.shapes"); n != 0 {
		t.Errorf("shapes after refusals = %d, want 0", n)
	}
}

// TestWithdrawn checks that the backend makes a shape again after its table was dropped and made again, and that it
// refuses a withdrawn table.
func TestWithdrawn(tt *testing.T) {
	t := newTarget(tt)
	args := `{"tables":["items"],"verbs":["select"]}`
	t.mint(args)
	t.exec("DROP TABLE items; CREATE TABLE items (id int); GRANT SELECT ON items TO pawl_maker WITH GRANT OPTION")
	t.backend = t.newBackend(configNow(nil)) // with an empty cache of shapes
	if _, err := t.login(t.mint(args)).Exec(t.Context(), "SELECT * FROM items"); err != nil {
		t.Errorf("SELECT from the new table = %v, want nil", err)
	}
	c := t.mint(args)
	t.exec("REVOKE ALL ON items FROM pawl_maker CASCADE")
	if _, err := t.login(c).Exec(t.Context(), "SELECT * FROM items"); sqlState(err) != "42501" {
		t.Errorf("SELECT from a withdrawn table = %v, want 42501", sqlState(err))
	}
	t.backend = t.newBackend(configNow(nil))
	if _, err := t.tryMint(newGrant(args)); broker.KindOf(err) != broker.Denied {
		t.Errorf("minting for a withdrawn table = %v, want denied", err)
	}
}

// TestUnusable checks that Prepare refuses, by name, a secret that PostgreSQL would refuse or show no row.
func TestUnusable(tt *testing.T) {
	t := newTarget(tt)
	t.exec(`CREATE SEQUENCE numbers; CREATE SEQUENCE others;
		ALTER TABLE t1 ALTER id SET DEFAULT nextval('numbers');
		ALTER TABLE t2 ALTER id SET DEFAULT nextval('others'); GRANT USAGE ON SEQUENCE others TO pawl_maker WITH GRANT OPTION;
		ALTER TABLE t3 ENABLE ROW LEVEL SECURITY;
		ALTER TABLE t4 ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t4 FOR SELECT USING (true);
		ALTER TABLE t5 ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t5 TO pawl_maker USING (true);
		CREATE TABLE identity (id int GENERATED ALWAYS AS IDENTITY, x int);
		CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; CREATE SERVER open FOREIGN DATA WRAPPER w;
		CREATE FOREIGN TABLE far (id int) SERVER s; CREATE FOREIGN TABLE near (id int) SERVER open;
		CREATE USER MAPPING FOR postgres SERVER s;
		GRANT SELECT, INSERT ON identity, far, near TO pawl_maker WITH GRANT OPTION`)
	const filter = `,"filter_column":"id","filter_value":"1"`
	for args, want := range map[string]string{
		`{"tables":["t1"],"verbs":["insert"]}`:               "public.numbers",
		`{"tables":["t1"],"verbs":["insert"]` + filter + `}`: "public.numbers",
		`{"tables":["t1"],"verbs":["select","update"]}`:      "",
		`{"tables":["t2"],"verbs":["insert"]}`:               "",
		`{"tables":["t2"],"verbs":["insert"]` + filter + `}`: "",
		`{"tables":["identity"],"verbs":["insert"]}`:         "",
		`{"tables":["t3"],"verbs":["select"]}`:               "public.t3",
		`{"tables":["t4"],"verbs":["select"]}`:               "",
		`{"tables":["t4","t1"],"verbs":["select","delete"]}`: "public.t4",
		`{"tables":["t5"],"verbs":["select"]}`:               "public.t5",
		`{"tables":["t5"],"verbs":["select"]` + filter + `}`: "",
		`{"tables":["far"],"verbs":["select"]}`:              "public.far",
		`{"tables":["near"],"verbs":["select"]}`:             "",
	} {
		_, _, err := t.backend.Prepare(t.Context(), tool(), newGrant(args))
		var e *broker.Error
		switch {
		case want == "" && err != nil:
			t.Errorf("Prepare(%s) = %v, want nil", args, err)
		case want != "" && (!errors.As(err, &e) || e.Kind != broker.Denied || !strings.Contains(e.Msg, want)):
			t.Errorf("Prepare(%s) = %v, want denied, with %s by name", args, err, want)
		}
	}
	t.exec("CREATE USER MAPPING FOR PUBLIC SERVER s; CREATE POLICY p ON t3 FOR SELECT USING (true)")
	t.mint(`{"tables":["far","t3"],"verbs":["select"]}`)
	t.run(t.login(t.mint(`{"tables":["t2"],"verbs":["insert"]}`)), "INSERT INTO t2 DEFAULT VALUES")
	t.run(t.login(t.mint(`{"tables":["identity"],"verbs":["insert"]}`)), "INSERT INTO identity (x) VALUES (1)")
	c := t.mint(`{"tables":["t2"],"verbs":["insert","select"]` + filter + `}`)
	t.exec("ALTER SEQUENCE others RESTART")
	t.run(t.login(c), "INSERT INTO t2 DEFAULT VALUES")

	var grants []string
	if err := t.root.QueryRow(t.Context(), "SELECT array_agg(g) FROM pawl.sequence_grants() g").Scan(&grants); err != nil {
		t.Fatal(err)
	}
	const want = "GRANT USAGE ON SEQUENCE public.numbers TO pawl_maker WITH GRANT OPTION"
	if len(grants) != 1 || grants[0] != want {
		t.Errorf("sequence_grants() = %q, want %q", grants, want)
	}
	t.setup() // grants the sequences of all tables that agents may insert into
	t.run(t.login(t.mint(`{"tables":["t1"],"verbs":["insert"]}`)), "INSERT INTO t1 DEFAULT VALUES")
}

// TestUnusableBelow names what a secret needs beside its tables: what is below a view or a default, and the schema.
func TestUnusableBelow(tt *testing.T) {
	t := newTarget(tt)
	t.exec(`CREATE SCHEMA half; CREATE TABLE half.t (id int); GRANT USAGE ON SCHEMA half TO pawl_maker;
		GRANT SELECT ON half.t TO pawl_maker WITH GRANT OPTION;
		CREATE VIEW asks WITH (security_invoker) AS SELECT * FROM t1; CREATE VIEW lends AS SELECT * FROM salaries;
		CREATE SEQUENCE tickets; CREATE DOMAIN ticket AS int DEFAULT nextval('tickets');
		CREATE TABLE by_domain (id ticket, x int); CREATE TABLE base (id serial, x int); CREATE VIEW over_base AS TABLE base;
		CREATE VIEW over_view AS SELECT * FROM over_base WHERE x > 0;
		CREATE FUNCTION drawn() RETURNS int LANGUAGE sql AS 'SELECT 4'; REVOKE EXECUTE ON FUNCTION drawn FROM PUBLIC;
		CREATE TABLE by_function (id int DEFAULT drawn(), x int);
		GRANT SELECT, INSERT ON asks, lends, by_domain, over_view, by_function TO pawl_maker WITH GRANT OPTION`)
	const filter = `,"filter_column":"id","filter_value":"1"`
	for args, want := range map[string]string{
		`{"tables":["half.t"],"verbs":["select"]}`:               "schema half",
		`{"tables":["half.t"],"verbs":["select"]` + filter + `}`: "",
		`{"tables":["asks"],"verbs":["select"]}`:                 "public.t1",
		`{"tables":["asks"],"verbs":["select"]` + filter + `}`:   "public.t1",
		`{"tables":["asks","t1"],"verbs":["select"]}`:            "",
		`{"tables":["lends"],"verbs":["select"]}`:                "",
		`{"tables":["by_domain"],"verbs":["insert"]}`:            "public.tickets",
		`{"tables":["over_view"],"verbs":["insert"]}`:            "public.base_id_seq",
		`{"tables":["over_view"],"verbs":["select"]}`:            "",
		`{"tables":["by_function"],"verbs":["insert"]}`:          "drawn()",
	} {
		_, _, err := t.backend.Prepare(t.Context(), tool(), newGrant(args))
		var e *broker.Error
		switch {
		case want == "" && err != nil:
			t.Errorf("Prepare(%s) = %v, want nil", args, err)
		case want != "" && (!errors.As(err, &e) || e.Kind != broker.Denied || !strings.Contains(e.Msg, want)):
			t.Errorf("Prepare(%s) = %v, want denied, with %s by name", args, err, want)
		case want == "" && strings.Contains(args, "select"):
			c := t.mint(args)
			for _, name := range c.Names {
				t.run(t.login(c), "SELECT * FROM "+name)
			}
		}
	}
	t.exec("GRANT USAGE ON SCHEMA half TO pawl_maker WITH GRANT OPTION; GRANT EXECUTE ON FUNCTION drawn TO PUBLIC")
	t.setup()
	for table, sql := range map[string]string{"half.t": "", "by_domain": "INSERT INTO by_domain (x) VALUES (1)",
		"over_view": "INSERT INTO over_view (x) VALUES (1)", "by_function": "INSERT INTO by_function (x) VALUES (1)"} {
		verb := "insert"
		if sql == "" {
			verb, sql = "select", "SELECT FROM "+table
		}
		t.run(t.login(t.mint(`{"tables":["`+table+`"],"verbs":["`+verb+`"]}`)), sql)
	}
}
