package postgres_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestExamine checks what the doctor says of a database, with one thing wrong in each row.
func TestExamine(tt *testing.T) {
	t := ownTarget(tt) // of 100 connections
	standby := parts.OwnStandby(tt, t.server)
	r := &replica{target: t, standby: standby, there: pool(tt, standby.DSN(t.name))}
	fixed := parts.OwnPooler(tt, parts.PoolerConfig{Program: "pgbouncer", FixedUser: true, Server: t.server})
	other := newTarget(tt)
	few := tool()
	few.Settings["connections"] = "10"
	tools := func(all ...broker.Tool) []broker.Tool { return all }
	at := toolAt(standby.Address())
	at.Settings["connections"] = "10"
	url := func(address, database string) map[string]string {
		return map[string]string{"database/shop": fmt.Sprintf("postgresql://{{username}}:{{password}}@%s/%s?sslmode=disable",
			address, database)}
	}
	_, port, _ := strings.Cut(t.server.Address(), ":")
	for _, row := range []struct {
		name        string
		dsn         string // another address of the backend
		standbys    []string
		tools       []broker.Tool
		connections map[string]string
		ok          bool
		want        []string
	}{
		{"as it should be", "", []string{r.dsn()}, tools(few), url(t.server.Address(), t.name), true, []string{
			"max_connections 100, of which 3 are reserved", "room for 7 logins at a time with 10 connections each",
			"max_prepared_transactions is 5"}},
		{"another name in Vault", "", nil, tools(few), url("localhost:"+port, t.name), true, []string{"room for 7"}},
		{"too many connections", "", nil, tools(tool()), nil, false, []string{"can take every connection", "raise max_connections"}},
		{"a pooler in dsn", fixed.Address(), nil, tools(few), nil, false, []string{"dsn: " + fixed.Address() + " is PgBouncer"}},
		{"a pooler in Vault", "", nil, nil, url(fixed.Address(), t.name), false, []string{"database/shop: ", "is PgBouncer"}},
		{"another server in Vault", "", nil, nil, url(other.server.Address(), t.name), false,
			[]string{"database/shop must lead to the server of dsn"}},
		{"another database in Vault", "", nil, nil, url(t.server.Address(), "postgres"), false, []string{`in database "postgres"`}},
		{"nobody in Vault", "", nil, nil, url(closedPort(tt), t.name), false, []string{"does not answer"}},
		{"a tool at a standby", "", nil, tools(at), nil, false, []string{"tool db: the tool's host " + standby.Address() +
			" is a hot standby that the backend's standbys do not name: add it there"}},
	} {
		t.backend = t.newBackend(postgres.Config{CollectEvery: -1, Standbys: row.standbys})
		if row.dsn != "" {
			t.backend = t.backendAt(row.dsn)
		}
		found, err := t.backend.Examine(t.Context(), row.tools, row.connections)
		if err != nil {
			found = err.Error()
		}
		if (err == nil) != row.ok {
			t.Errorf("%s: Examine = %v, want ok %v", row.name, err, row.ok)
		}
		for _, want := range row.want {
			if !strings.Contains(found, want) {
				t.Errorf("%s: Examine = %q, %v, want %q", row.name, found, err, want)
			}
		}
	}
	for range 8 {
		if _, err := t.tryMintWith(few, newGrant(`{"tables":["orders"]}`)); err != nil {
			t.Fatal(err)
		}
	}
	t.backend = t.newBackend(postgres.Config{CollectEvery: -1})
	_, err := t.backend.Examine(t.Context(), tools(few), nil)
	if err == nil || !strings.Contains(err.Error(), "now 8 logins may open 80") {
		t.Errorf("Examine with 8 logins = %v, want a fault: they may take every connection", err)
	}
}
