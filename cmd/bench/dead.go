package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/bench/plain"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// login is a live database credential. Up to [most] of them have an open session that reads through a cursor.
type login struct {
	username, password string
	session            *pgx.Conn
}

// way is one way to end many credentials at once.
type way struct {
	name  string
	label string // of the row that compares ours with it; empty: it is ours
	// issue makes n credentials and returns the one command that ends them all.
	issue func(ctx context.Context, w *world, n int) (logins []login, end func(context.Context) error, err error)
}

var ways = []way{
	{"pawl", "", issueOurs},
	{"vault token revoke, best statements", "vs_vault_best", issueUnderToken("best")},
	{"a superuser's NOLOGIN and pg_terminate_backend, one statement each, and nothing else", "vs_floor", issueForFloor},
	{"vault revoke-prefix, best statements", "vs_revoke_prefix", issueForPrefix},
	{"vault lease by lease, best statements", "vs_lease_by_lease", issueForLeases},
	{"vault token revoke, default statements", "vs_vault_token", issueUnderToken("default")}, // last: it may still run after its timeout
}

// most is the largest number of credentials that each get an open session.
const most = 1000

// measureDead ends n credentials in each way, in turns. It times from the command until an observer that belongs
// to neither side sees them all dead.
func measureDead(ctx context.Context, b *bench) error {
	if b.world.env.Postgres == nil {
		return errNoPostgres
	}
	for _, n := range pick(b, []int{1, 10, 100, 1000}, []int{1, 10, 100}) {
		if !b.wants(fmt.Sprintf("dead.postgres.%d.", n)) {
			continue
		}
		err := errLate
		if !b.late(time.Duration(n) * 60 * time.Millisecond) {
			err = b.dead(ctx, n)
		}
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			b.report.LeaveOut(fmt.Sprintf("dead.postgres.%d", n), err)
		}
	}
	return nil
}

// measureDeadMany is measureDead for ten thousand credentials, or a thousand in a quick run. It takes as long as
// all other sections together.
func measureDeadMany(ctx context.Context, b *bench) error {
	if b.world.env.Postgres == nil {
		return errNoPostgres
	}
	n := pick(b, 10_000, 1000)
	if !b.wants(fmt.Sprintf("dead.postgres.%d.", n)) {
		return nil
	}
	if b.late(time.Duration(n) * 45 * time.Millisecond) {
		return errLate
	}
	return b.dead(ctx, n)
}

// rounds gives the number of rounds: fewer where one takes longer.
func (b *bench) rounds(n int) int {
	switch {
	case n >= 10_000 || b.quick && n >= 100:
		return 1
	case n >= 1000 || b.quick:
		return 3
	}
	return 5
}

// dead ends n credentials in each way, round by round. A way of theirs that fails is left out. If ours fails, there
// is nothing to report.
func (b *bench) dead(ctx context.Context, n int) error {
	seen := make([]deaths, len(ways))
	for range b.rounds(n) {
		for i, way := range ways {
			if seen[i].failed || !b.takes(way, n) {
				continue
			}
			d, err := b.end(ctx, way, n)
			switch {
			case err != nil && way.label == "":
				return err
			case err != nil:
				seen[i].failed = true
				b.report.LeaveOut(fmt.Sprintf("dead.postgres.%d.%s", n, way.label), err)
			default:
				seen[i].refused = append(seen[i].refused, d.refused.Seconds())
				seen[i].dead = append(seen[i].dead, d.dead.Seconds())
				seen[i].command = append(seen[i].command, d.command.Seconds())
				seen[i].removed = append(seen[i].removed, d.removed.Seconds())
				seen[i].left = max(seen[i].left, d.sessions)
			}
		}
	}
	b.reportDead(n, seen)
	return nil
}

// takes reports whether n credentials are ended in a way: of many only ours and one of theirs, because the rest takes
// minutes. A quick run takes the floor, which has a bound.
func (b *bench) takes(way way, n int) bool {
	switch {
	case way.label == "":
		return true
	case len(b.rows) > 0:
		return b.wants(fmt.Sprintf("dead.postgres.%d.%s", n, way.label))
	case n > most:
		return way.label == "vs_vault_best"
	case b.quick && n >= 1000:
		return way.label == "vs_floor"
	}
	return true
}

// deaths are the rounds of one way.
type deaths struct {
	refused, dead, command report.Samples // in seconds
	removed                report.Samples // in seconds; ours alone
	left                   int            // sessions that were not ended
	failed                 bool
}

