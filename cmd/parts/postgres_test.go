package parts_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/pawlsec/pawl/cmd/parts"
)

func ping(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	return conn.Close(ctx)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// eventually polls until ok returns true.
func eventually(t *testing.T, condition string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("timed out waiting for: %s", condition)
		case <-tick.C:
		}
	}
}

func TestPostgreSQLKeepsDataAcrossStopAndKill(t *testing.T) {
	ctx, server := startContext(t), parts.OwnPostgreSQL(t, parts.PostgresConfig{MaxConnections: 1300, NoSync: true})
	dsn, err := server.CreateDatabase(ctx)
	if err != nil {
		t.Fatalf("CreateDatabase() = %v, want nil", err)
	}
	for _, end := range []struct {
		name string
		call func() error
	}{{"Stop", server.Stop}, {"Kill", server.Kill}} {
		if err := end.call(); err != nil {
			t.Fatalf("%s() = %v, want nil", end.name, err)
		}
		if reachable(server.Address()) {
			t.Errorf("%s answers after %s", server.Address(), end.name)
		}
		if err := server.Start(ctx); err != nil {
			t.Fatalf("Start() after %s = %v, want nil", end.name, err)
		}
		if err := ping(ctx, dsn); err != nil {
			t.Errorf("the database is missing after %s and Start", end.name)
		}
	}
	var limit string
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal("connecting failed")
	}
	defer func() { _ = conn.Close(ctx) }() // the cluster ends with the test
	if err := conn.QueryRow(ctx, "SHOW max_connections").Scan(&limit); err != nil || limit != "1300" {
		t.Errorf("max_connections = %q, %v, want 1300", limit, err)
	}
}

func TestPostgreSQLRequiresThePassword(t *testing.T) {
	ctx, server := startContext(t), parts.NeedPostgreSQL(t)
	if err := ping(ctx, server.DSNFor("postgres", "wrong", "postgres")); err == nil {
		t.Errorf("a wrong password is accepted over TCP")
	}
	if err := ping(ctx, "host="+server.SocketDir()+" user=postgres password=wrong port="+port(server.Address())); err == nil {
		t.Errorf("a wrong password is accepted over the socket")
	}
	if err := ping(ctx, "host="+server.SocketDir()+" user=postgres password="+server.Password()+" port="+port(server.Address())); err != nil {
		t.Errorf("the right password is refused over the socket")
	}
}
