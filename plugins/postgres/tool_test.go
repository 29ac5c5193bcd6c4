package postgres_test

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// noCredentials implements Credentials for tests that need no database.
type noCredentials struct{}

func (noCredentials) Credential(context.Context, postgres.Purpose) (string, string, time.Time, error) {
	return "", "", time.Time{}, errors.New("no credentials in this test")
}

func offline(t testing.TB) *postgres.Backend {
	t.Helper()
	b, err := postgres.New(postgres.Config{DSN: "host=db.test port=5433 dbname=app", Credentials: noCredentials{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

func TestNewRefuses(t *testing.T) {
	for _, cfg := range []postgres.Config{
		{}, {DSN: "host=x dbname=app"}, {Credentials: noCredentials{}},
		{Credentials: noCredentials{}, DSN: "host=x dbname=app password=MARKER-SECRET"},
		{Credentials: noCredentials{}, DSN: "host=x dbname=app Password = MARKER-SECRET"},
		{Credentials: noCredentials{}, DSN: "postgres://u:MARKER-SECRET@x/app"},
		{Credentials: noCredentials{}, DSN: "postgres://u@x/app?password=MARKER-SECRET"},
		{Credentials: noCredentials{}, DSN: "postgres://u:MARKER-SECRET@x:port/app"},
		{Credentials: noCredentials{}, DSN: "host=x dbname=" + strings.Repeat("x", 64)},
		{Credentials: noCredentials{}, DSN: "host=x dbname=app", Standbys: []string{"host=y dbname=other"}},
		{Credentials: noCredentials{}, DSN: "host=x dbname=app", Standbys: []string{"host=y,z dbname=app"}},
	} {
		_, err := postgres.New(cfg)
		if err == nil || strings.Contains(err.Error(), "MARKER-SECRET") {
			t.Errorf("New(%q) = nil, or an error with the password; want an error without it",
				strings.ReplaceAll(cfg.DSN, "MARKER-SECRET", "…"))
		}
	}
}

// TestNewIgnoresTheEnvironment checks that New accepts a DSN without a password when PGPASSWORD is set.
func TestNewIgnoresTheEnvironment(t *testing.T) {
	t.Setenv("PGPASSWORD", "MARKER-SECRET")
	offline(t)
}

func TestLoad(t *testing.T) {
	b := offline(t)
	change := func(f func(*broker.Tool)) broker.Tool {
		x := tool()
		x.Settings, x.Arguments = maps.Clone(x.Settings), maps.Clone(x.Arguments)
		f(&x)
		return x
	}
	set := func(name, value string) broker.Tool { return change(func(x *broker.Tool) { x.Settings[name] = value }) }
	fixed := func(required bool) broker.Tool {
		return change(func(x *broker.Tool) {
			x.Settings["filter_column"] = "customer"
			delete(x.Arguments, "filter_column")
			x.Arguments["filter_value"] = broker.Parameter{Kind: "string", Required: required}
		})
	}
	for _, row := range []struct {
		name string
		tool broker.Tool
		ok   bool
	}{
		{"unchanged", tool(), true},
		{"host", set("host", "db-1.internal"), true},
		{"socket", set("host", "/run/postgresql"), true}, {"port", set("port", "65535"), true},
		{"database", set("dbname", "app"), true}, {"tables", set("tables", "orders,other.items"), true},
		{"quoted comma", set("tables", `orders,"a,b"."c"","`), true}, {"schema with a hyphen", set("schema", "shop-1"), true},
		{"100 connections", set("connections", "100"), true}, {"24 hours", set("statement_timeout", "24h"), true},
		{"fixed column", fixed(true), true},
		{"fixed tables", change(func(x *broker.Tool) {
			x.Settings["tables"] = "orders"
			delete(x.Arguments, "tables")
		}), true},
		{"label proxy", change(func(x *broker.Tool) { x.Narrowing = broker.NarrowProxy }), false},
		{"label none", change(func(x *broker.Tool) { x.Narrowing = broker.NarrowNone }), false},
		{"no path", change(func(x *broker.Tool) { x.Path = broker.VaultPath{} }), false},
		{"three segments", change(func(x *broker.Tool) { x.Path = brokertest.Path("a/b/c") }), false},
		{"unknown setting", set("Host", "x"), false}, {"creation statements", set("creation_statements", "x"), false},
		{"another database", set("dbname", "other"), false},
		{"host with a space", set("host", "a b"), false}, {"host with @", set("host", "a@b"), false},
		{"no host", set("host", ""), false}, {"port 0", set("port", "0"), false},
		{"port +1", set("port", "+1"), false}, {"port 65536", set("port", "65536"), false},
		{"sslmode", set("sslmode", "off"), false},
		{"schema", set("schema", "pg_catalog"), false}, {"own schema", set("schema", "pawl"), false},
		{"verb", set("verbs", "select,truncate"), false},
		{"verb case", set("verbs", "SELECT"), false}, {"verb space", set("verbs", "select, insert"), false},
		{"101 connections", set("connections", "101"), false},
		{"no timeout", set("statement_timeout", "0s"), false}, {"over 24 hours", set("idle_timeout", "24h1ms"), false},
		{"table", set("tables", "orders;"), false}, {"no table", set("tables", ""), false},
		{"fixed column that may be left out", fixed(false), false},
		{"two columns", set("filter_column", "customer"), false},
		{"value without column", change(func(x *broker.Tool) { delete(x.Arguments, "filter_column") }), false},
		{"column without value", change(func(x *broker.Tool) { delete(x.Arguments, "filter_value") }), false},
		{"no tables at all", change(func(x *broker.Tool) { delete(x.Arguments, "tables") }), false},
		{"unknown argument", change(func(x *broker.Tool) {
			x.Arguments["where"] = broker.Parameter{Kind: "string"}
		}), false},
		{"kind", change(func(x *broker.Tool) { x.Arguments["verbs"] = broker.Parameter{Kind: "string"} }), false},
	} {
		if err := b.Load(row.tool); (err == nil) != row.ok {
			t.Errorf("%s: Load() = %v, want ok = %v", row.name, err, row.ok)
		}
	}
}

// TestPrepareRefuses checks the arguments that Prepare refuses without the database.
func TestPrepareRefuses(t *testing.T) {
	b := offline(t)
	narrow := tool()
	narrow.Settings = map[string]string{"tables": "orders", "verbs": "select"}
	for _, args := range []string{
		`{"tables":[]}`, `{"tables":["orders","salaries"]}`, `{"tables":["Orders"]}`,
		`{"tables":["other.orders"]}`, `{"tables":["orders "]}`,
		`{"tables":["orders"],"verbs":["insert"]}`, `{"tables":["orders"],"verbs":[]}`,
		`{"tables":["orders"],"verbs":["SELECT"]}`,
		`{"tables":["public.public.orders"]}`, `{"tables":["."]}`, `{"tables":["pawl.logins"]}`,
		`{"tables":["orders\""]}`, `{"tables":["\"orders\""]}`, `{"tables":["public.\"orders\""]}`,
		`{"filter_column":"a"}`, `{"filter_value":"1"}`,
		`{"filter_column":"","filter_value":"1"}`, `{"filter_column":"a","filter_value":"\u0000"}`,
		`{"filter_column":"a","filter_value":"` + strings.Repeat("x", 1025) + `"}`,
	} {
		if _, _, err := b.Prepare(t.Context(), narrow, newGrant(args)); broker.KindOf(err) != broker.Denied {
			t.Errorf("Prepare(%s) = %v, want denied", args, err)
		}
	}
	longest := newGrant(`{"filter_column":"a","filter_value":"` + strings.Repeat("x", 1024) + `"}`)
	_, _, err := b.Prepare(t.Context(), narrow, longest)
	if broker.KindOf(err) != broker.Unavailable {
		t.Errorf("Prepare without a database = %v, want unavailable", err)
	}
	g := newGrant(`{"tables":["orders"]}`)
	g.ID = "gr'; DROP"
	if _, _, err := b.Prepare(t.Context(), narrow, g); err == nil {
		t.Error("Prepare(a grant id with quotes) = nil, want an error")
	}
}

// TestFinish checks that Finish refuses a response with a login of another step or of another shape.
func TestFinish(tt *testing.T) {
	t := newTarget(tt)
	g := newGrant(`{"tables":["orders"]}`)
	m, display, err := t.backend.Prepare(t.Context(), tool(), g)
	if err != nil {
		t.Fatal(err)
	}
	want := brokertest.Path("database/creds/pawl-app")
	if m.Path != want || !m.Leased || m.TTL != time.Minute || len(display) != 39 {
		t.Errorf("Prepare = %v leased %v ttl %v %q, want %v, true, 1m", m.Path, m.Leased, m.TTL, display, want)
	}
	other := "pawl-" + string(newGrant(`{}`).ID) + display[26:] + "-abcdefgh"
	name := "pawl-" + display + "-abcdefgh"
	for _, response := range []map[string]any{
		nil, {}, {"username": name}, {"username": name, "password": 1}, {"username": 1, "password": "MARKER"},
		{"username": other, "password": "MARKER"}, {"username": "postgres", "password": "MARKER"},
		{"username": "pawl-" + display[:27] + "0123456789ab-abcdefgh", "password": "MARKER"},
		{"username": "pawl-" + display + "-abc'efgh", "password": "MARKER"},
		{"username": name + "i", "password": "MARKER"},
	} {
		if _, err := m.Finish(response, time.Time{}); err == nil || strings.Contains(err.Error(), "MARKER") {
			t.Errorf("Finish(%v) = nil, or an error with the password; want an error without it", response["username"])
		}
	}
	f, err := m.Finish(map[string]any{"username": name, "password": "p@ss/w:rd?"}, time.Time{})
	if err != nil || f.Ref != name || f.Secret.Empty() {
		t.Errorf("Finish(the step's login) = %v, %v, want a secret and its name", f.Ref, err)
	}
	if len(f.Digests) > 0 {
		t.Errorf("digests of a short password = %v, want none: it could be guessed", f.Digests)
	}
	const long = "abcdefghij-ABCDEFGHI"
	f, err = m.Finish(map[string]any{"username": name, "password": long}, time.Time{})
	var login struct{ URL string }
	if err != nil || json.Unmarshal(f.Secret.Reveal(), &login) != nil ||
		!reflect.DeepEqual(f.Digests, []broker.ValueDigest{broker.DigestValue(long), broker.DigestValue(login.URL)}) {
		t.Errorf("digests = %v, %v, want those of the password and the URL", f.Digests, err)
	}
}

// TestVaultSetupRefuses checks that no name in a setup is spliced into a path.
func TestVaultSetupRefuses(t *testing.T) {
	good := postgres.VaultSetup{Mount: "database", Connection: "app", Tools: map[string]time.Duration{"pawl-app": 0},
		Service: map[postgres.Purpose]string{postgres.Revoker: "pawl-revoker"}}
	if _, err := good.Writes(); err != nil {
		t.Fatalf("Writes() = %v, want nil", err)
	}
	for name, change := range map[string]func(*postgres.VaultSetup){
		"no mount":               func(s *postgres.VaultSetup) { s.Mount = "" },
		"a mount that climbs":    func(s *postgres.VaultSetup) { s.Mount = ".." },
		"a connection in a path": func(s *postgres.VaultSetup) { s.Connection = "app/../../sys" },
		"a tool's role":          func(s *postgres.VaultSetup) { s.Tools = map[string]time.Duration{"a b": 0} },
		"a service role":         func(s *postgres.VaultSetup) { s.Service = map[postgres.Purpose]string{postgres.Revoker: "-x"} },
	} {
		s := good
		change(&s)
		if writes, err := s.Writes(); err == nil || writes != nil {
			t.Errorf("Writes() with %s = %v, %v, want an error", name, writes, err)
		}
	}
}

// TestVaultSetup checks that the statements for Vault call existing functions.
func TestVaultSetup(tt *testing.T) {
	t := newTarget(tt)
	setup := postgres.VaultSetup{Mount: "database", Connection: "app", Address: "db.test:5432", Database: "app",
		Tools:   map[string]time.Duration{"pawl-app": 0, "pawl-long": time.Hour},
		Service: map[postgres.Purpose]string{postgres.Shaper: "pawl-shaper", postgres.Revoker: "pawl-revoker"}}
	writes, err := setup.Writes()
	roles := []string{"pawl-app", "pawl-long", "pawl-revoker", "pawl-shaper"}
	if err != nil || len(writes) != 5 || !reflect.DeepEqual(writes[0].Data["allowed_roles"], roles) {
		t.Fatalf("Writes() = %v, %v, want a connection and four roles", writes, err)
	}
	for i, ttl := range []string{"60s", "900s", "14400s", "14400s"} {
		role := writes[i+1]
		if role.Data["default_ttl"] != ttl || role.Data["max_ttl"] != ttl {
			t.Errorf("%v: ttl = %v, %v, want %v", role.Path, role.Data["default_ttl"], role.Data["max_ttl"], ttl)
		}
		for _, kind := range []string{"creation_statements", "revocation_statements"} {
			statements := role.Data[kind].([]string)
			sql := statements[len(statements)-1]
			sql = strings.NewReplacer("{{name}}", "no such name", "{{password}}", "x",
				"{{expiration}}", "2026-01-01 00:00:00+0000").Replace(sql)
			// The function exists and may be called, and refuses the name.
			if _, err := t.vault.Exec(t.Context(), sql); sqlState(err) != "22023" {
				t.Errorf("%v %s = %v, want 22023", role.Path, sql, sqlState(err))
			}
		}
	}
}

// TestURL checks that clients read the servers of a secret as they are meant.
func TestURL(t *testing.T) {
	for _, row := range []struct {
		hosts []string
		want  string
	}{
		{[]string{"db"}, "postgresql://u:p@db:5432/app?sslmode=disable"},
		{[]string{"::1"}, "postgresql://u:p@[::1]:5432/app?sslmode=disable"},
		{[]string{"/run/pg"}, "postgresql://u:p@/app?host=%2Frun%2Fpg&port=5432&sslmode=disable"},
		{[]string{"a", "10.0.0.1"}, "postgresql://u:p@a:5432,10.0.0.1:5432/app?sslmode=disable&target_session_attrs=read-write"},
		{[]string{"a", "::1"}, "postgresql://u:p@/app?host=a%2C%3A%3A1&port=5432%2C5432&sslmode=disable&" +
			"target_session_attrs=read-write"},
	} {
		got := postgres.URLOf(row.hosts...)
		if got != row.want {
			t.Errorf("URL of %v = %s, want %s", row.hosts, got, row.want)
		}
		c, err := pgx.ParseConfig(got)
		if err != nil {
			t.Errorf("pgx parses %s = %v, want nil", got, err)
			continue
		}
		read := []string{c.Host}
		for _, f := range c.Fallbacks {
			read = append(read, f.Host)
		}
		if !reflect.DeepEqual(read, row.hosts) {
			t.Errorf("pgx reads the hosts %v in %s, want %v", read, got, row.hosts)
		}
	}
}

// TestParseTable checks that a table has one spelling.
func TestParseTable(t *testing.T) {
	for _, row := range []struct{ text, want string }{
		{`orders`, `public.orders`}, {`Sales.Orders`, `Sales.Orders`}, {`shop-prod.order items`, `shop-prod.order items`},
		{`größe.Ünits_2$`, `größe.Ünits_2$`}, {`"a.b"`, `public."a.b"`}, {`"a.b"."c""d"`, `"a.b"."c""d"`},
		{`s." x"`, `s." x"`}, {`"a,b"`, `public."a,b"`}, {`"a;b"`, `public."a;b"`}, {`1st`, `public.1st`},
		{strings.Repeat("x", 63), "public." + strings.Repeat("x", 63)},
		{``, ``}, {`.`, ``}, {`a.`, ``}, {`.a`, ``}, {`a.b.c`, ``}, {`"orders"`, ``}, {`"`, ``}, {`""`, ``}, {`"a.b`, ``},
		{`a"b`, ``}, {`"a.b"c`, ``}, {`a;b`, ``}, {`a,b`, ``}, {` a`, ``}, {`a `, ``}, {"a\nb", ``}, {"\"a\x00\"", ``},
		{"\"\xff\"", ``}, {strings.Repeat("x", 64), ``}, {`"` + strings.Repeat(".", 64) + `"`, ``},
		{strings.Repeat("ü", 32), ``}, {`pg_catalog.x`, ``}, {`pawl_x.y`, ``}, {`"information_schema".x`, ``},
	} {
		if got, err := postgres.SpellTable(row.text, "public"); got != row.want || (err == nil) != (row.want != "") {
			t.Errorf("the table %q = %q, %v, want %q", row.text, got, err, row.want)
		}
	}
}

// TestNames has a database, schema, table and column with names that need quotes. Its secret must work, with libpq too.
func TestNames(tt *testing.T) {
	server := parts.NeedPostgreSQL(tt)
	name := `shop-prod "Größe" /?&%41'\ ` + random8()
	first := newTarget(tt)
	first.exec("CREATE DATABASE " + pgx.Identifier{name}.Sanitize())
	t := targetIn(tt, server, server.DSN(name))
	if t.name != name {
		t.Fatalf("database = %q, want %q", t.name, name)
	}
	t.exec(`CREATE SCHEMA "Größe-1"; CREATE TABLE "Größe-1"."Order ""Items"".x" ("Kunden-Nr. ß" int, id serial);
		INSERT INTO "Größe-1"."Order ""Items"".x" VALUES (1), (2);
		GRANT USAGE ON SCHEMA "Größe-1" TO pawl_maker WITH GRANT OPTION;
		GRANT SELECT, INSERT ON "Größe-1"."Order ""Items"".x" TO pawl_maker WITH GRANT OPTION;
		GRANT USAGE ON SEQUENCE "Größe-1"."Order ""Items"".x_id_seq" TO pawl_maker WITH GRANT OPTION`)
	for args, rows := range map[string]int{
		`{"tables":["Größe-1.\"Order \"\"Items\"\".x\""],"verbs":["select","insert"]}`: 2,
		`{"tables":["Größe-1.\"Order \"\"Items\"\".x\""],"verbs":["select","insert"],` +
			`"filter_column":"Kunden-Nr. ß","filter_value":"1"}`: 1,
	} {
		c := t.mint(args)
		table := c.Names[`Größe-1."Order ""Items"".x"`]
		var n int
		if err := t.login(c).QueryRow(t.Context(), "SELECT count(*) FROM "+table).Scan(&n); err != nil || n != rows {
			t.Errorf("rows of %s = %d, %v, want %d", table, n, sqlState(err), rows)
		}
		if _, err := t.login(c).Exec(t.Context(), "INSERT INTO "+table+" VALUES (1)"); err != nil {
			t.Errorf("INSERT INTO %s = %v, want nil", table, err)
		}
		t.exec(`DELETE FROM "Größe-1"."Order ""Items"".x" WHERE id > 2`)
		out, err := client(tt, server, "psql", "-XAt", "-c", "SELECT current_database()", c.URL)
		if got := strings.TrimSuffix(out, "\n"); err != nil || got != name {
			t.Errorf("psql with the secret's URL = %q, %v, want %q", got, err, name)
		}
		t.sever(c.grant)
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead || !t.refusesLogin(c) {
			t.Errorf("Prove after Sever = %v %q, want dead", e.Outcome, e.Answer)
		}
	}
	if err := t.backend.Collect(t.Context(), time.Hour); err != nil {
		t.Errorf("Collect = %v, want nil", err)
	}
}

// FuzzPrepare passes untrusted arguments. Prepare must accept each table in one spelling only.
func FuzzPrepare(f *testing.F) {
	for _, args := range []string{
		`{"tables":["a.b","c"]}`, `{"tables":["a"],"verbs":["select"],"filter_column":"x","filter_value":"1"}`,
		`{"tables":["a\"b"]}`, `{"tables":["\"a.b\".\"c\"\"d\""]}`, `{}`,
	} {
		f.Add(args)
	}
	b := offline(f)
	f.Fuzz(func(t *testing.T, text string) {
		args, err := args.Parse([]byte(text))
		if err != nil || len(tool().Check(args)) > 0 {
			return
		}
		g := newGrant(`{}`)
		g.Args = args
		// Without a database, arguments that pass all checks end as Unavailable.
		switch _, _, err := b.Prepare(t.Context(), tool(), g); broker.KindOf(err) {
		case broker.Denied:
		case broker.Unavailable:
			tables, _ := args.Get("tables")
			names, _ := tables.Strings()
			for _, name := range names {
				if spelled, err := postgres.SpellTable(name, "public"); err != nil || spelled != name && spelled != "public."+name {
					t.Errorf("Prepare accepts the table %q, which is spelled %s, %v", name, spelled, err)
				}
			}
		default:
			t.Errorf("Prepare(%s) = %v, want denied or unavailable", text, err)
		}
	})
}