func (b *bench) reportDead(n int, seen []deaths) {
	name, ours := fmt.Sprintf("dead.postgres.%d.", n), seen[0]
	note := "each with an open session and cursor"
	if n > most {
		note = "without sessions: PostgreSQL would have to take as many connections"
	}
	b.report.Add(report.Row{Name: name + "seconds", Unit: "s", N: n * len(ours.dead), Against: ways[1].name, Note: note},
		ours.dead, seen[1].dead)
	b.report.Add(report.Row{Name: name + "refused_seconds", Unit: "s", N: n * len(ours.refused), Against: ways[1].name,
		Note: "until the last login is refused and, with ours, the last right is removed"}, ours.refused, seen[1].refused)
	b.report.Add(report.Row{Name: name + "closed_seconds", Unit: "s", N: n * len(ours.command),
		Against: "the time until all are dead, of the same turns",
		Note:    "until the broker has evidence for each and calls the revocation CLOSED"}, ours.command, ours.dead)
	b.report.Add(report.Row{Name: name + "removed_seconds", Unit: "s", N: n * len(ours.removed),
		Note: "until Vault has removed the last lease, which nothing waits for"}, ours.removed, nil)
	for i, way := range ways {
		if way.label == "" || len(seen[i].dead) == 0 {
			continue
		}
		more := note
		if seen[i].left > 0 {
			more += fmt.Sprintf("; theirs left %d sessions open and reading, so it is timed to the end of the logins alone", seen[i].left)
		}
		b.report.Add(report.Row{Name: name + way.label, Unit: "s", N: n * len(ours.dead), Against: way.name, Note: more},
			ours.dead, seen[i].dead)
	}
}

// death is one observation of the observer.
type death struct {
	refused  time.Duration // until every login was refused
	dead     time.Duration // until no login and, unless sessions were left, no session existed
	command  time.Duration // until the command returned, with everything that it waits for
	removed  time.Duration // ours: until Vault has removed the last lease
	sessions int           // that stayed open after the logins were gone
}

// end makes credentials, ends them and observes.
func (b *bench) end(ctx context.Context, way way, n int) (d death, err error) {
	patience := 12 * time.Minute
	if b.quick {
		patience = min(patience, quickTime-time.Since(b.report.Began))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errLate)
	defer cancel()
	w := b.world
	if err := w.vacuum(ctx); err != nil {
		return d, err
	}
	logins, command, err := way.issue(ctx, w, n)
	defer func() { hangUp(logins) }()
	if err != nil {
		return d, fmt.Errorf("making %d credentials: %w", n, err)
	}
	if n <= most {
		if err := each(8, n, func(i int) error { return logins[i].enter(ctx, w) }); err != nil {
			return d, fmt.Errorf("opening sessions: %w", err)
		}
	}
	o, err := newObserver(ctx, w, logins)
	if err != nil {
		return d, err
	}
	defer o.close()
	var commanded sync.WaitGroup
	var commandErr error
	began := time.Now()
	commanded.Go(func() {
		commandErr = command(ctx)
		d.command = time.Since(began)
	})
	seen, err := o.untilDead(ctx)
	commanded.Wait()
	if err := errors.Join(err, commandErr); err != nil {
		return d, err
	}
	d.refused, d.dead, d.sessions = seen.refused.Sub(began), seen.dead.Sub(began), seen.left
	if err := confirm(ctx, w, logins, seen.left); err != nil || way.label != "" {
		return d, err
	}
	err = w.direct.NoLeases(ctx, oursPath) // otherwise Vault would be at work in the next way
	d.removed = time.Since(began)
	return d, err
}

// oursPath is the Vault path of db.read.
const oursPath = "database/creds/pawl-bench-read"

// vacuum removes the dead rows that the previous way left in the catalogs. Vault's default statements write a row
// for each table and login, and the next way would be slower for them.
func (w *world) vacuum(ctx context.Context) error {
	return w.superuser(ctx, "VACUUM")
}

// enter opens a session and a cursor in it.
func (l *login) enter(ctx context.Context, w *world) (err error) {
	if l.session, err = pgx.Connect(ctx, w.env.Postgres.DSNFor(l.username, l.password, w.database())); err != nil {
		return errors.New("a login that was just made does not work") // pgx's text quotes the DSN
	}
	_, err = l.session.Exec(ctx, "BEGIN; DECLARE c CURSOR FOR SELECT * FROM orders; FETCH 1 FROM c")
	return err
}

func hangUp(logins []login) {
	_ = each(16, len(logins), func(i int) error {
		if s := logins[i].session; s != nil {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_ = s.Close(ctx) // it is dead, or no longer needed
		}
		return nil
	})
}

// confirm tries credentials that the observer called dead: the cursors of some sessions, and some logins.
func confirm(ctx context.Context, w *world, logins []login, sessions int) error {
	step := max(1, len(logins)/50)
	for i := 0; i < len(logins); i += step {
		l := logins[i]
		if l.session != nil && sessions == 0 {
			if _, err := l.session.Exec(ctx, "FETCH 1 FROM c"); err == nil {
				return errors.New("a cursor still reads although the observer saw no session")
			}
		}
		if conn, err := pgx.Connect(ctx, w.env.Postgres.DSNFor(l.username, l.password, w.database())); err == nil {
			return errors.Join(errors.New("a login works although the observer saw none"), conn.Close(ctx))
		}
	}
	return nil
}

