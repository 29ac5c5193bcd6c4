package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// identity is the server that a connection reached. A standby and a copy of the server's files have the same id. No two
// server processes have the same start.
type identity struct {
	id      int64
	started time.Time
	standby bool
}

// same reports whether both are one server. The start alone decides if a login may not read the id.
func (i identity) same(j identity) bool {
	return i.started.Equal(j.started) && (i.id == j.id || i.id == 0 || j.id == 0)
}

// identityOf asks a server for its identity. All logins may, unless a DBA has withdrawn pg_control_system from PUBLIC.
func identityOf(ctx context.Context, conn *pgx.Conn) (i identity, err error) {
	err = conn.QueryRow(ctx, `SELECT pg_postmaster_start_time(), pg_is_in_recovery()`,
		pgx.QueryExecModeSimpleProtocol).Scan(&i.started, &i.standby)
	if err != nil {
		return i, err
	}
	err = conn.QueryRow(ctx, `SELECT system_identifier FROM pg_control_system()`,
		pgx.QueryExecModeSimpleProtocol).Scan(&i.id)
	if stateOf(err) == "42501" {
		err = nil
	}
	return i, err
}

// position is how far a server has written or replayed. Two servers that branched off each other have different
// timelines.
type position struct {
	identity
	timeline string // empty at a standby
	lsn      int64  // in bytes
}

func positionAt(ctx context.Context, db querier) (at position, err error) {
	row := db.QueryRow(ctx, "SELECT server, standby, coalesce(timeline, ''), (lsn - '0/0'::pg_lsn)::bigint, started "+
		"FROM pawl.position()")
	return at, row.Scan(&at.id, &at.standby, &at.timeline, &at.lsn, &at.started)
}

// position returns the present one of the primary.
func (s *service) position(ctx context.Context) (at position, err error) {
	err = s.onPrimary(ctx, func(ctx context.Context, conn *pgxpool.Conn) (err error) {
		at, err = positionAt(ctx, conn)
		return err
	})
	return at, err
}
