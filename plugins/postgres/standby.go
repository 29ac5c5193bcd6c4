package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker/backoff"
)

// onStandby runs f at a standby. A new credential reaches the standby when it is replayed, so until then it uses the
// credential before.
func (s *service) onStandby(ctx context.Context, i int, f func(context.Context, *pgxpool.Pool) error) error {
	if _, err := s.get(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	logins := []*serviceLogin{s.live, s.previous}
	s.mu.Unlock()
	var failed error
	for _, l := range logins {
		if l == nil {
			continue
		}
		err := s.retryAt(ctx, l.standbys[i], f)
		if err == nil {
			return nil
		}
		failed = errors.Join(failed, err)
		if classify(err) != badCredential {
			break
		}
	}
	return failed
}

// retryAt runs f again after a lost connection, and after a conflict with the replay.
func (s *service) retryAt(ctx context.Context, pool *pgxpool.Pool, f func(context.Context, *pgxpool.Pool) error) error {
	for try := 1; ; try++ {
		err := retryWhileFull(ctx, func(ctx context.Context) error { return f(ctx, pool) })
		if err == nil || try == maxAttempts || ctx.Err() != nil {
			return err
		}
		if why := classify(err); why != connectionLost && why != conflict {
			return err
		}
	}
}

// position is how far a server has written or replayed.
type position struct {
	server  int64
	standby bool
	lsn     string
}

const positionQuery = "SELECT server, standby, lsn::text FROM pawl.position()"

// replayGrace is how long inspectStandby waits for a standby to replay.
const replayGrace = 2 * time.Second

var errBehind = errors.New("it has not replayed the end of the logins yet")

// inspectStandby returns the states of the grants' logins at a standby, once it has replayed up to the given position
// of the primary. Before that it may not know a login that it lets in a moment later.
func (s *service) inspectStandby(
	ctx context.Context, i int, ids []string, at position,
) (found []loginState, err error) {
	deadline := time.Now().Add(replayGrace)
	err = s.onStandby(ctx, i, func(ctx context.Context, pool *pgxpool.Pool) error {
		for {
			var there position
			var reached bool
			row := pool.QueryRow(ctx, `SELECT server, standby, lsn::text, coalesce(lsn >= $1::text::pg_lsn, false)
				FROM pawl.position()`, at.lsn)
			if err := row.Scan(&there.server, &there.standby, &there.lsn, &reached); err != nil {
				return err
			}
			switch {
			case there.server != at.server:
				return errors.New("it is another server, and not a standby of this one")
			case !there.standby:
				return errors.New("it does not follow the primary any more")
			case reached:
				found, err = inspectAt(ctx, pool, ids)
				return err
			case time.Now().After(deadline):
				return errBehind
			}
			if err := backoff.Sleep(ctx, 10*time.Millisecond); err != nil {
				return err
			}
		}
	})
	return found, err
}

// cutStandbys terminates the sessions of the grants at all standbys, until none is left and their logins are refused
// there.
func (s *service) cutStandbys(ctx context.Context, ids []string) error {
	failed := make([]error, len(s.standbys))
	var g errgroup.Group
	for i := range s.standbys {
		g.Go(func() error {
			resists, err := untilQuiet(ctx, func(ctx context.Context) (p pass, err error) {
				err = s.onStandby(ctx, i, func(ctx context.Context, pool *pgxpool.Pool) error {
					return pool.QueryRow(ctx, "SELECT alive, sessions, starting FROM pawl.cut($1)", ids).
						Scan(&p.passedOver, &p.sessions, &p.starting)
				})
				p.obstacle = "its replay is behind"
				return p, err
			})
			if err = errors.Join(resists, err); err != nil {
				failed[i] = fmt.Errorf("standby %s: %w", nameOf(s.standbys[i]), err)
			}
			return nil
		})
	}
	_ = g.Wait() // nil: the errors are in failed
	return errors.Join(failed...)
}
