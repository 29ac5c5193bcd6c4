package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/dev"
)

// measureAlone ends forty logins while the synchronous standby of their database is gone and Vault is paused.
func measureAlone(ctx context.Context, b *bench) error {
	for _, a := range []struct {
		name, note string
		full       bool
	}{
		{"alone.room.seconds", "", false},
		{"alone.full.seconds", ", and with all connections of the server held by agents", true},
	} {
		if b.late(30 * time.Second) {
			return errLate
		}
		var dead report.Samples
		for range pick(b, 3, 1) {
			took, err := b.alone(ctx, a.full)
			if err != nil {
				return fmt.Errorf("%s: %w", a.name, err)
			}
			dead = append(dead, took.Seconds())
		}
		b.report.Add(report.Row{Name: a.name, Unit: "s", N: innocents * len(dead),
			Note: "from the acknowledgement until no login and no session works, without the synchronous standby and " +
				"without Vault" + a.note}, dead, nil)
	}
	return nil
}

// alone returns the time from the acknowledgement until no login and no session worked.
func (b *bench) alone(ctx context.Context, full bool) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	dir := filepath.Join(b.dir, "alone")
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return 0, err
	}
	w, err := openWorld(ctx, b, dir, dev.Config{MaxConnections: 60,
		PostgresSettings: map[string]string{"synchronous_commit": "on"}}, noLimits)
	defer w.close()
	if err != nil {
		return 0, err
	}
	if w.env.Postgres == nil {
		return 0, errNoPostgres
	}
	standby, err := w.env.Postgres.Standby(ctx)
	if err != nil {
		return 0, err
	}
	defer standby.Close() //nolint:errcheck // its data is not needed
	if err := w.superuser(ctx, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"); err != nil {
		return 0, err
	}
	logins, fence, err := takeOurs(ctx, w, innocents)
	defer func() { hangUp(logins) }()
	if err != nil {
		return 0, err
	}
	if err := each(8, len(logins), func(i int) error { return logins[i].enter(ctx, w) }); err != nil {
		return 0, err
	}
	o, err := newObserver(ctx, w, logins)
	if err != nil {
		return 0, err
	}
	defer o.close()
	for i := 0; full; i++ {
		more := login{username: logins[i%innocents].username, password: logins[i%innocents].password}
		more.session, err = pgx.Connect(ctx, w.env.Postgres.DSNFor(more.username, more.password, w.database()))
		if refusal := new(pgconn.PgError); errors.As(err, &refusal) && refusal.Code == "53300" {
			break
		}
		if err != nil {
			return 0, errors.New("a login that was just made does not work") // pgx's text quotes the DSN
		}
		logins = append(logins, more)
	}
	if err := errors.Join(standby.Kill(), w.env.Vault.Pause()); err != nil {
		return 0, err
	}
	if _, err := fence(ctx); err != nil {
		return 0, err
	}
	acknowledged := time.Now()
	seen, err := o.untilDead(ctx)
	if err == nil && seen.left > 0 {
		err = fmt.Errorf("%d sessions stayed open", seen.left)
	}
	if err != nil {
		return 0, err
	}
	return seen.dead.Sub(acknowledged), confirm(ctx, w, logins[:innocents], 0)
}
