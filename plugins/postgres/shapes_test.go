package postgres_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestManyTableSets makes more sets of tables than a table's list of privileges has room for. The list must not grow
// with the sets: a full one refuses the DBA's grants too.
func TestManyTableSets(tt *testing.T) {
	t := newTarget(tt)
	const sets = 2500
	for i := range 12 {
		t.exec(fmt.Sprintf(`CREATE TABLE x%[1]d (id int); GRANT SELECT ON x%[1]d TO pawl_maker WITH GRANT OPTION`, i))
	}
	shaper := t.as("shaper")
	start := time.Now()
	each(sets, 8, func(i int) {
		names := []string{`["public","orders"]`}
		for bit := range 12 {
			if i&(1<<bit) != 0 {
				names = append(names, fmt.Sprintf(`["public","x%d"]`, bit))
			}
		}
		spec := fmt.Sprintf(`{"connections":4,"database":%q,"idle_ms":1000,"statement_ms":1000,"tables":[%s],`+
			`"verbs":["select"]}`, t.name, strings.Join(names, ","))
		if _, err := shaper.Exec(t.Context(), "SELECT pawl.ensure_shape($1, $2)", hashOf(spec), spec); err != nil {
			t.Errorf("ensure_shape %d: %v", i, err)
		}
	})
	t.Logf("%d shapes in %v", sets, time.Since(start))
	if _, err := t.root.Exec(t.Context(), "GRANT SELECT ON orders TO pg_monitor"); err != nil {
		t.Errorf("the DBA's GRANT after %d shapes = %v, want nil", sets, err)
	}
	const entries = "SELECT cardinality(relacl) FROM pg_class WHERE oid = 'public.orders'::regclass"
	if n := t.count(entries); n > 10 {
		t.Errorf("privileges on orders after %d shapes = %d, want at most 10", sets, n)
	}
	c := t.mint(`{"tables":["orders","x0","x11"],"verbs":["select"]}`)
	conn := t.login(c)
	t.run(conn, "SELECT FROM orders, x0, x11")
	if _, err := conn.Exec(t.Context(), "SELECT FROM x1"); sqlState(err) != "42501" {
		t.Errorf("SELECT from a table of another set = %v, want 42501", sqlState(err))
	}
}

// TestShapesOfOneAgent checks that an agent with too many shapes is refused by name, that other agents are not, and
// that its idle shapes make room.
func TestShapesOfOneAgent(tt *testing.T) {
	t := newTarget(tt)
	t.exec("CREATE OR REPLACE FUNCTION pawl.most_shapes() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 3'")
	mint := func(agent string, n int) error {
		g := newGrant(fmt.Sprintf(`{"tables":["orders"],"filter_column":"customer","filter_value":"%d"}`, n))
		g.Caller = agentID(t.T, agent)
		_, err := t.tryMint(g)
		return err
	}
	for n := range 3 {
		if err := mint("greedy", n); err != nil {
			t.Fatalf("shape %d = %v, want nil", n, err)
		}
	}
	err := mint("greedy", 3)
	var e *broker.Error
	if !errors.As(err, &e) || e.Code != broker.CodeTooFast || !strings.Contains(e.Msg, "spiffe://pawl.dev/greedy") {
		t.Errorf("shape 4 = %v, want a refusal of spiffe://pawl.dev/greedy by name", err)
	}
	if err := mint("greedy", 1); err != nil {
		t.Errorf("an existing shape beyond the limit = %v, want nil", err)
	}
	if err := mint("modest", 4); err != nil {
		t.Errorf("a shape of another agent = %v, want nil", err)
	}
	t.exec(`UPDATE pawl.shapes SET last_used = now() - interval '20 minutes'`)
	if err := mint("greedy", 5); err == nil {
		t.Error("a shape while logins use all idle ones = nil, want a refusal")
	}
	for _, id := range t.grants() {
		t.sever(broker.Grant{ID: id})
	}
	if err := t.backend.Remove(t.Context(), t.grants()); err != nil {
		t.Fatal(err)
	}
	if err := mint("greedy", 6); err != nil {
		t.Errorf("a shape while others are idle = %v, want nil", err)
	}
}

// TestShapesOfAllAgents checks that agents with few shapes each cannot make more than the database has room for.
func TestShapesOfAllAgents(tt *testing.T) {
	t := newTarget(tt)
	t.exec("CREATE OR REPLACE FUNCTION pawl.most_shapes() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2'")
	mint := func(n int) error { // each agent has one shape
		g := newGrant(fmt.Sprintf(`{"tables":["orders"],"filter_column":"customer","filter_value":"%d"}`, n))
		g.Caller = agentID(t.T, fmt.Sprintf("agent-%d", n))
		_, err := t.tryMint(g)
		return err
	}
	for n := range 8 {
		if err := mint(n); err != nil {
			t.Fatalf("shape %d = %v, want nil", n, err)
		}
	}
	err := mint(8)
	var e *broker.Error
	if !errors.As(err, &e) || e.Code != broker.CodeTooFast || !strings.Contains(e.Msg, "spiffe://pawl.dev/agent-8") {
		t.Errorf("shape 9 = %v, want a refusal of spiffe://pawl.dev/agent-8 by name", err)
	}
	if err := mint(7); err != nil {
		t.Errorf("an existing shape in a full database = %v, want nil", err)
	}
}

