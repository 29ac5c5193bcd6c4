package postgres_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestPoolerInDSN puts each pooler between the broker and its server. Nothing may be minted, and nothing called dead.
func TestPoolerInDSN(tt *testing.T) {
	for name, row := range map[string]struct {
		config parts.PoolerConfig
		want   string
	}{
		"pgbouncer":                   {parts.PoolerConfig{Program: "pgbouncer"}, "PgBouncer"},
		"pgbouncer with a fixed user": {parts.PoolerConfig{Program: "pgbouncer", FixedUser: true}, "logs in as postgres"},
		"pgpool":                      {parts.PoolerConfig{Program: "pgpool"}, "pgpool"},
	} {
		tt.Run(name, func(tt *testing.T) {
			t := newTarget(tt)
			c := t.mint(`{"tables":["orders"],"verbs":["select"]}`)
			row.config.Server = t.server
			pooler := parts.OwnPooler(tt, row.config)
			direct := t.backend
			t.backend = t.backendAt(pooler.Address())
			_, err := t.tryMint(newGrant(`{"tables":["orders"],"verbs":["select"]}`))
			if broker.KindOf(err) != broker.Unavailable || !strings.Contains(fmt.Sprint(err), "pooler") {
				t.Errorf("a mint through %s = %v, want unavailable, with the pooler", name, err)
			}
			if row.config.FixedUser {
				t.readAll(row.config.Server.Address(), pooler.Address(), c)
			}
			t.sever(c.grant)
			if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeUnknown || !strings.Contains(e.Answer, row.want) {
				t.Errorf("Prove through %s = %v %q, want unknown, with %q", name, e.Outcome, e.Answer, row.want)
			}
			if _, err := t.backend.Find(t.Context()); err == nil {
				t.Errorf("Find through %s = nil, want an error", name)
			}
			if row.config.FixedUser { // after Sever as before
				t.readAll(row.config.Server.Address(), pooler.Address(), c)
			}
			t.backend = direct
			if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
				t.Errorf("Prove at the server after Sever through %s = %v %q, want dead", name, e.Outcome, e.Answer)
			}
		})
	}
}

// readAll reads a table beyond the step's through a pooler with a fixed user.
func (t *target) readAll(server, pooler string, c credential) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), strings.Replace(c.URL, server, pooler, 1))
	if err != nil {
		t.Fatalf("connecting through the pooler = %v", sqlState(err))
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "SELECT FROM salaries"); err != nil {
		t.Errorf("reading salaries through a pooler with a fixed user = %v, so this row checks nothing", sqlState(err))
	}
}

// forward accepts connections on a free port and forwards their bytes to an address, until the test ends.
func forward(t *testing.T, to func() string) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() }) // it was only listened to
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to())
			if err != nil {
				_ = client.Close()
				continue
			}
			for from, to := range map[net.Conn]net.Conn{client: server, server: client} {
				go func() {
					_, _ = io.Copy(to, from) // the other end sees the end, too
					_ = to.Close()
				}()
			}
		}
	}()
	return listener.Addr().String()
}

// TestForwarderInDSN checks that a forwarder of connections, which is no pooler, does not hinder the broker.
func TestForwarderInDSN(tt *testing.T) {
	t := newTarget(tt)
	t.backend = t.backendAt(forward(tt, t.server.Address))
	c := t.mint(`{"tables":["orders"]}`)
	t.sever(c.grant)
	if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
		t.Errorf("Prove through a forwarder = %v %q, want dead", e.Outcome, e.Answer)
	}
}

// backendAt returns a backend with another address of the server.
func (t *target) backendAt(address string) *postgres.Backend {
	t.Helper()
	return t.backendWith(address, nil)
}

func (t *target) backendWith(address string, now func() time.Time) *postgres.Backend {
	t.Helper()
	host, port, _ := strings.Cut(address, ":")
	b, err := postgres.New(postgres.Config{Credentials: t.creds, CollectEvery: -1, Now: now,
		DSN: fmt.Sprintf("host=%s port=%s dbname=%s sslmode=disable", host, port, t.name)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}
