package postgres

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
)

// hostError says that a host is another server than those where logins are ended.
type hostError struct {
	at   place
	what string
}

func (e *hostError) Error() string {
	if e.at == (place{}) {
		return e.what
	}
	return e.at.what + " " + e.at.String() + " " + e.what
}

// toolsHost is what a host is called in messages.
const toolsHost = "the tool's host"

const (
	mintAge   = time.Minute     // how old an answer about a host may be for a mint
	proofAge  = time.Second     // and for a proof
	hostRetry = 5 * time.Second // how long a failure is not tried again
	// hostTimeout bounds a check.
	hostTimeout = 5 * time.Second
)

// hostAnswer is the result of the last check of a host.
type hostAnswer struct {
	begun time.Time
	known knownServers // with which the host was compared; empty: the server of DSN did not answer
	err   error
}

// hosts checks where the names lead that secrets contain. The empty host is that of DSN. Safe for concurrent use.
type hosts struct {
	database string
	revoker  *service
	shaper   *service
	known    func(context.Context) (knownServers, error)
	now      func() time.Time
	log      *slog.Logger
	running  context.Context // ends with the backend
	checks   sync.WaitGroup

	mu      sync.Mutex                 // guards the fields below
	answers map[string]hostAnswer      // by host:port; empty: of DSN
	asking  map[string]chan struct{}   // closed when the answer is there
	of      map[broker.ToolName]string // host:port of the tools that name a server themselves
}

// check returns an error unless a host leads to the server of the broker's own connections, or to one of the standbys.
// Names differ where addresses do not, and a name can lead elsewhere tomorrow, so it asks the servers. A hostError is
// certain; any other error says that a server does not answer. Of DSN there is no other: where the server has no room
// for another connection, the open ones still prove.
func (h *hosts) check(ctx context.Context, host string, age time.Duration) error {
	if answer, ok := h.answer(host, age); ok {
		return answer.err
	}
	for needed := h.now().Add(-age); ; {
		select {
		case <-h.start(host):
			if answer, _ := h.answer(host, age); !answer.begun.Before(needed) {
				return answer.err
			}
		case <-ctx.Done():
			if host == "" {
				return nil
			}
			return context.Cause(ctx)
		}
	}
}

// start asks a host in the background, unless that has begun. The channel is closed when the answer is there.
func (h *hosts) start(host string) <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if done, asked := h.asking[host]; asked {
		return done
	}
	done := make(chan struct{})
	h.asking[host] = done
	h.checks.Go(func() {
		defer close(done)
		ctx, cancel := context.WithTimeout(h.running, hostTimeout)
		defer cancel()
		begun := h.now()
		known, err := h.known(ctx)
		switch {
		case host != "" && err == nil:
			err = h.ask(ctx, toolsHost, host, known)
		case host == "" && err == nil:
			err = h.askDSN(ctx, known)
		case host == "":
			err = nil
		}
		if err != nil && h.running.Err() == nil {
			h.log.Error("a host is not known to be the server of dsn", "database", h.database, "host", host, "err", err)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.answers[host] = hostAnswer{begun, known, err}
		delete(h.asking, host)
	})
	return done
}

// answer returns the last answer, and whether it still holds.
func (h *hosts) answer(host string, age time.Duration) (hostAnswer, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	answer, ok := h.answers[host]
	if answer.err != nil {
		age = hostRetry
	}
	return answer, ok && h.now().Sub(answer.begun) < age
}

// askDSN opens a new connection as an agent would, by the names in DSN, and compares its server with that of the
// broker's open connections. It returns no error but a hostError. It closes the open connections to a server whose
// promoted standby has taken over the names: the primary is where they lead.
func (h *hosts) askDSN(ctx context.Context, known knownServers) error {
	for _, pool := range h.revoker.pools() {
		conn, err := pgx.ConnectConfig(ctx, pool.Config().ConnConfig)
		if err != nil {
			continue
		}
		defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was only read
		at := place{what: "the host in dsn", name: conn.Config().Host, port: conn.Config().Port}
		what, err := poolerOf(ctx, conn)
		if err == nil && what != "" {
			return &hostError{at, what}
		}
		found, err := identityOf(ctx, conn)
		if err != nil || known.has(found) || known.away != nil {
			return nil
		}
		if found.id == known.found[0].id && !found.standby {
			h.revoker.reset()
			h.shaper.reset()
		}
		return &hostError{at, "leads to another server now than the broker's open connections"}
	}
	return nil
}