// issueOurs takes n steps under one chain. The command revokes the chain.
func issueOurs(ctx context.Context, w *world, n int) (logins []login, end func(context.Context) error, err error) {
	logins, fence, err := takeOurs(ctx, w, n)
	return logins, func(ctx context.Context) error {
		id, err := fence(ctx)
		if err != nil {
			return err
		}
		return w.settled(ctx, id)
	}, err
}

// takeOurs takes n steps under one chain. fence revokes the chain, and returns when that is acknowledged.
func takeOurs(
	ctx context.Context, w *world, n int,
) (logins []login, fence func(context.Context) (string, error), err error) {
	client, err := w.agent("bench-dead")
	if err != nil {
		return nil, nil, err
	}
	d, err := client.Open(ctx, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		return nil, nil, errors.Join(err, client.Close())
	}
	logins = make([]login, n)
	err = each(16, n, func(i int) error {
		s, err := d.Begin(ctx, agent.Call{Tool: "db.read", Args: agent.Args{"tables": []string{"orders"}}})
		if err == nil {
			logins[i].username, logins[i].password = s.Secret().Field("username"), s.Secret().Field("password")
		}
		return err
	})
	return logins, func(ctx context.Context) (string, error) {
		defer client.Close() //nolint:errcheck // it always succeeds
		rv, err := w.operator.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "bench"})
		return rv.ID, err
	}, err
}

// issueUnderToken makes credentials of a role with one token. The command revokes the token.
func issueUnderToken(role string) func(context.Context, *world, int) ([]login, func(context.Context) error, error) {
	return func(ctx context.Context, w *world, n int) ([]login, func(context.Context) error, error) {
		logins, _, accessor, err := credentials(ctx, w.direct, role, n)
		return logins, func(ctx context.Context) error {
			_, err := w.direct.Ask(ctx, "POST", "auth/token/revoke-accessor", map[string]any{"accessor": accessor})
			return err
		}, err
	}
}

func issueForPrefix(ctx context.Context, w *world, n int) ([]login, func(context.Context) error, error) {
	logins, _, _, err := credentials(ctx, w.direct, "best", n)
	return logins, func(ctx context.Context) error {
		_, err := w.direct.Ask(ctx, "POST", "sys/leases/revoke-prefix/plain/creds/best", map[string]any{"sync": true})
		return err
	}, err
}

func issueForLeases(ctx context.Context, w *world, n int) ([]login, func(context.Context) error, error) {
	logins, leases, _, err := credentials(ctx, w.direct, "best", n)
	return logins, func(ctx context.Context) error {
		return each(16, n, func(i int) error {
			_, err := w.direct.Ask(ctx, "POST", "sys/leases/revoke", map[string]any{"lease_id": leases[i], "sync": true})
			return err
		})
	}, err
}

// issueForFloor ends logins as fast as this PostgreSQL can: the time that remains is the time that its processes
// take to end. Afterwards Vault revokes its own leases.
func issueForFloor(ctx context.Context, w *world, n int) ([]login, func(context.Context) error, error) {
	logins, _, accessor, err := credentials(ctx, w.direct, "best", n)
	if err != nil {
		return nil, nil, err
	}
	conn, err := pgx.Connect(ctx, w.env.Database)
	if err != nil {
		return logins, nil, err
	}
	names := make([]string, n)
	var refuse strings.Builder
	for i, l := range logins {
		names[i] = l.username
		fmt.Fprintf(&refuse, "ALTER ROLE %s NOLOGIN;", pgx.Identifier{l.username}.Sanitize())
	}
	return logins, func(ctx context.Context) error {
		defer conn.Close(ctx) //nolint:errcheck // the work is committed by then
		if _, err := conn.Exec(ctx, refuse.String()); err != nil {
			return err
		}
		if _, err := conn.Exec(ctx, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = ANY($1)", names); err != nil {
			return err
		}
		if _, err := w.direct.Ask(ctx, "POST", "auth/token/revoke-accessor", map[string]any{"accessor": accessor}); err != nil {
			return err
		}
		return w.direct.NoLeases(ctx, "plain/creds/best")
	}, nil
}

// credentials makes n database credentials below one token.
func credentials(ctx context.Context, c *plain.Vault, role string, n int) (logins []login, leases []string, accessor string, err error) {
	token, accessor, err := c.Child(ctx)
	if err != nil {
		return nil, nil, "", err
	}
	mine := c.As(token)
	defer mine.Close()
	logins, leases = make([]login, n), make([]string, n)
	err = each(16, n, func(i int) error {
		a, err := mine.Ask(ctx, "GET", "plain/creds/"+role, nil)
		logins[i].username, logins[i].password, leases[i] = a.Text("username"), a.Text("password"), a.LeaseID
		return err
	})
	return logins, leases, accessor, err
}
