package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// point is a position in the history of a database. Two servers that branched off each other have different timelines.
type point struct {
	server   int64
	timeline string
	lsn      string
}

// watcher notices when the database is not the continuation of what it was: another server, another timeline as after a
// failover, or an earlier position as after a restored snapshot.
type watcher struct {
	revoker  *service
	replaced chan struct{} // receives a value then, and when the database was first reached
}

// run compares the database with what it was, until ctx ends. It never asks Vault.
func (w watcher) run(ctx context.Context) {
	tick := time.NewTicker(keepOpenEvery)
	defer tick.Stop()
	var at point
	for {
		if pool, _ := w.revoker.current(); pool != nil {
			now, continues, err := w.whereAfter(ctx, at)
			if err == nil && !continues { // an error proves nothing, and the next call that needs the database reports it
				select {
				case w.replaced <- struct{}{}:
				default:
				}
			}
			if err == nil {
				at = now
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// whereAfter returns the present position, and whether it continues an earlier one.
func (w watcher) whereAfter(ctx context.Context, before point) (now point, continues bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, keepOpenTimeout)
	defer cancel()
	err = w.revoker.do(ctx, func(ctx context.Context, pool *pgxpool.Pool) error {
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return err
		}
		defer conn.Release()
		if _, err := conn.Exec(ctx, "SELECT pawl.check_primary()"); err != nil {
			return err
		}
		row := conn.QueryRow(ctx, `SELECT server, left(pg_walfile_name(lsn), 8), lsn::text,
			lsn >= coalesce(nullif($1, ''), '0/0')::pg_lsn FROM pawl.position()`, before.lsn)
		return row.Scan(&now.server, &now.timeline, &now.lsn, &continues)
	})
	return now, continues && now.server == before.server && now.timeline == before.timeline, err
}
