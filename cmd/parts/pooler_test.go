package parts_test

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/cmd/parts"
)

// TestPoolers logs in to a server through each pooler, and reads as whom.
func TestPoolers(t *testing.T) {
	server := parts.NeedPostgreSQL(t)
	conn, err := pgx.Connect(t.Context(), server.DSN("postgres"))
	if err != nil {
		t.Fatal("connecting to PostgreSQL")
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "CREATE ROLE pooled LOGIN PASSWORD 'of a test'"); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = conn.Exec(t.Context(), "DROP ROLE pooled") }() // the server ends with the tests
	for name, row := range map[string]struct {
		config parts.PoolerConfig
		want   string
	}{
		"pgbouncer":                   {parts.PoolerConfig{Program: "pgbouncer"}, "pooled"},
		"pgbouncer with a fixed user": {parts.PoolerConfig{Program: "pgbouncer", FixedUser: true}, "postgres"},
		"pgpool":                      {parts.PoolerConfig{Program: "pgpool"}, "pooled"},
	} {
		t.Run(name, func(t *testing.T) {
			row.config.Server = server
			pooler := parts.OwnPooler(t, row.config)
			config, err := pgx.ParseConfig(pooler.DSNFor("pooled", "of a test", "postgres"))
			if err != nil {
				t.Fatal("a DSN does not parse")
			}
			config.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
			through, err := pgx.ConnectConfig(t.Context(), config)
			if err != nil {
				t.Fatalf("connecting through %s = %v\n%s", name, err, pooler.Log())
			}
			defer through.Close(t.Context())
			var user string
			if err := through.QueryRow(t.Context(), "SELECT session_user").Scan(&user); err != nil || user != row.want {
				t.Errorf("session_user through %s = %q, %v, want %q", name, user, err, row.want)
			}
		})
	}
}
