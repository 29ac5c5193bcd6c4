package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// service is the broker's own way into the database for one purpose: a small pool under a
// credential that is replaced at half its life.
type service struct {
	purpose Purpose
	cfg     Config
	address *pgxpool.Config
	turn    chan struct{} // holds one token: whoever takes it may fetch a credential
	closing sync.WaitGroup

	// mu guards what follows.
	mu      sync.Mutex
	pool    *pgxpool.Pool // nil before the first credential
	renew   time.Time     // when to look for the next credential
	expires time.Time     // when this one is of no use any more
}

func newService(p Purpose, cfg Config, address *pgxpool.Config) *service {
	s := &service{purpose: p, cfg: cfg, address: address, turn: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	return s
}

// get gives the pool. Vault is asked only when there is no credential that lives: severing must not wait for a
// Vault that hangs.
func (s *service) get(ctx context.Context) (*pgxpool.Pool, error) {
	if pool, _ := s.current(); pool != nil {
		return pool, nil
	}
	return s.next(ctx, func(pool *pgxpool.Pool, _ bool) bool { return pool != nil })
}

// current gives the pool if its credential lives, and whether it is in the first half of its life.
func (s *service) current() (pool *pgxpool.Pool, fresh bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	if s.pool == nil || !now.Before(s.expires) {
		return nil, false
	}
	return s.pool, now.Before(s.renew)
}

// keep looks for the next credential when this one is past half its life, and leaves it in place if there is none.
func (s *service) keep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, maintainEvery)
	defer cancel()
	_, err := s.next(ctx, func(_ *pgxpool.Pool, fresh bool) bool { return fresh })
	return err
}

// next fetches a credential, one caller at a time, unless the one that is there by then is good enough.
func (s *service) next(ctx context.Context, good func(pool *pgxpool.Pool, fresh bool) bool) (*pgxpool.Pool, error) {
	select {
	case <-s.turn:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { s.turn <- struct{}{} }()
	if pool, fresh := s.current(); good(pool, fresh) {
		return pool, nil
	}
	return s.fetch(ctx)
}

func (s *service) fetch(ctx context.Context) (*pgxpool.Pool, error) {
	user, password, expires, err := s.cfg.Credentials.Credential(ctx, s.purpose)
	if err != nil {
		return nil, fmt.Errorf("getting a credential for %s: %w", s.purpose, err)
	}
	now := s.cfg.Now()
	if user == "" || password == "" || !expires.After(now) {
		return nil, fmt.Errorf("getting a credential for %s: it is empty or over", s.purpose)
	}
	config := s.address.Copy()
	config.ConnConfig.User, config.ConnConfig.Password = user, password
	pool, err := pgxpool.NewWithConfig(context.WithoutCancel(ctx), config)
	if err != nil {
		return nil, fmt.Errorf("opening a pool for %s: %w", s.purpose, err)
	}
	s.replace(pool, now.Add(expires.Sub(now)/2), expires)
	return pool, nil
}

// replace puts a pool in place of the last, which closes once its connections are back.
func (s *service) replace(pool *pgxpool.Pool, renew, expires time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.pool; old != nil {
		s.closing.Go(old.Close)
	}
	s.pool, s.renew, s.expires = pool, renew, expires
}

// distrust makes the next get look for another credential: the database refused this one.
func (s *service) distrust(pool *pgxpool.Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pool == pool {
		s.expires = time.Time{}
	}
}

func (s *service) close() {
	s.replace(nil, time.Time{}, time.Time{})
	s.closing.Wait()
}

// attempts is how often a call is sent at most. All our functions may be called again.
const attempts = 4

// do runs f with the pool, and again when the credential was refused, the connection was lost, or
// two transactions collided.
func (s *service) do(ctx context.Context, f func(*pgxpool.Pool) error) error {
	for try := 1; ; try++ {
		pool, err := s.get(ctx)
		if err != nil {
			return err
		}
		err = f(pool)
		if err == nil || try == attempts || ctx.Err() != nil {
			return err
		}
		switch why := failureOf(err); why {
		case refused:
			s.distrust(pool)
		case lost, collided:
		default:
			return err
		}
	}
}

// query calls a function that answers one row.
func (s *service) query(ctx context.Context, sql string, args []any, into ...any) error {
	return s.do(ctx, func(pool *pgxpool.Pool) error {
		return pool.QueryRow(ctx, sql, args...).Scan(into...)
	})
}

// failure is why a call failed, as far as it matters what to do next.
type failure int

const (
	other    failure = iota
	refused          // the credential is not taken
	lost             // the connection is gone
	collided         // with another transaction
	asked            // what was asked for is malformed, or may not be given
)

// failureOf reads the SQLSTATE (PostgreSQL manual, appendix A).
func failureOf(err error) failure {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		var connect *pgconn.ConnectError
		if errors.As(err, &connect) {
			return other
		}
		return lost
	}
	switch {
	case strings.HasPrefix(pg.Code, "28"):
		return refused
	case pg.Code == "57P01" || strings.HasPrefix(pg.Code, "08"):
		return lost
	// XX000 is "tuple concurrently updated" by a GRANT of somebody else's.
	case strings.HasPrefix(pg.Code, "40"), pg.Code == "55P03", pg.Code == "XX000", pg.Code == "23505":
		return collided
	case strings.HasPrefix(pg.Code, "22"), pg.Code == "42501", pg.Code == "42703", pg.Code == "42883":
		return asked
	}
	return other
}
