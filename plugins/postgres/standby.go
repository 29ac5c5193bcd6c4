package postgres

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker/backoff"
)

var errBehind = errors.New("it has not replayed the end of the logins yet")

// parseStandbys refuses a standby that would not be seen whole.
func parseStandbys(dsns []string, database string) (standbys []*standby, err error) {
	for _, dsn := range dsns {
		address, err := parseAddress(dsn)
		if err != nil {
			return nil, fmt.Errorf("a standby: %w", err)
		}
		if named := serversOf(address.Copy()).named; len(named) > 1 {
			return nil, fmt.Errorf("postgres: standby %s: its DSN names several servers; list each as a standby of its own",
				named[0])
		}
		if address.ConnConfig.Database != database {
			return nil, fmt.Errorf("postgres: standby %s has another database than %q", nameOf(address), database)
		}
		keepConnected(address)
		standbys = append(standbys, &standby{address: address})
	}
	return standbys, nil
}

// watchStandby keeps a connection to a standby open until ctx ends, and records whether the standby answers.
func (s *service) watchStandby(ctx context.Context, i int) {
	tick := time.NewTicker(keepOpenEvery)
	defer tick.Stop()
	for {
		ping, cancel := context.WithTimeout(ctx, keepOpenTimeout)
		err := s.tryStandby(ping, i, func(ctx context.Context, pool *pgxpool.Pool) error { return pool.Ping(ctx) })
		cancel()
		if ctx.Err() == nil && !errors.Is(err, errNoCredential) {
			s.standbys[i].note(err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// onStandby runs f at a standby for some grants, unless the standby did not answer last time.
func (s *service) onStandby(ctx context.Context, i, grants int, f func(context.Context, *pgxpool.Pool) error) error {
	st := s.standbys[i]
	if err := st.isAway(); err != nil {
		return err
	}
	if _, err := s.get(ctx); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, standbyTimeout+time.Duration(grants)*standbyTimeoutEach)
	defer cancel()
	err := s.tryStandby(bounded, i, f)
	if ctx.Err() == nil {
		st.note(err)
	}
	return err
}

var errNoCredential = errors.New("there is no credential")

// tryStandby runs f at a standby. A new credential reaches the standby when it is replayed, so until then it uses the
// credential before.
func (s *service) tryStandby(ctx context.Context, i int, f func(context.Context, *pgxpool.Pool) error) error {
	s.mu.Lock()
	logins := []*serviceLogin{s.live, s.previous}
	s.mu.Unlock()
	failed := errNoCredential
	for _, l := range logins {
		if l == nil {
			continue
		}
		if failed = s.retryAt(ctx, l.standbys[i], f); failed == nil || classify(failed) != badCredential {
			break
		}
	}
	return failed
}

// retryAt runs f again after a lost connection, and after a conflict with the replay.
func (s *service) retryAt(ctx context.Context, pool *pgxpool.Pool, f func(context.Context, *pgxpool.Pool) error) error {
	for try := 1; ; try++ {
		err := retryWhileFull(ctx, func(ctx context.Context) error { return f(ctx, pool) })
		if err == nil || try == maxAttempts || ctx.Err() != nil || unfit(err) {
			return err
		}
		if why := classify(err); why != connectionLost && why != conflict {
			return err
		}
	}
}

// CheckStandbys reports whether each standby answers and follows the primary. It waits until the standby knows the
// broker's login.
func (b *Backend) CheckStandbys(ctx context.Context) error {
	if len(b.revoker.standbys) == 0 {
		return nil
	}
	at, err := b.revoker.position(ctx)
	if err != nil {
		return fmt.Errorf("reading the position of database %q: %w", b.database, err)
	}
	retry := backoff.Exponential{First: 10 * time.Millisecond, Most: 500 * time.Millisecond}
	for try := 1; ; try++ {
		var failed error
		for _, there := range b.inspectStandbys(ctx, []string{}, 0, at) {
			if there.err != nil {
				failed = errors.Join(failed, fmt.Errorf("standby %s: %w", there.name, there.err))
			}
		}
		if failed == nil || try == checkStandbys || backoff.Sleep(ctx, retry.Next()) != nil {
			return failed
		}
	}
}

const checkStandbys = 10 // tries

// standbyState is what a standby shows of some grants' logins, after it has replayed up to a position.
type standbyState struct {
	found []loginState
	lsn   int64
}

// inspectStandby returns the states of the grants' logins at a standby. It waits a little for the standby to replay up
// to the given position of the primary, which is at another one now.
func (s *service) inspectStandby(
	ctx context.Context, i int, ids []string, until int64, primary position,
) (seen standbyState, err error) {
	st := s.standbys[i]
	deadline := time.Now().Add(st.patience())
	err = s.onStandby(ctx, i, len(ids), func(ctx context.Context, pool *pgxpool.Pool) (err error) {
		if err := checkPoolDirect(ctx, pool); err != nil {
			return err
		}
		for {
			there, err := positionAt(ctx, pool)
			switch {
			case err != nil:
				return err
			case there.id != primary.id:
				return errStranger
			case !there.standby && there.same(primary.identity): // it became the primary, and was inspected
				seen = standbyState{lsn: math.MaxInt64}
				return nil
			case !there.standby:
				return errPromoted
			case there.lsn >= until:
				if err := s.checkOne(ctx, i, pool, there.started); err != nil {
					return err
				}
				seen.lsn = there.lsn
				seen.found, err = inspectAt(ctx, pool, ids)
				return err
			case time.Now().After(deadline):
				st.stall()
				until = 0
				continue
			}
			if err := backoff.Sleep(ctx, 10*time.Millisecond); err != nil {
				return err
			}
		}
	})
	return seen, err
}

// cutOnce terminates the sessions of the grants at a standby.
func (s *service) cutOnce(ctx context.Context, i int, ids []string) (p pass, err error) {
	p.obstacle = "its replay is behind"
	err = s.onStandby(ctx, i, len(ids), func(ctx context.Context, pool *pgxpool.Pool) error {
		return pool.QueryRow(ctx, "SELECT alive, sessions, starting FROM pawl.cut($1)", ids).
			Scan(&p.passedOver, &p.sessions, &p.starting)
	})
	return p, err
}

// startCut terminates the sessions of the grants at all standbys once, while the caller waits for the primary. The
// result waits for that. Errors are left to cutStandbys.
func (s *service) startCut(ctx context.Context, ids []string) (wait func()) {
	var all sync.WaitGroup
	for i := range s.standbys {
		all.Go(func() { _, _ = s.cutOnce(ctx, i, ids) })
	}
	return all.Wait
}

// cutStandbys terminates the sessions of the grants at all standbys, until none is left and their logins are refused
// there.
func (s *service) cutStandbys(ctx context.Context, ids []string) error {
	failed := make([]error, len(s.standbys))
	var g errgroup.Group
	for i, st := range s.standbys {
		g.Go(func() error {
			resists, err := untilQuiet(ctx, st.patience(), func(ctx context.Context) (pass, error) {
				return s.cutOnce(ctx, i, ids)
			})
			if resists != nil {
				st.stall()
			}
			if err = errors.Join(resists, err); err != nil {
				failed[i] = fmt.Errorf("standby %s: %w", nameOf(st.address), err)
			}
			return nil
		})
	}
	_ = g.Wait() // nil: the errors are in failed
	return errors.Join(failed...)
}

// identities asks the server of DSN and the standbys who they are.
func (b *Backend) identities(ctx context.Context) (known knownServers, err error) {
	at, err := b.revoker.position(ctx)
	if err != nil {
		return known, fmt.Errorf("asking database %q for its server: %w", b.database, err)
	}
	known.found = append(known.found, at.identity)
	for n, st := range b.revoker.standbys {
		var i identity
		ask := func(ctx context.Context, pool *pgxpool.Pool) error {
			return pool.AcquireFunc(ctx, func(c *pgxpool.Conn) (err error) {
				if err := checkDirect(c.Conn()); err != nil {
					return err
				}
				i, err = identityOf(ctx, c.Conn())
				return err
			})
		}
		err := untilKnown(ctx, func() error { return b.revoker.onStandby(ctx, n, 0, ask) })
		switch {
		case err != nil:
			known.away = errors.Join(known.away, fmt.Errorf("asking standby %s for its server: %w", nameOf(st.address), err))
		case i.standby: // else it was promoted, and does not show that logins have ended
			known.found = append(known.found, i)
		}
	}
	return known, nil
}