// ask asks each address of a host.
func (h *hosts) ask(ctx context.Context, what, host string, known knownServers) error {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		return err
	}
	addresses := []string{name}
	if !strings.HasPrefix(name, "/") {
		if addresses, err = net.DefaultResolver.LookupHost(ctx, name); err != nil {
			return fmt.Errorf("%s %s has no address here", what, host)
		}
	}
	for _, address := range addresses {
		number, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return err
		}
		if err := h.askAddress(ctx, place{what, name, address, uint16(number)}, known); err != nil {
			return err
		}
	}
	return nil
}

// place is one address of a host.
type place struct {
	what, name, address string
	port                uint16
}

func (p place) String() string { return net.JoinHostPort(p.name, strconv.Itoa(int(p.port))) }

// knownServers are those where logins are ended: first the server of DSN, then the standbys.
type knownServers struct {
	found []identity
	away  error // one of the standbys did not answer
}

func (k knownServers) has(i identity) bool {
	for _, known := range k.found {
		if known.same(i) {
			return true
		}
	}
	return false
}

func (h *hosts) askAddress(ctx context.Context, at place, known knownServers) error {
	conn, err := h.connectAt(ctx, at)
	if err != nil {
		network, address := pgconn.NetworkAddress(at.address, at.port)
		if program, _ := Program(ctx, network, address); program == pgpool || program == pgBouncer {
			return &hostError{at, "is " + program + ", which does not let the broker in, so the server behind it is " +
				"not known"}
		}
		return fmt.Errorf("%s %s does not let the broker in, so it is not known to be the server of dsn: SQLSTATE %q",
			at.what, at, stateOf(err))
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it was only read
	if conn.PgConn().ParameterStatus("is_superuser") == "" {
		return &hostError{at, "is no PostgreSQL server"}
	}
	what, err := poolerOf(ctx, conn)
	if err != nil {
		return err
	}
	if strings.Contains(what, " as ") || strings.HasSuffix(what, pgpool) {
		return &hostError{at, what}
	}
	found, err := identityOf(ctx, conn)
	switch {
	case err != nil:
		return err
	case known.has(found):
		return nil
	case known.away != nil:
		return known.away
	case found.standby && found.id == known.found[0].id:
		return &hostError{at, "is a hot standby that the backend's standbys do not name: add it there"}
	case found.id == known.found[0].id:
		return &hostError{at, "is a copy of the server of dsn, or a standby that was promoted"}
	}
	return &hostError{at, "is another server than that of dsn"}
}

// connectAt logs in at a place as the revoker, with the TLS settings of DSN. It refuses to send the password itself. A
// standby may know the credential before only.
func (h *hosts) connectAt(ctx context.Context, at place) (conn *pgx.Conn, err error) {
	if _, err := h.revoker.get(ctx); err != nil {
		return nil, err
	}
	err = untilKnown(ctx, func() (err error) {
		conn, err = h.tryAt(ctx, at)
		return err
	})
	return conn, err
}

// untilKnown calls f again for about a second while a server refuses the credential: a standby may not have replayed it
// yet.
func untilKnown(ctx context.Context, f func() error) error {
	for try := 1; ; try++ {
		err := f()
		if err == nil || classify(err) != badCredential || try == 6 {
			return err
		}
		if err := backoff.Sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

func (h *hosts) tryAt(ctx context.Context, at place) (conn *pgx.Conn, err error) {
	for _, pool := range h.revoker.pools() {
		config := pool.Config().ConnConfig
		others := config.Fallbacks
		config.Fallbacks = nil
		for _, f := range others { // one for each server, and for each way to use TLS
			if f.Host == config.Host && f.Port == config.Port {
				config.Fallbacks = append(config.Fallbacks, &pgconn.FallbackConfig{Host: at.name, Port: at.port,
					TLSConfig: renamed(f.TLSConfig, at.name)})
			}
		}
		config.Host, config.Port, config.TLSConfig = at.name, at.port, renamed(config.TLSConfig, at.name)
		config.LookupFunc = func(context.Context, string) ([]string, error) { return []string{at.address}, nil }
		config.ValidateConnect = nil // target_session_attrs of DSN is for its own servers
		if config.RequireAuth == "" {
			config.RequireAuth = "!password"
		}
		if conn, err = pgx.ConnectConfig(ctx, config); err == nil || classify(err) != badCredential {
			break
		}
	}
	return conn, err
}

// renamed returns TLS settings for a server with another name.
func renamed(c *tls.Config, name string) *tls.Config {
	if c == nil {
		return nil
	}
	c = c.Clone()
	if c.ServerName != "" {
		c.ServerName = name
	}
	return c
}

// prepare is check for a step. Nothing may be minted for a server where it would not be ended.
func (h *hosts) prepare(ctx context.Context, tool broker.ToolName, host string) error {
	ctx, cancel := context.WithTimeout(ctx, hostTimeout)
	defer cancel()
	h.remember(tool, host)
	answer, holds := h.answer(host, mintAge)
	err := answer.err
	switch {
	case holds:
	case host == "": // a proof asks again, so the mint does not wait
		h.start(host)
	default:
		err = h.check(ctx, host, mintAge)
	}
	if err == nil {
		return nil
	}
	e := broker.Errorf(broker.Unavailable, "prepare",
		"the tool's host is not known to be the server of database %q; nothing was made", h.database)
	if wrong := (*hostError)(nil); errors.As(err, &wrong) {
		e = broker.Errorf(broker.Unavailable, "prepare", "%s; nothing was made", wrong)
	}
	return e.With(broker.CodeBackendDown).Because(err).After(hostRetry)
}

// remember notes the host of a tool; empty: the tool takes the server of DSN.
func (h *hosts) remember(tool broker.ToolName, host string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if host == "" {
		delete(h.of, tool)
		return
	}
	h.of[tool] = host
}

// proven is check for a proof. It waits for a host that did not answer last time once only: the proofs of all tools'
// grants, and the next call that severs, would wait with it.
func (h *hosts) proven(ctx context.Context, host string, at identity) error {
	answer, holds := h.answer(host, proofAge)
	if wrong := (*hostError)(nil); answer.err == nil || errors.As(answer.err, &wrong) {
		for _, age := range []time.Duration{proofAge, 0} { // the broker may have left the server that it knew a moment ago
			if err := h.check(ctx, host, age); err != nil {
				return err
			}
			answer, _ = h.answer(host, proofAge)
			if len(answer.known.found) == 0 || answer.known.found[0].same(at) {
				return nil
			}
		}
		h.revoker.reset()
		return errTwoServers
	}
	if !holds {
		h.start(host)
	}
	return answer.err
}

var errTwoServers = &hostError{what: "the broker's connections lead to two servers"}

// doubt makes dead grants unknown whose tool's host is not the server that was proven, or one of its standbys: its name
// can have come to lead elsewhere since the mint.
func (h *hosts) doubt(ctx context.Context, grants []broker.Grant, evidence []broker.Evidence, at identity) {
	for i, g := range grants {
		if evidence[i].Outcome != broker.OutcomeDead {
			continue
		}
		h.mu.Lock()
		host := h.of[g.Tool]
		h.mu.Unlock()
		err := h.proven(ctx, host, at)
		if err == nil {
			continue
		}
		evidence[i].Outcome = broker.OutcomeUnknown
		evidence[i].Answer = fmt.Sprintf("the tool's host %s does not answer the broker, so it is not known to be the "+
			"server of dsn", host)
		if wrong := (*hostError)(nil); errors.As(err, &wrong) {
			evidence[i].Answer = wrong.Error()
		}
	}
}
