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

// service connects the broker to the database for one purpose. It holds a small pool and replaces its credential after
// half of the credential's life.
type service struct {
	purpose   Purpose
	cfg       Config
	address   *pgxpool.Config
	fetchSlot chan struct{} // holds one token; only the goroutine that takes it may fetch a credential
	closing   sync.WaitGroup

	// mu guards the fields below.
	mu      sync.Mutex
	pool    *pgxpool.Pool // nil before the first credential
	renewAt time.Time     // when to fetch the next credential
	expires time.Time     // of the credential; zero after the database refused it
}

func newService(p Purpose, cfg Config, address *pgxpool.Config) *service {
	s := &service{purpose: p, cfg: cfg, address: address, fetchSlot: make(chan struct{}, 1)}
	s.fetchSlot <- struct{}{}
	return s
}

// get returns the pool. It asks Vault only if there is no live credential: severing must not wait for a Vault that
// hangs.
func (s *service) get(ctx context.Context) (*pgxpool.Pool, error) {
	if pool, _ := s.current(); pool != nil {
		return pool, nil
	}
	return s.fetchUnless(ctx, func(pool *pgxpool.Pool, _ bool) bool { return pool != nil })
}

// current returns the pool if its credential is live. fresh reports whether the credential is in the first half of its
// life.
func (s *service) current() (pool *pgxpool.Pool, fresh bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	if s.pool == nil || !now.Before(s.expires) {
		return nil, false
	}
	return s.pool, now.Before(s.renewAt)
}

// renewIfDue fetches the next credential after half of this one's life. If that fails, this one stays in use.
func (s *service) renewIfDue(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, maintainEvery)
	defer cancel()
	_, err := s.fetchUnless(ctx, func(_ *pgxpool.Pool, fresh bool) bool { return fresh })
	return err
}

// fetchUnless fetches a credential, one caller at a time. It first checks again whether the present one is good enough,
// since another caller may have replaced it meanwhile.
func (s *service) fetchUnless(
	ctx context.Context, good func(pool *pgxpool.Pool, fresh bool) bool,
) (*pgxpool.Pool, error) {
	select {
	case <-s.fetchSlot:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { s.fetchSlot <- struct{}{} }()
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
		return nil, fmt.Errorf("getting a credential for %s: it is empty or expired", s.purpose)
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

// replace installs a pool. The old one closes in the background once its connections are returned.
func (s *service) replace(pool *pgxpool.Pool, renew, expires time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.pool; old != nil {
		s.closing.Go(old.Close)
	}
	s.pool, s.renewAt, s.expires = pool, renew, expires
}

// markRefused makes the next get fetch another credential, after the database refused this one.
func (s *service) markRefused(pool *pgxpool.Pool) {
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

// maxAttempts bounds the attempts of one call. Every function in schema pawl is safe to call again.
const maxAttempts = 4

// do runs f with the pool. It retries when the database refused the credential, when the connection was lost, and after
// a conflict between two transactions.
func (s *service) do(ctx context.Context, f func(*pgxpool.Pool) error) error {
	for try := 1; ; try++ {
		pool, err := s.get(ctx)
		if err != nil {
			return err
		}
		err = f(pool)
		if err == nil || try == maxAttempts || ctx.Err() != nil {
			return err
		}
		switch why := classify(err); why {
		case badCredential:
			s.markRefused(pool)
		case connectionLost, conflict:
		default:
			return err
		}
	}
}

// query calls a function that returns one row.
func (s *service) query(ctx context.Context, sql string, args []any, into ...any) error {
	return s.do(ctx, func(pool *pgxpool.Pool) error {
		return pool.QueryRow(ctx, sql, args...).Scan(into...)
	})
}

// failure is a class of errors that need the same reaction.
type failure int

const (
	other          failure = iota
	badCredential          // the database refused the credential
	connectionLost         // retry on another connection
	conflict               // with another transaction
	badRequest             // the arguments are malformed or not allowed
)

// classify reads the SQLSTATE (PostgreSQL manual, appendix A).
func classify(err error) failure {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		var connect *pgconn.ConnectError
		if errors.As(err, &connect) {
			return other
		}
		return connectionLost
	}
	switch {
	case strings.HasPrefix(pg.Code, "28"):
		return badCredential
	case pg.Code == "57P01" || strings.HasPrefix(pg.Code, "08"):
		return connectionLost
	// XX000 is "tuple concurrently updated", after a concurrent GRANT.
	case strings.HasPrefix(pg.Code, "40"), pg.Code == "55P03", pg.Code == "XX000", pg.Code == "23505":
		return conflict
	case strings.HasPrefix(pg.Code, "22"), pg.Code == "42501", pg.Code == "42703", pg.Code == "42883":
		return badRequest
	}
	return other
}
