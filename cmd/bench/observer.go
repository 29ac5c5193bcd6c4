package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// observer looks at the database over the superuser's connection. It knows roles by their oid,
// since a session outlives the name of its role.
type observer struct {
	conn *pgx.Conn
	oids []uint32
}

func newObserver(ctx context.Context, w *world, logins []login) (*observer, error) {
	conn, err := pgx.Connect(ctx, w.env.Database)
	if err != nil {
		return nil, err
	}
	o := &observer{conn: conn}
	names := make([]string, len(logins))
	for i, l := range logins {
		names[i] = l.username
	}
	rows, err := conn.Query(ctx, "SELECT oid FROM pg_roles WHERE rolname = ANY($1)", names)
	if err == nil {
		o.oids, err = pgx.CollectRows(rows, pgx.RowTo[uint32])
	}
	if err == nil && len(o.oids) != len(logins) {
		err = fmt.Errorf("of %d credentials the database knows %d", len(logins), len(o.oids))
	}
	if err != nil {
		o.close()
		return nil, err
	}
	return o, nil
}

func (o *observer) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = o.conn.Close(ctx) // it only looked
}

// look counts the roles that may log in and the sessions.
func (o *observer) look(ctx context.Context) (logins, sessions int, err error) {
	err = o.conn.QueryRow(ctx, `SELECT (SELECT count(*) FROM pg_authid WHERE oid = ANY($1) AND rolcanlogin),
		(SELECT count(*) FROM pg_stat_activity WHERE usesysid = ANY($1))`, o.oids).Scan(&logins, &sessions)
	return logins, sessions, err
}

// sight is when an observer saw what.
type sight struct {
	refused time.Time // no role could log in any more
	dead    time.Time // and no session was there
	left    int       // sessions that stayed
}

// untilDead looks again and again until no login and no session is left. Sessions that are still
// as many a second after the last login went are left there: then dead is when the last login had gone.
func (o *observer) untilDead(ctx context.Context) (s sight, err error) {
	var changed time.Time // when a session last went
	var before int
	for {
		began := time.Now()
		logins, sessions, err := o.look(ctx)
		if err != nil {
			return s, err
		}
		now := time.Now()
		if logins == 0 && s.refused.IsZero() {
			s.refused, changed = now, now
		}
		if sessions != before {
			before, changed = sessions, now
		}
		switch {
		case logins == 0 && sessions == 0:
			s.dead = now
			return s, nil
		case logins == 0 && now.Sub(changed) > time.Second:
			s.dead, s.left = s.refused, sessions
			return s, nil
		}
		// A look at a thousand sessions takes the server milliseconds of one of its cores, so looks are
		// spaced by what they take: they shall not hold up what they watch.
		wait := time.NewTimer(max(4*time.Millisecond, min(8*now.Sub(began), 40*time.Millisecond)))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return s, ctx.Err()
		}
	}
}
