package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestShapes lists the shapes of a real database and drops the views on a table.
func TestShapes(t *testing.T) {
	t.Parallel()
	server := parts.NeedPostgreSQL(t)
	dsn, err := server.CreateDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal("connecting to the database")
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "CREATE TABLE orders (id int)"); err != nil {
		t.Fatal(err)
	}
	if err := postgres.Setup(t.Context(), conn, postgres.SetupConfig{
		Tables: []postgres.Grantable{{Table: "orders", Verbs: []string{"select"}}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `WITH s AS (SELECT format('{"connections":4,"database":"%s","filter":{"column":"id",'
		'"value":"1"},"idle_ms":1000,"statement_ms":1000,"tables":[["public","orders"]],"verbs":["select"]}',
		current_database()) AS spec)
		SELECT pawl.ensure_shape(left(encode(sha256(spec::bytea), 'hex'), 12), spec, 'spiffe://pawl.dev/reader') FROM s`,
	); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		args []string
		want string
	}{
		{[]string{"list"}, "public.orders  spiffe://pawl.dev/reader"},
		{[]string{"drop", "orders"}, "orders: dropped the views of 1 shapes"},
		{[]string{"drop", "public.orders"}, "public.orders: dropped the views of 0 shapes"},
	} {
		var out bytes.Buffer
		c := command()
		c.SetOut(&out)
		c.SetArgs(append([]string{"shapes", "--dsn", dsn}, row.args...))
		if err := c.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), row.want) {
			t.Errorf("pawl shapes %v = %v, printed %q, want %q", row.args, err, out.String(), row.want)
		}
	}
}
