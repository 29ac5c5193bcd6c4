package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// observer polls the database over the superuser's connection. It identifies roles by oid, because a session
// outlives the name of its role.
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
		err = fmt.Errorf("the database has %[2]d of %[1]d credentials", len(logins), len(o.oids))
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
	_ = o.conn.Close(ctx) // it only read
}

// count gives the number of roles that may log in, and of their sessions.
func (o *observer) count(ctx context.Context) (logins, sessions int, err error) {
	err = o.conn.QueryRow(ctx, `SELECT (SELECT count(*) FROM pg_authid WHERE oid = ANY($1) AND rolcanlogin),
		(SELECT count(*) FROM pg_stat_activity WHERE usesysid = ANY($1))`, o.oids).Scan(&logins, &sessions)
	return logins, sessions, err
}

// sighting has the times of an observer's findings.
type sighting struct {
	refused time.Time // no role could log in
	dead    time.Time // and no session existed
	left    int       // sessions that were not ended
}

// untilDead polls until no login and no session is left. If the number of sessions has not changed for a second after
// the last login was refused, it gives up on them: then dead is the time at which the last login was refused.
func (o *observer) untilDead(ctx context.Context) (s sighting, err error) {
	var changed time.Time // when a session last ended
	var before int
	for {
		began := time.Now()
		logins, sessions, err := o.count(ctx)
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
		// A poll of a thousand sessions takes milliseconds of one of the server's cores. The wait grows with that
		// time, so that polling does not delay the observed work.
		wait := time.NewTimer(max(4*time.Millisecond, min(8*now.Sub(began), 40*time.Millisecond)))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return s, ctx.Err()
		}
	}
}
