package dev_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestSelfTestOfDatabase runs the self-test of a broker with real parts. Then the name of the database leads agents to
// PgBouncer with a fixed user, while the broker's own connections stay with the server.
func TestSelfTestOfDatabase(t *testing.T) {
	parts.NeedVault(t)
	parts.NeedPostgreSQL(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	e, err := dev.Start(ctx, dev.Config{External: true})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	pooler := parts.OwnPooler(t, parts.PoolerConfig{Program: "pgbouncer", FixedUser: true, Server: e.Postgres})
	permitSelfTest(t, e)
	var moved atomic.Bool
	name := forward(t, func() string {
		if moved.Load() {
			return pooler.Address()
		}
		return e.Postgres.Address()
	})
	config := e.Config
	shop := config.Backends["shop"]
	_, from, _ := strings.Cut(e.Postgres.Address(), ":")
	_, to, _ := strings.Cut(name, ":")
	shop.DSN = strings.Replace(shop.DSN, "port="+from, "port="+to, 1)
	config.Backends["shop"] = shop
	config.SelfTest = wire.SelfTest{Every: 10 * time.Second, Tool: "db.read", Args: map[string]any{"tables": []any{"orders"}}}
	lines := &buffer{}
	b, err := wire.Start(ctx, config, slog.New(slog.NewTextHandler(lines, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	lines.await(ctx, t, "self-test of revoking passed")
	moved.Store(true)
	lines.await(ctx, t, "which policy must permit: prepare: the host in dsn "+name+
		" leads to PgBouncer, which logs in as postgres for everyone; nothing was made")
}

// permitSelfTest signs the development policy anew, with a permit for the self-test.
func permitSelfTest(t *testing.T, e *dev.Env) {
	t.Helper()
	id, err := wire.SelfTester(e.Config)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(e.Dir, "policy")
	permit := `@id("self-test") permit (principal == Agent::"` + id.String() + `",
		action in [Action::"open", Action::"use"], resource == Tool::"db.read");`
	if err := os.WriteFile(filepath.Join(dir, "selftest.cedar"), []byte(permit), 0o600); err != nil {
		t.Fatal(err)
	}
	source, err := policy.Build(os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := policy.Sign(source, private)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(map[string]any{"keys": []any{public}})
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string][]byte{e.Config.Policy.Bundle: bundle, e.Config.Policy.Keys: keys} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
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

// buffer is a log. Safe for concurrent use.
type buffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (b *buffer) await(ctx context.Context, t *testing.T, text string) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !strings.Contains(b.String(), text) {
		select {
		case <-ctx.Done():
			t.Fatalf("the log has no %q:\n%s", text, b.String())
		case <-tick.C:
		}
	}
}
