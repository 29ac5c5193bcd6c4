package postgres_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// loseStandby names a synchronous standby that does not exist, and returns once the server's commits wait for it.
func (t *target) loseStandby() {
	t.Helper()
	t.exec("ALTER SYSTEM SET synchronous_standby_names = 'gone'")
	t.exec("SELECT pg_reload_conf()")
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for { // a commit from before the reload waits for no standby, so try again
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := t.root.Exec(ctx, "UPDATE items SET id = 0; INSERT INTO items VALUES (0)")
			done <- err
		}()
		for {
			if t.count("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") > 0 {
				cancel()
				<-done
				return
			}
			select {
			case <-tick.C:
				continue
			case <-done:
			}
			break
		}
		cancel()
	}
}

// TestLostStandby checks that ending a login does not wait for a synchronous standby. Before its commit is complete, no
// other transaction sees that the login ended.
func TestLostStandby(tt *testing.T) {
	t := targetOn(tt, parts.OwnPostgreSQL(tt, parts.PostgresConfig{
		NoSync: true, Settings: map[string]string{"synchronous_commit": "on"},
	}))
	mint := func() credential { return t.mint(`{"tables":["orders"]}`) }
	severed, ended, removed, old := mint(), mint(), mint(), mint()
	t.exec(`ALTER ROLE "` + old.User + `" VALID UNTIL '2020-01-01'`)
	if err := t.backend.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	conns := []*pgx.Conn{t.cursor(severed), t.cursor(ended), t.cursor(removed)}
	t.loseStandby()

	within := func(what string, f func(ctx context.Context) error) {
		t.Helper()
		t.within(5*time.Second, what+" without the standby", f)
	}
	within("Sever", func(ctx context.Context) error {
		return t.backend.Sever(ctx, []broker.Grant{severed.grant, newGrant(`{}`)})
	})
	within("end_logins", func(ctx context.Context) error {
		_, err := t.vault.Exec(ctx, "SELECT pawl.end_logins(ARRAY[$1])", ended.User)
		return err
	})
	within("Remove", func(ctx context.Context) error {
		return t.backend.Remove(ctx, []broker.GrantID{removed.grant.ID})
	})
	within("Collect", func(ctx context.Context) error { return t.backend.Collect(ctx, time.Hour) })
	within("grant_service_login and end_service_login", func(ctx context.Context) error {
		user, _, _, err := t.creds.Credential(ctx, postgres.Revoker)
		if err != nil {
			return err
		}
		_, err = t.vault.Exec(ctx, "SELECT pawl.end_service_login($1)", user)
		return err
	})
	within("a mint with a new shape", func(ctx context.Context) error {
		_, display, err := t.backend.Prepare(ctx, tool(), newGrant(`{"tables":["t1"]}`))
		if err != nil {
			return err
		}
		verifier, err := postgres.Verifier("some password")
		if err != nil {
			return err
		}
		_, err = t.vault.Exec(ctx, "SELECT pawl.grant_login($1, $2, now() + interval '1 minute')",
			"pawl-"+display+"-"+random8(), verifier)
		return err
	})
	for i, c := range []credential{severed, ended, removed} {
		if !t.refusesLogin(c) {
			t.Errorf("%s logs in after its end", c.User)
		}
		if !t.sessionEnded(conns[i]) {
			t.Errorf("the session of %s is open after its end", c.User)
		}
		if e := t.prove(c.grant)[0]; e.Outcome != broker.OutcomeDead {
			t.Errorf("Prove(%s) = %v %q, want dead", c.grant.ID, e.Outcome, e.Answer)
		}
	}
	if n := t.count("SELECT count(*) FROM pg_roles WHERE rolname = $1", old.User); n != 0 {
		t.Errorf("roles named %s after Collect = %d, want 0", strings.Split(old.User, "-")[1], n)
	}
}
