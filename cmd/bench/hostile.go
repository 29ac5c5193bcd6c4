package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/cmd/bench/report"
)

// innocents is how many logins, each with an open session, are ended beside a hostile one.
const innocents = 40

// hostility is what a hostile agent does in its own session: statements, in which INNOCENT is the login of another
// agent and ITSELF its own.
type hostility struct {
	name       string
	statements []string
	again      bool // it logs in again whenever it is ended, on four connections
}

var hostilities = []hostility{
	{name: "alter_role", statements: []string{"BEGIN", "ALTER ROLE CURRENT_USER PASSWORD 'x'"}},
	{name: "alter_role_again", statements: []string{"BEGIN"}, again: true},
	{name: "prepared_transaction",
		statements: []string{"BEGIN", "ALTER ROLE CURRENT_USER PASSWORD 'x'", "PREPARE TRANSACTION 'ITSELF'"}},
	{name: "large_objects", statements: []string{"SELECT count(lo_create(0)) FROM generate_series(1, 60000)"}},
	{name: "advisory_lock", statements: []string{"SELECT pg_advisory_lock(hashtext('pawl.shapes'))"}},
	{name: "grant",
		statements: []string{"CREATE TEMP TABLE mine (id int)", "BEGIN", `GRANT SELECT ON mine TO "INNOCENT"`}},
}

// measureHostile ends forty logins beside a hostile one and without it, in turns.
func measureHostile(ctx context.Context, b *bench) error {
	if b.world.env.Postgres == nil {
		return errNoPostgres
	}
	if err := b.world.superuser(ctx, "GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC"); err != nil {
		return err
	}
	for _, h := range hostilities {
		err := errLate
		if !b.late(20 * time.Second) {
			err = b.hostile(ctx, h)
		}
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			b.report.LeaveOut("hostile."+h.name, err)
		}
	}
	return nil
}

func (b *bench) hostile(ctx context.Context, h hostility) error {
	var dead, without, closed report.Samples
	for range pick(b, 5, 3) {
		alone, _, err := b.endBeside(ctx, nil)
		if err != nil {
			return err
		}
		beside, command, err := b.endBeside(ctx, &h)
		if err != nil {
			return err
		}
		without, dead, closed = append(without, alone.Seconds()), append(dead, beside.Seconds()),
			append(closed, command.Seconds())
	}
	b.report.Add(report.Row{Name: "hostile." + h.name + ".seconds", Unit: "s", N: innocents * len(dead),
		Against: "the same without the hostile login", Note: "until 40 innocent logins and their sessions are dead"}, dead, without)
	b.report.Add(report.Row{Name: "hostile." + h.name + ".closed_seconds", Unit: "s", N: len(closed),
		Note: "until the hostile login is proven dead, too"}, closed, nil)
	return nil
}

// endBeside ends forty logins with a session each, and with them a hostile one. It returns the time until the forty
// were dead, and until the revocation was CLOSED.
func (b *bench) endBeside(ctx context.Context, h *hostility) (dead, closed time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	w := b.world
	if err := w.vacuum(ctx); err != nil {
		return 0, 0, err
	}
	logins, revoke, err := issueOurs(ctx, w, innocents+1)
	defer func() { hangUp(logins) }()
	if err != nil {
		return 0, 0, err
	}
	if err := each(8, len(logins), func(i int) error { return logins[i].enter(ctx, w) }); err != nil {
		return 0, 0, err
	}
	if h != nil {
		stop, err := h.begin(ctx, w, logins[0], logins[1])
		defer stop()
		if err != nil {
			return 0, 0, err
		}
	}
	others := logins[1:]
	o, err := newObserver(ctx, w, others)
	if err != nil {
		return 0, 0, err
	}
	defer o.close()
	began := time.Now()
	var command errgroup.Group
	command.Go(func() error {
		err := revoke(ctx)
		closed = time.Since(began)
		return err
	})
	seen, err := o.untilDead(ctx)
	if err := errors.Join(err, command.Wait()); err != nil {
		return 0, 0, err
	}
	if seen.left > 0 {
		return 0, 0, fmt.Errorf("%d sessions of innocent logins stayed open", seen.left)
	}
	return seen.dead.Sub(began), closed, confirm(ctx, w, logins, 0)
}

// begin makes a login hostile. stop waits for its connections.
func (h *hostility) begin(ctx context.Context, w *world, hostile, innocent login) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	var connections errgroup.Group
	stop = func() { cancel(); _ = connections.Wait() } // it returns nil
	names := strings.NewReplacer("INNOCENT", innocent.username, "ITSELF", hostile.username)
	for _, sql := range append([]string{"ROLLBACK", "SET idle_in_transaction_session_timeout = 0"}, h.statements...) {
		if _, err := hostile.session.Exec(ctx, names.Replace(sql), pgx.QueryExecModeSimpleProtocol); err != nil {
			return stop, fmt.Errorf("being hostile by %s: %w", h.name, err)
		}
	}
	if !h.again {
		return stop, nil
	}
	for range 4 {
		connections.Go(func() error {
			for ctx.Err() == nil {
				conn, err := pgx.Connect(ctx, w.env.Postgres.DSNFor(hostile.username, hostile.password, w.database()))
				if err != nil {
					continue
				}
				_, _ = conn.Exec(ctx, "BEGIN; ALTER ROLE CURRENT_USER PASSWORD '"+hostile.password+"'")
				_ = conn.PgConn().WaitForNotification(ctx) // until it is ended
				_ = conn.Close(context.WithoutCancel(ctx))
			}
			return nil
		})
	}
	return stop, nil
}
