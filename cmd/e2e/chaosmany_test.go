package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// longLife is the life of the secrets where ten thousand must be alive at once.
const longLife = 14 * time.Minute

// TestChaosVaultDownAmongMany revokes a chain with 300 logins (10,000 with -chaos) and kills Vault in the middle.
// Still, PostgreSQL refuses every login, nothing is called dead without proof, and the reported latest end is never
// too early. When Vault is back all are dead, without help.
func TestChaosVaultDownAmongMany(t *testing.T) {
	t.Parallel()
	need(t, true)
	many := 300
	if *everything {
		many = 10_000
	}
	env := newEnv(t, dev.Config{SVIDTTL: time.Hour})
	w := newWorld(t, env, func(c *wire.Config) { longLived(t, env, c) })
	kills, down := 0, make(chan error, 1)
	var mu sync.Mutex // guards kills
	w.here(nil, newFaults(func(point string) error {
		if actOf(point) == "kill" && placeOf(point) == "after kill" {
			mu.Lock()
			defer mu.Unlock()
			if kills++; kills == many/2 {
				down <- env.Vault.Kill()
			}
		}
		return nil
	}).install)
	began := time.Now()
	root, got := w.takeMany(many)
	t.Logf("%d logins after %v", many, time.Since(began).Round(time.Second))

	began = time.Now()
	rv, err := w.operator().Revoke(t.Context(), api.RevokeRequest{Selector: "chain:" + string(root.Info().Chain), Reason: "among many"})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("fenced after %v", time.Since(began).Round(time.Millisecond))
	if err := <-down; err != nil {
		t.Fatal(err)
	}
	w.whileDown(rv.ID, got)
	if err := env.Vault.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), longLife)
	defer cancel()
	if err := w.operator().Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil }); err != nil {
		t.Fatalf("following the revocation: %v; it is %+v", err, rv)
	}
	t.Logf("all dead %v after Vault came back", time.Since(back).Round(time.Millisecond))
	if rv.Closure != string(broker.ClosureClosed) || rv.Dead != rv.Grants || rv.Grants < many {
		t.Errorf("the revocation is %s with %d of %d dead, want CLOSED with all of at least %d", rv.Closure, rv.Dead, rv.Grants, many)
	}
	if now := w.oracle.left().without(w.before); !now.none() {
		t.Errorf("the revocation is CLOSED, but %d leases and %d roles remain", len(now.leases), len(now.roles))
	}
	if n := w.oracle.irrevocable(); n != "0" {
		t.Errorf("Vault has given up %s leases", n)
	}
}

// takeMany takes n steps of one chain in parallel and leaves them open.
func (w *world) takeMany(n int) (root *agent.Delegation, got []chaosLogin) {
	w.t.Helper()
	client := w.agent("planner")
	root, err := client.Open(w.t.Context(), agent.Chain{Task: "many", Rights: rights("db.read")})
	if err != nil {
		w.t.Fatal(err)
	}
	got = make([]chaosLogin, n)
	next := make(chan int)
	failed := make(chan error, 1)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for i := range next {
				s, l, err := take(w.t.Context(), root, 0)
				// A mint timed out here; the broker ends it.
				for again := 0; errors.Is(err, agent.ErrUnavailable) && again < 5; again++ {
					s, l, err = take(w.t.Context(), root, 0)
				}
				if err != nil {
					select {
					case failed <- err:
					default:
					}
					continue
				}
				got[i] = chaosLogin{login: l, end: s.Grant().Expires}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	all.Wait()
	select {
	case err := <-failed:
		w.t.Fatal(err)
	default:
	}
	return root, got
}

// whileDown polls a revocation while Vault is down, until PostgreSQL refuses every login, and a few times more.
func (w *world) whileDown(id string, got []chaosLogin) {
	w.t.Helper()
	ends := map[string]time.Time{} // by grant
	for _, l := range got {
		ends[grantOf(l.Username)] = l.end
	}
	sample := max(1, len(got)/50)
	looks := 0
	if !within(2*time.Minute, func() bool {
		rv, err := w.operator().Revocation(w.t.Context(), id)
		if err != nil {
			w.t.Fatal(err)
		}
		var last time.Time // the latest end of the open grants
		open := 0
		for _, g := range w.grants() {
			if g.State == string(broker.StateClosed) {
				continue
			}
			open++
			if ends[g.ID].After(last) {
				last = ends[g.ID]
			}
		}
		if rv.Closure == string(broker.ClosureClosed) || !rv.Settled.IsZero() || open == 0 || rv.Dead > rv.Grants-open {
			w.t.Fatalf("Vault is down, %d grants are open, and the revocation is %+v", open, rv)
		}
		if rv.LatestEnd.Before(last.Truncate(time.Second)) {
			w.t.Fatalf("the reported latest end is %v, but an open secret ends at %v", rv.LatestEnd, last)
		}
		for i := 0; i < len(got); i += sample {
			if w.oracle.works(got[i].login) {
				return false
			}
		}
		looks++
		return looks > 2
	}) {
		w.t.Error("logins work, although severing at PostgreSQL needs no Vault")
	}
}

// longLived raises the life of the environment's secrets, in Vault and in a new bundle.
func longLived(t *testing.T, env *dev.Env, c *wire.Config) {
	t.Helper()
	client, err := env.Vault.Client()
	if err != nil {
		t.Fatal(err)
	}
	role, err := client.Logical().Read("database/roles/pawl-db-read")
	if err != nil {
		t.Fatal(err)
	}
	role.Data["default_ttl"], role.Data["max_ttl"] = longLife.String(), longLife.String()
	if _, err := client.Logical().Write("database/roles/pawl-db-read", role.Data); err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{}
	dir := os.DirFS(filepath.Join(env.Dir, "policy"))
	if err := fs.WalkDir(dir, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := fs.ReadFile(dir, name)
		files[name] = &fstest.MapFile{Data: bytes.ReplaceAll(raw, []byte("ttl: 1m"), fmt.Appendf(nil, "ttl: %s", longLife))}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	c.Policy = sign(t, files)
}

// sign builds and signs an author's directory with a new key.
func sign(t *testing.T, dir fs.FS) (c wire.Policy) {
	t.Helper()
	source, err := policy.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := policy.Sign(source, private)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(map[string]any{"keys": []any{public}})
	if err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	c = wire.Policy{Bundle: filepath.Join(at, "policy.jws"), Keys: filepath.Join(at, "keys.json")}
	if err := errors.Join(os.WriteFile(c.Bundle, jws, 0o600), os.WriteFile(c.Keys, keys, 0o600)); err != nil {
		t.Fatal(err)
	}
	return c
}
