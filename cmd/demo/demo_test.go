package demo_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/cmd/demo"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// bound is the longest a demonstration may take after everything is built.
const bound = 30 * time.Second

// TestDemo plays the demonstration and reads its timeline. It checks the timeline's claims in Vault, in
// PostgreSQL and in this machine's list of processes.
func TestDemo(t *testing.T) {
	parts.NeedPostgreSQL(t)
	play(t, false, "chain_opened", "step_issued", "table_read", "other_table_refused", "write_refused", "step_closed",
		"delegated", "wider_refused", "replay_refused", "ten_live", "violation", "revoked", "session_cut",
		"agents_heard", "asked_again", "tried_again", "ledger", "vault_leases", "pg_roles")
}

// TestDemoWithoutPostgreSQL holds that the other scenes play without PostgreSQL.
func TestDemoWithoutPostgreSQL(t *testing.T) {
	play(t, true, "chain_opened", "delegated", "wider_refused", "replay_refused", "ten_live", "violation", "revoked",
		"agents_heard", "asked_again", "tried_again", "ledger", "vault_leases")
}

func play(t *testing.T, noPostgres bool, events ...string) {
	t.Helper()
	parts.NeedVault(t)
	path := filepath.Join(t.TempDir(), "timeline.json")
	before := descendants(t)
	var started []int
	began := time.Now()
	if err := demo.Run(t.Context(), demo.Config{Out: testWriter{t}, JSON: path, NoPostgres: noPostgres,
		Inspect: func(ctx context.Context, env *dev.Env) error {
			for _, pid := range descendants(t) {
				if !slices.Contains(before, pid) {
					started = append(started, pid)
				}
			}
			return inspect(ctx, env)
		}}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > bound {
		t.Errorf("the demonstration took %v, want less than %v", took, bound)
	}
	if len(started) == 0 {
		t.Error("the demonstration started no process")
	}
	for _, pid := range started {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d of the demonstration still runs", pid)
		}
	}
	read(t, path, events)
}

// read checks that the timeline has every event in order, and the revocation's figures.
func read(t *testing.T, path string, events []string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Events     []demo.Event
		AliveAfter *int `json:"alive_after"`
		Secrets    int
	}
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	var names []string
	last := int64(0)
	for _, e := range got.Events {
		if names = append(names, e.Name); e.AtMS < last {
			t.Errorf("%s is at %d ms, earlier than the event before it", e.Name, e.AtMS)
		}
		last = e.AtMS
		if e.Name != "revoked" {
			continue
		}
		if e.FencedMS == nil || e.DeadMS == nil || *e.DeadMS < *e.FencedMS ||
			e.Secrets == nil || *e.Secrets != 10 || e.AliveAfter == nil || *e.AliveAfter != 0 {
			t.Errorf("the revocation's event lacks figures, or has wrong ones: %s", raw)
		}
	}
	if !slices.Equal(names, events) {
		t.Errorf("events = %v, want %v", names, events)
	}
	if got.AliveAfter == nil || *got.AliveAfter != 0 || got.Secrets != 10 {
		t.Errorf("timeline = %s, want 10 secrets and none alive", raw)
	}
}

// inspect checks as root and superuser that Vault and PostgreSQL have no lease and no login left. Then it makes
// one of each, to prove that the check would find them.
func inspect(ctx context.Context, env *dev.Env) error {
	vault, err := env.Vault.Client()
	if err != nil {
		return err
	}
	found, err := leftovers(ctx, vault, env)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("leases or logins are left: %v", found)
	}
	made := 1
	if _, err := vault.Logical().WriteWithContext(ctx, "pki/issue/pawl-client",
		map[string]any{"common_name": "x.agents.pawl.dev"}); err != nil {
		return err
	}
	if env.Postgres != nil {
		made++
		conn, err := pgx.Connect(ctx, env.Database)
		if err != nil {
			return err
		}
		defer conn.Close(ctx) //nolint:errcheck // the role is committed by then
		if _, err := conn.Exec(ctx, `CREATE ROLE "pawl-grx" LOGIN VALID UNTIL 'tomorrow'`); err != nil {
			return err
		}
	}
	if found, err = leftovers(ctx, vault, env); err == nil && len(found) != made {
		err = fmt.Errorf("the check finds %v, want %d", found, made)
	}
	return err
}

// leftovers lists every lease of the engines and every temporary login, except the broker's own.
func leftovers(ctx context.Context, vault *api.Client, env *dev.Env) (found []string, err error) {
	for _, mount := range []string{"pki/", "database/"} {
		leases, err := list(ctx, vault, "sys/leases/lookup/"+mount)
		if err != nil {
			return nil, err
		}
		for _, lease := range leases {
			if !strings.Contains(lease, "/pawl-shaper/") && !strings.Contains(lease, "/pawl-revoker/") {
				found = append(found, lease)
			}
		}
	}
	if env.Postgres == nil {
		return found, nil
	}
	conn, err := pgx.Connect(ctx, env.Database)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx) //nolint:errcheck // only read
	rows, err := conn.Query(ctx, `SELECT r.rolname FROM pg_roles r WHERE r.rolcanlogin AND r.rolvaliduntil IS NOT NULL
		AND NOT EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
			WHERE m.member = r.oid AND g.rolname IN ('pawl_shaper', 'pawl_revoker'))
		UNION ALL SELECT usename FROM pg_stat_activity WHERE usename LIKE 'pawl-gr%'`)
	if err != nil {
		return nil, err
	}
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return append(found, roles...), err
}

func list(ctx context.Context, vault *api.Client, path string) (all []string, err error) {
	listed, err := vault.Logical().ListWithContext(ctx, path)
	if err != nil || listed == nil {
		return nil, err
	}
	keys, _ := listed.Data["keys"].([]any)
	for _, k := range keys {
		name := path + fmt.Sprint(k)
		if !strings.HasSuffix(name, "/") {
			all = append(all, name)
			continue
		}
		below, err := list(ctx, vault, name)
		if err != nil {
			return nil, err
		}
		all = append(all, below...)
	}
	return all, nil
}

// descendants lists the processes below this one.
func descendants(t *testing.T) (pids []int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil || len(stats) == 0 {
		parts.Without(t, "proc", "there is no /proc to find processes in")
	}
	parent := map[int]int{}
	for _, file := range stats {
		raw, err := os.ReadFile(file)
		if err != nil {
			continue // the process has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		_, rest, ok := strings.Cut(string(raw), ") ")
		fields := strings.Fields(rest)
		if err != nil || !ok || len(fields) < 2 {
			continue
		}
		if parent[pid], err = strconv.Atoi(fields[1]); err != nil {
			t.Fatal(err)
		}
	}
	for pid := range parent {
		for up := parent[pid]; up != 0; up = parent[up] {
			if up == os.Getpid() {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }
