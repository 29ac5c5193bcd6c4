package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker/backoff"
)

// maintainEvery is how often the broker's own credentials are checked.
const maintainEvery = 30 * time.Second

// service connects the broker to the database for one purpose. It holds a small pool and replaces its credential after
// half of the credential's life.
type service struct {
	purpose   Purpose
	cfg       Config
	address   *pgxpool.Config
	servers   *servers // of address
	closing   sync.WaitGroup
	fetchSlot chan struct{} // holds one token; only the goroutine that takes it may fetch a credential
	next      *serviceLogin // guarded by fetchSlot: fetched, but the server has had no room for its connection yet
	standbys  []*standby

	mu       sync.Mutex // guards the fields below
	live     *serviceLogin
	previous *serviceLogin // a standby knows it until it has replayed live
	looks    map[int]look  // by standby
}

// serviceLogin is a pool of connections with one credential.
type serviceLogin struct {
	pool    *pgxpool.Pool
	renewAt time.Time // when to fetch the next credential
	expires time.Time // of the credential; zero after the database refused it

	standbys []*pgxpool.Pool // one for each of service.standbys
}

func (l *serviceLogin) close() {
	l.pool.Close()
	for _, pool := range l.standbys {
		pool.Close()
	}
}

func newService(p Purpose, cfg Config, address *pgxpool.Config, named *servers) *service {
	address = address.Copy()
	keepConnected(address)
	s := &service{purpose: p, cfg: cfg, address: address, servers: named, fetchSlot: make(chan struct{}, 1)}
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
	if s.live == nil || !now.Before(s.live.expires) {
		return nil, false
	}
	return s.live.pool, now.Before(s.live.renewAt)
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

// fetch replaces the credential. The present pool stays until a connection of the new one is open: agents may hold all
// the connections that the server has.
func (s *service) fetch(ctx context.Context) (*pgxpool.Pool, error) {
	if s.next == nil || !s.cfg.Now().Before(s.next.expires) {
		next, err := s.newLogin(ctx)
		if err != nil {
			return nil, err
		}
		s.drop(s.next)
		s.next = next
	}
	next := s.next
	var err error
	for try := 1; try <= maxAttempts; try++ {
		first := s.servers.inOrder()[0]
		if err = retryWhileFull(ctx, next.pool.Ping); err == nil || ctx.Err() != nil {
			break
		}
		if why := classify(err); why != connectionLost && (why != badCredential || !s.servers.next(first, try)) {
			break
		}
	}
	if err != nil {
		if classify(err) == badCredential {
			s.drop(next)
			s.next = nil
		}
		return nil, fmt.Errorf("connecting as %s: %w", s.purpose, err)
	}
	s.next = nil
	s.replace(next)
	return next.pool, nil
}

func (s *service) newLogin(ctx context.Context) (*serviceLogin, error) {
	user, password, expires, err := s.cfg.Credentials.Credential(ctx, s.purpose)
	if err != nil {
		return nil, fmt.Errorf("getting a credential for %s: %w", s.purpose, err)
	}
	now := s.cfg.Now()
	if user == "" || password == "" || !expires.After(now) {
		return nil, fmt.Errorf("getting a credential for %s: it is empty or expired", s.purpose)
	}
	l := &serviceLogin{renewAt: now.Add(expires.Sub(now) / 2), expires: expires}
	open := func(address *pgxpool.Config) (*pgxpool.Pool, error) {
		config := address.Copy()
		config.ConnConfig.User, config.ConnConfig.Password = user, password
		config.AfterConnect = examiner(s.purpose, s.cfg.Log, config.AfterConnect)
		return pgxpool.NewWithConfig(context.WithoutCancel(ctx), config)
	}
	if l.pool, err = open(s.address); err != nil {
		return nil, fmt.Errorf("opening a pool for %s: %w", s.purpose, err)
	}
	for _, st := range s.standbys {
		pool, err := open(st.address)
		if err != nil {
			l.close()
			return nil, fmt.Errorf("opening a pool for %s at standby %s: %w", s.purpose, nameOf(st.address), err)
		}
		l.standbys = append(l.standbys, pool)
	}
	return l, nil
}

// replace installs a login. The old one closes in the background once its connections are returned, and its connections
// to standbys one replacement later.
func (s *service) replace(next *serviceLogin) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(s.previous)
	s.previous = s.live
	if old := s.live; old != nil {
		s.closing.Go(old.pool.Close)
	}
	s.live = next
}

// drop closes the pools of a login in the background.
func (s *service) drop(l *serviceLogin) {
	if l != nil {
		s.closing.Go(l.close)
	}
}

// pools returns the pools with the present credential and with the one before.
func (s *service) pools() (pools []*pgxpool.Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range []*serviceLogin{s.live, s.previous} {
		if l != nil {
			pools = append(pools, l.pool)
		}
	}
	return pools
}

// reset closes the open connections, so that the next ones go where the names in DSN lead now.
func (s *service) reset() {
	for _, pool := range s.pools() {
		pool.Reset()
	}
}

// markRefused makes the next get fetch another credential, after the database refused this one.
func (s *service) markRefused(pool *pgxpool.Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live != nil && s.live.pool == pool {
		s.live.expires = time.Time{}
	}
}

// close closes the pools. Only now no other goroutine fetches.
func (s *service) close() {
	s.replace(nil) // live becomes previous
	s.replace(nil)
	s.drop(s.next)
	s.closing.Wait()
}

const (
	keepOpenEvery   = time.Second           // how often keepOpen checks the connection
	whileFullEvery  = 20 * time.Millisecond // how often to connect to a server that has no room
	keepOpenTimeout = 5 * time.Second
)

// keepOpen keeps a connection open until ctx ends, and opens another one as soon as it is lost. It never asks Vault.
func (s *service) keepOpen(ctx context.Context) {
	tick := time.NewTicker(keepOpenEvery)
	defer tick.Stop()
	for {
		if pool, _ := s.current(); pool != nil {
			ping, cancel := context.WithTimeout(ctx, keepOpenTimeout)
			_ = retryWhileFull(ping, pool.Ping) // the next call that needs the connection reports the error
			cancel()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// retryWhileFull calls f until the server has room for its connection, or until ctx ends.
func retryWhileFull(ctx context.Context, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil || classify(err) != serverFull {
			return err
		}
		if backoff.Sleep(ctx, whileFullEvery) != nil {
			return err
		}
	}
}

const doTimeout = time.Minute // of one call with all its attempts

// do runs f with the pool. It retries when the database refused the credential, when the connection was lost or the
// server became read only, and after a conflict between two transactions. While the server has no room for another
// connection it retries until ctx ends, for at most doTimeout. If ctx ends during a retry, it returns the reason for
// the retry, which says more.
func (s *service) do(ctx context.Context, f func(ctx context.Context, pool *pgxpool.Pool) error) error {
	ctx, cancel := context.WithTimeout(ctx, doTimeout)
	defer cancel()
	var reason error // for the present retry
	for try := 1; ; try++ {
		pool, err := s.get(ctx)
		if err != nil {
			return cmp.Or(reason, err)
		}
		first := s.servers.inOrder()[0]
		err = retryWhileFull(ctx, func(ctx context.Context) error { return f(ctx, pool) })
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return cmp.Or(reason, err)
		case try == maxAttempts:
			return err
		}
		reason = err
		switch why := classify(err); why {
		case badCredential:
			if !s.servers.next(first, try) {
				s.markRefused(pool)
			}
		case readOnly: // leave the server: DSN may name another one that is the primary now
			pool.Reset()
		case connectionLost, conflict:
		default:
			return err
		}
	}
}

// query calls a function that returns one row.
func (s *service) query(ctx context.Context, sql string, args []any, into ...any) error {
	return s.do(ctx, func(ctx context.Context, pool *pgxpool.Pool) error {
		return pool.QueryRow(ctx, sql, args...).Scan(into...)
	})
}

// onPrimary runs f with one connection to the primary, which leads to no pooler. What f reads is of one server. Two
// connections can lead to two: after a failover, the first server may live on.
func (s *service) onPrimary(ctx context.Context, f func(context.Context, *pgxpool.Conn) error) error {
	return s.do(ctx, func(ctx context.Context, pool *pgxpool.Pool) error {
		return pool.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
			if err := checkDirect(c.Conn()); err != nil {
				return err
			}
			if _, err := c.Exec(ctx, "SELECT pawl.check_primary()"); err != nil { // do leaves a server that is read only
				return err
			}
			return f(ctx, c)
		})
	})
}

// querier is a pool or one of its connections.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// setAt returns the rows of a query with one column of text.
func setAt(ctx context.Context, db querier, sql string, args ...any) (map[string]bool, error) {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	var one string
	_, err = pgx.ForEachRow(rows, []any{&one}, func() error { set[one] = true; return nil })
	return set, err
}

// failure is a class of errors that need the same reaction.
type failure int

const (
	other          failure = iota
	badCredential          // the database refused the credential
	connectionLost         // retry on another connection
	conflict               // with another transaction
	badRequest             // the arguments are malformed or not allowed
	serverFull             // all connections of the server, or of the role, are taken
	overLimit              // a limit of schema pawl; the message says which
	unusable               // the secret would not work; the message says why
	readOnly               // the server is no primary any more
)

// classify reads the SQLSTATE (PostgreSQL manual, appendix A).
func classify(err error) failure {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		var connect *pgconn.ConnectError
		var pooler *poolerError
		if errors.As(err, &connect) || errors.As(err, &pooler) {
			return other
		}
		return connectionLost
	}
	switch {
	case strings.HasPrefix(pg.Code, "28"):
		return badCredential
	case pg.Code == "53300":
		return serverFull
	case pg.Code == "25006":
		return readOnly
	case pg.Code == "53400":
		return overLimit
	case pg.Code == "0A000":
		return unusable
	case pg.Code == "57P01", pg.Code == "57P02", strings.HasPrefix(pg.Code, "08"):
		return connectionLost
	// XX000 is "tuple concurrently updated", after a concurrent GRANT.
	case strings.HasPrefix(pg.Code, "40"), pg.Code == "55P03", pg.Code == "XX000", pg.Code == "23505":
		return conflict
	case strings.HasPrefix(pg.Code, "22"), pg.Code == "42501", pg.Code == "42703", pg.Code == "42883":
		return badRequest
	}
	return other
}

// stateOf returns the SQLSTATE of an error of the server, or nothing.
func stateOf(err error) string {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return ""
	}
	return pg.Code
}

// messageOf returns the message of an error of the server, without the rest.
func messageOf(err error) string {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return ""
	}
	return pg.Message
}
