package attest

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Listener accepts connections from inner within the limits, and returns those with a completed handshake. A nil config
// means no TLS: every connection is then without an SVID and complete at once. Close returns when all of its goroutines
// have ended.
//
//   - Connections without an SVID drop each other: one beyond a limit drops the oldest that is in its handshake, or
//     else the oldest without a request under way. An honest handshake takes milliseconds, so clients that stall theirs drop
//     each other.
//   - Handshakes compute in turn, and addresses take turns, so that a flood of them leaves processors to the requests. One
//     that waits for its client has no turn.
//   - One beyond the limit of its SPIFFE ID is let in to be told: [Attestor.Identify] refuses each of its requests by
//     name, and it is closed after the first. Some more beyond that are closed without an answer.
//   - One beyond the limit of all kinds drops one without an SVID, or an idle one of the SPIFFE ID with the most.
func Listener(inner net.Listener, config *tls.Config, limits Limits) *Bounded {
	l := &Bounded{
		Listener: inner, config: config, limits: limits.orDefaults(),
		ready: make(chan net.Conn), failed: make(chan error), done: make(chan struct{}),
		logFailed: rate.Sometimes{Interval: time.Second}, logRefused: rate.Sometimes{Interval: time.Second},
	}
	l.room.init(l.limits)
	l.processors.free = l.limits.Computing
	l.running.Go(l.accept)
	return l
}

// Bounded is a listener with limits. Make one with [Listener].
type Bounded struct {
	net.Listener
	config     *tls.Config
	limits     Limits
	room       room
	processors processors

	ready   chan net.Conn
	failed  chan error
	done    chan struct{}
	closing sync.Once
	running sync.WaitGroup

	logFailed, logRefused rate.Sometimes
}

// Accept returns the next connection with a completed handshake.
func (l *Bounded) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case err := <-l.failed:
		return nil, err
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close stops listening and drops every handshake.
func (l *Bounded) Close() error {
	var err error
	l.closing.Do(func() {
		close(l.done)
		err = l.Listener.Close()
		l.room.dropHandshakes()
	})
	l.running.Wait()
	return err
}

// Open returns the number of open connections: with an SVID, and without one.
func (l *Bounded) Open() (identified, strangers int) { return l.room.counts() }

func (l *Bounded) accept() {
	for {
		conn, err := l.Listener.Accept()
		if err == nil {
			l.begin(conn)
			continue
		}
		select {
		case l.failed <- err: // the caller of Accept decides when to retry
		case <-l.done:
			return
		}
	}
}

// begin makes room for a connection and starts its handshake, or closes it.
func (l *Bounded) begin(raw net.Conn) {
	c, limit := l.room.enter(raw)
	l.refused(raw, limit)
	if c == nil {
		_ = raw.Close() // refused: its error has no reader
		return
	}
	select {
	case <-l.done: // Close has already dropped the others
		_ = c.Close()
		return
	default:
	}
	l.running.Go(func() {
		if conn := l.handshake(c); conn != nil {
			l.deliver(c, conn)
		}
	})
}

// handshake returns the connection to serve, or nil after closing it.
func (l *Bounded) handshake(c *bound) net.Conn {
	if l.config == nil {
		l.room.settle(c, "")
		return c
	}
	ctx, cancel := context.WithTimeout(context.Background(), l.limits.Handshake)
	defer cancel()
	conn := tls.Server(c, l.config)
	c.processors = &l.processors
	err := conn.HandshakeContext(ctx)
	c.rest()
	c.processors = nil
	if err != nil {
		l.logFailed.Do(func() {
			l.limits.Log.Info("TLS handshake refused", "client", c.RemoteAddr().String(), "error", err.Error())
		})
		_ = c.Close() // the handshake's error is logged
		return nil
	}
	id := ""
	if certs := conn.ConnectionState().PeerCertificates; len(certs) > 0 && len(certs[0].URIs) > 0 {
		id = certs[0].URIs[0].String() // the handshake has checked that there is one, and that it is a SPIFFE ID
	}
	limit, ok := l.room.settle(c, id)
	l.refused(c, limit)
	if !ok {
		_ = c.Close() // refused: its error has no reader
		return nil
	}
	return conn
}

func (l *Bounded) deliver(c *bound, conn net.Conn) {
	c.await(l.limits.First)
	select {
	case l.ready <- conn:
	case <-l.done:
		_ = conn.Close() // never returned by Accept
	}
}

// refused reports a limit that refused or ended a connection; empty: none did.
func (l *Bounded) refused(c net.Conn, limit string) {
	if limit == "" {
		return
	}
	l.limits.Refused(limit)
	l.logRefused.Do(func() {
		l.limits.Log.Warn("a limit of connections is reached", "limit", limit, "client", c.RemoteAddr().String())
	})
}
