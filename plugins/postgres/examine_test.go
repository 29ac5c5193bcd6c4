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

// TestExamineFailover has a DSN of two servers, and Vault's connection names one of them or does not ask for the primary.
func TestExamineFailover(tt *testing.T) {
	r := newReplica(tt)
	_, first, _ := strings.Cut(r.server.Address(), ":")
	_, second, _ := strings.Cut(r.standby.Address(), ":")
	backend, err := postgres.New(postgres.Config{Credentials: r.creds, CollectEvery: -1,
		DSN: fmt.Sprintf("host=127.0.0.1,127.0.0.1 port=%s,%s dbname=%s sslmode=disable", first, second, r.name)})
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(backend.Close)
	both, one := r.server.Address()+","+r.standby.Address(), r.server.Address()
	for at, ok := range map[string]bool{
		one + "/%s?sslmode=disable":                                  false,
		both + "/%s?sslmode=disable":                                 false,
		both + "/%s?sslmode=disable&target_session_attrs=read-write": true,
		"localhost:" + first + "/%s?sslmode=disable":                 true, // it may lead to the primary by itself
	} {
		_, err := backend.Examine(r.Context(), nil, map[string]string{
			"database/shop": "postgresql://{{username}}:{{password}}@" + fmt.Sprintf(at, r.name)})
		if (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "target_session_attrs=read-write") {
			r.Errorf("Examine with Vault's connection to %s = %v, want ok %v", at, err, ok)
		}
	}
}
