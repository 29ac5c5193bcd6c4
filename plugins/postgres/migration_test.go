package postgres_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// TestMigration changes tables below the views of agents. A view blocks some changes until the DBA drops it, and the next
// step of an agent gets one of the changed table.
func TestMigration(tt *testing.T) {
	t := newTarget(tt)
	const args = `{"tables":["orders"],"verbs":["select"],"filter_column":"customer","filter_value":"1"}`
	first := t.mint(args)
	schema := strings.Split(first.Names["public.orders"], `"`)[1]
	var comment string
	if err := t.root.QueryRow(t.Context(), "SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = $1",
		schema).Scan(&comment); err != nil || !strings.Contains(comment, "SELECT pawl.drop_views(") {
		t.Errorf("comment on schema %s = %q, %v, want one that names pawl.drop_views", schema, comment, err)
	}
	for name, row := range map[string]struct{ change, query string }{
		"a new column":   {"ALTER TABLE orders ADD COLUMN added int DEFAULT 7", "SELECT added FROM %s WHERE added = 7"},
		"another type":   {"ALTER TABLE orders ALTER COLUMN note TYPE varchar(90)", "SELECT note FROM %s"},
		"a column fewer": {"ALTER TABLE orders DROP COLUMN note", "SELECT id FROM %s"},
		"a table in the place of another": {"ALTER TABLE orders RENAME TO orders_old; CREATE TABLE orders (customer int, " +
			"fresh int); GRANT SELECT ON orders TO pawl_maker WITH GRANT OPTION; INSERT INTO orders VALUES (1, 1)",
			"SELECT fresh FROM %s"},
		"a dropped table": {"DROP TABLE orders; CREATE TABLE orders (customer int); GRANT SELECT ON orders TO pawl_maker " +
			"WITH GRANT OPTION; INSERT INTO orders VALUES (1)", "SELECT customer FROM %s"},
	} {
		tt.Run(name, func(tt *testing.T) {
			t := newTarget(tt)
			c := t.mint(args)
			t.login(c)
			if _, err := t.root.Exec(t.Context(), row.change); err != nil {
				t.exec("BEGIN; SELECT pawl.drop_views('public.orders'); " + row.change + "; COMMIT")
			}
			c = t.mint(args)
			rows, err := t.login(c).Query(t.Context(), strings.ReplaceAll(row.query, "%s", c.Names["public.orders"]))
			if err != nil {
				t.Fatal(err)
			}
			if found, err := pgx.CollectRows(rows, pgx.RowToMap); err != nil || len(found) == 0 {
				t.Errorf("%s = %d rows, %v, want some", row.query, len(found), sqlState(err))
			}
		})
	}
}

// TestMigrationBesideAgents has an agent that reads a view in an open transaction. Other agents must get the view as it
// is, and the new columns once the transaction has ended.
func TestMigrationBesideAgents(tt *testing.T) {
	t := newTarget(tt)
	const args = `{"tables":["orders"],"verbs":["select"],"filter_column":"customer","filter_value":"1"}`
	first := t.mint(args)
	t.exec("ALTER TABLE orders ADD COLUMN added int DEFAULT 7")
	agent := t.login(first)
	t.run(agent, "BEGIN", "SELECT FROM "+first.Names["public.orders"])
	c := t.mint(args)
	t.run(t.login(c), "SELECT note FROM "+c.Names["public.orders"])
	t.run(agent, "COMMIT")
	c = t.mint(args)
	t.run(t.login(c), "SELECT added FROM "+c.Names["public.orders"])
}

// TestListShapes checks what a DBA sees of the shapes.
func TestListShapes(tt *testing.T) {
	t := newTarget(tt)
	g := newGrant(`{"tables":["orders"],"verbs":["select"],"filter_column":"customer","filter_value":"1"}`)
	g.Caller = agentID(tt, "reader")
	if _, err := t.tryMint(g); err != nil {
		t.Fatal(err)
	}
	var agent, tables, verbs, filter string
	var logins int
	if err := t.root.QueryRow(t.Context(), "SELECT agent, tables, verbs, filter_column, logins FROM pawl.list_shapes()").
		Scan(&agent, &tables, &verbs, &filter, &logins); err != nil {
		t.Fatal(err)
	}
	if agent != "spiffe://pawl.dev/reader" || tables != "public.orders" || verbs != "select" || filter != "customer" ||
		logins != 1 {
		t.Errorf("the shape = %s %s %s %s %d, want reader's of orders with one login", agent, tables, verbs, filter, logins)
	}
	if n := t.count("SELECT pawl.drop_views('orders')"); n != 1 {
		t.Errorf("drop_views(orders) = %d, want 1", n)
	}
}
