package postgres_test

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
)

// from logs in with the raw secret from an address of this machine, or over the Unix socket if address is empty.
func (t *target) from(address string, c credential) (*pgx.Conn, error) {
	t.Helper()
	cfg, err := pgx.ParseConfig(c.URL)
	if err != nil {
		t.Fatal("the secret's URL does not parse")
	}
	if address == "" {
		cfg.Host = t.server.SocketDir()
		return pgx.ConnectConfig(t.Context(), cfg)
	}
	cfg.DialFunc = func(ctx context.Context, network, to string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
		return d.DialContext(ctx, network, to)
	}
	return pgx.ConnectConfig(t.Context(), cfg)
}

// hba writes pg_hba.conf with the given lines first and makes the server reload it.
func (t *target) hba(rest string, lines ...string) {
	t.Helper()
	var file string
	if err := t.root.QueryRow(t.Context(), "SHOW hba_file").Scan(&file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"+rest), 0o600); err != nil {
		t.Fatal(err)
	}
	t.exec("SELECT pg_reload_conf()")
}

// TestNetwork checks that PostgreSQL enforces a tool's network: it refuses the raw secret from every other address. If
// pg_hba.conf does not confine the network, no secret is minted.
func TestNetwork(tt *testing.T) {
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{NoSync: true}))
	var file string
	if err := t.root.QueryRow(t.Context(), "SELECT pg_read_file(current_setting('hba_file'))").Scan(&file); err != nil {
		t.Fatal(err)
	}
	tool := tool()
	tool.Settings["network"] = "office"
	mint := func(args string) (credential, error) {
		t.backend = t.newBackend(configNow(nil)) // with an empty cache of shapes
		return t.tryMintWith(tool, newGrant(args))
	}
	const (
		allow  = "host all +pawl_net_office 127.0.0.2/32 scram-sha-256"
		others = "host all +pawl_net_office all reject"
		socket = "local all +pawl_net_office reject"
		first  = "host all all 127.0.0.1/32 scram-sha-256"
	)
	for fault, lines := range map[string][]string{
		"no line":          nil,
		"no reject line":   {allow},
		"the socket open":  {allow, others},
		"only the socket":  {allow, socket},
		"another network":  {allow, strings.Replace(others, "office", "office2", 1), socket},
		"reject too late":  {first, allow, others, socket},
		"reject in part":   {allow, strings.Replace(others, "all reject", "10.0.0.0/8 reject", 1), socket},
		"another database": {allow, strings.Replace(others, "host all", "host postgres", 1), socket},
		"a malformed line": {allow, others, socket, "host nonsense"},
	} {
		t.hba(file, lines...)
		if _, err := mint(`{"tables":["orders"]}`); broker.KindOf(err) != broker.Denied {
			t.Errorf("%s: minting = %v, want denied", fault, err)
		}
	}
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'pawl\\_net\\_%'"); n != 0 {
		t.Errorf("networks after refusals = %d, want 0", n)
	}
	t.hba(file, allow, others, socket)
	for _, args := range []string{
		`{"tables":["orders"]}`, `{"tables":["orders"],"filter_column":"customer","filter_value":"1"}`,
	} {
		c, err := mint(args)
		if err != nil {
			t.Fatalf("minting for %s = %v", args, err)
		}
		for _, address := range []string{"127.0.0.1", "127.0.0.3", ""} {
			if conn, err := t.from(address, c); sqlState(err) != "28000" {
				t.Errorf("logging in from %q = %v, %v, want 28000", address, conn != nil, sqlState(err))
			}
		}
		conn, err := t.from("127.0.0.2", c)
		if err != nil {
			t.Fatalf("logging in from the network = %v", sqlState(err))
		}
		defer conn.Close(t.Context())
		if _, err := conn.Exec(t.Context(), "SELECT * FROM orders"); err != nil {
			t.Errorf("SELECT from the network = %v, want nil", sqlState(err))
		}
		for _, sql := range []string{
			`SET ROLE pawl_maker`, `GRANT pawl_net_office TO PUBLIC`, `REVOKE pawl_net_office FROM CURRENT_USER`,
		} {
			if _, err := conn.Exec(t.Context(), sql); err == nil {
				t.Errorf("%s = nil, want an error", sql)
			}
		}
		// A login without a network may come from every address that pg_hba.conf allows.
		free, err := t.tryMint(newGrant(args))
		if err != nil {
			t.Fatal(err)
		}
		if conn, err := t.from("127.0.0.1", free); err != nil {
			t.Errorf("logging in without a network = %v, want nil", sqlState(err))
		} else {
			_ = conn.Close(t.Context())
		}
		t.sever(c.grant, free.grant)
		if _, err := t.from("127.0.0.2", c); !strings.HasPrefix(sqlState(err), "28") {
			t.Errorf("logging in from the network after Sever = %v, want class 28", sqlState(err))
		}
	}
	t.collectNetwork()
}

// collectNetwork checks that collect removes a network after its last shape, and not before.
func (t *target) collectNetwork() {
	t.Helper()
	revoker := t.as("revoker")
	networks := func(want int) {
		t.Helper()
		if _, err := revoker.Exec(t.Context(), "SELECT pawl.collect('1 hour')"); err != nil {
			t.Fatalf("collect = %v", sqlState(err))
		}
		if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = 'pawl_net_office'"); n != want {
			t.Errorf("networks = %d, want %d", n, want)
		}
	}
	networks(1)
	t.exec("UPDATE pawl.shapes SET last_used = now() - interval '2 hours'")
	networks(0)
}