// grants returns the grants of all logins of this database.
func (t *target) grants() (ids []broker.GrantID) {
	t.Helper()
	if err := t.root.QueryRow(t.Context(), `SELECT array_agg(r.grant_id) FROM pawl.roles r
		JOIN pawl.logins USING (grant_id)`).Scan(&ids); err != nil {
		t.Fatal(err)
	}
	return ids
}

// TestSchemaAndDatabase checks shapes where PUBLIC has neither USAGE on the schema nor CONNECT on the database.
func TestSchemaAndDatabase(tt *testing.T) {
	t := newTarget(tt)
	t.exec(`REVOKE CONNECT ON DATABASE "` + t.name + `" FROM PUBLIC; REVOKE USAGE ON SCHEMA public FROM PUBLIC;
		GRANT USAGE ON SCHEMA closed TO pawl_maker WITH GRANT OPTION;
		GRANT SELECT, INSERT ON closed.t TO pawl_maker WITH GRANT OPTION`)
	t.exec(`GRANT CONNECT ON DATABASE "` + t.name + `" TO pawl_vault, pawl_shaper, pawl_revoker`)
	for range 2 {
		for i, args := range []string{
			`{"tables":["closed.t"],"verbs":["select"]}`, `{"tables":["closed.t","t1"],"verbs":["insert","select"]}`,
			`{"tables":["t1"],"verbs":["delete"]}`,
		} {
			conn := t.login(t.mint(args))
			for sql, allowed := range map[string]bool{
				"SELECT FROM closed.t": i < 2, "INSERT INTO closed.t VALUES (1)": i == 1, "SELECT FROM t1": i == 1,
				"DELETE FROM t1": i == 2, "SELECT FROM t2": false,
			} {
				if _, err := conn.Exec(t.Context(), sql); (err == nil) != allowed {
					t.Errorf("%s with %s = %v, want allowed: %v", sql, args, sqlState(err), allowed)
				}
			}
		}
		t.backend = t.newBackend(configNow(nil)) // with an empty cache of shapes
	}
}

// TestRenamedTable checks that the groups of a table's name lose the rights on the table that had the name before.
func TestRenamedTable(tt *testing.T) {
	t := newTarget(tt)
	const args = `{"tables":["items"],"verbs":["select"]}`
	t.mint(args)
	t.exec(`ALTER TABLE items RENAME TO old; CREATE TABLE items (id int);
		GRANT SELECT ON items TO pawl_maker WITH GRANT OPTION`)
	t.backend = t.newBackend(configNow(nil)) // with an empty cache of shapes
	conn := t.login(t.mint(args))
	t.run(conn, "SELECT FROM items")
	if _, err := conn.Exec(t.Context(), "SELECT FROM old"); sqlState(err) != "42501" {
		t.Errorf("SELECT from the table that had the name before = %v, want 42501", sqlState(err))
	}
}

// TestShapeOfVersion1 sets up a database of version 1 of the schema. There each shape's group held the rights itself.
func TestShapeOfVersion1(tt *testing.T) {
	t := newTarget(tt)
	c := t.mint(`{"tables":["orders"],"verbs":["select","update"]}`)
	group := "pawl-shape-" + strings.Split(c.User, "-")[2]
	t.exec(`DROP TABLE IF EXISTS pawl.groups; ALTER TABLE pawl.shapes DROP COLUMN IF EXISTS agent;
		CREATE OR REPLACE FUNCTION pawl.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1'`)
	t.exec(`SET ROLE pawl_maker; GRANT SELECT, UPDATE ON orders TO "` + group + `"; RESET ROLE`)
	t.exec(`CREATE ROLE "pawl-shape-` + t.name + `"; INSERT INTO pawl.shapes (shape, spec)
		VALUES ('` + t.name + `', '{"tables":[["public","gone"]],"verbs":["select"]}')`)
	t.setup()
	const own = "SELECT count(*) FROM pg_class, aclexplode(relacl) a WHERE a.grantee = $1::regrole"
	if n := t.count(own, `"`+group+`"`); n != 0 {
		t.Errorf("rights that the group of a shape holds itself after Setup = %d, want 0", n)
	}
	t.run(t.login(c), "SELECT FROM orders", "UPDATE orders SET note = 'x' WHERE false")
	t.backend = t.newBackend(configNow(nil))
	t.run(t.login(t.mint(`{"tables":["orders"],"verbs":["select","update"]}`)), "SELECT FROM orders")
}
