package attest

import (
	"container/list"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits bound the resources of an unauthenticated client, and the lifetime of a connection.
type Limits struct {
	Handshake  time.Duration // time for a TLS handshake; zero means 5 s
	Handshakes int           // concurrent handshakes; zero means 512
	Age        time.Duration // age at which a connection is closed, between requests; zero means 5 min
	Idle       time.Duration // time without a request; zero means 1 min
	Header     time.Duration // time to read a request's header; zero means 5 s
	HeaderSize int           // size of a request's header in bytes; zero means 32 KiB

	Log *slog.Logger     // for failed handshakes; nil means no log
	Now func() time.Time // the clock for Age; nil means time.Now
}

func (l Limits) orDefaults() Limits {
	orDefault(&l.Handshake, 5*time.Second)
	orDefault(&l.Handshakes, 512)
	orDefault(&l.Age, 5*time.Minute)
	orDefault(&l.Idle, time.Minute)
	orDefault(&l.Header, 5*time.Second)
	orDefault(&l.HeaderSize, 32<<10)
	if l.Log == nil {
		l.Log = slog.New(slog.DiscardHandler)
	}
	if l.Now == nil {
		l.Now = time.Now
	}
	return l
}

func orDefault[T int | time.Duration](v *T, value T) {
	if *v <= 0 {
		*v = value
	}
}

// Server returns an http.Server for h with the limits. Use it with a [Listener]. It does not limit the time for bodies
// and responses: some responses are streams, so the handler must. A connection beyond its age completes its requests
// and closes with the next response. On HTTP/2 it sends GOAWAY, which does not affect running streams.
func Server(h http.Handler, limits Limits) *http.Server {
	l := limits.orDefaults()
	type bornKey struct{}
	return &http.Server{
		MaxHeaderBytes:    l.HeaderSize,
		ReadHeaderTimeout: l.Header,
		IdleTimeout:       l.Idle,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, bornKey{}, l.Now())
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if born, ok := r.Context().Value(bornKey{}).(time.Time); ok && l.Now().Sub(born) >= l.Age {
				w.Header().Set("Connection", "close")
			}
			h.ServeHTTP(w, r)
		}),
	}
}

// Listener accepts TLS connections from inner and returns those with a completed handshake. A handshake beyond the
// limit drops the oldest one. An honest handshake takes milliseconds, so clients that stall theirs drop each other.
// Close returns when all of its goroutines have ended.
func Listener(inner net.Listener, config *tls.Config, limits Limits) net.Listener {
	l := &listener{
		Listener: inner, config: config, limits: limits.orDefaults(),
		ready: make(chan net.Conn), failed: make(chan error), done: make(chan struct{}),
	}
	l.running.Go(l.accept)
	return l
}

type listener struct {
	net.Listener
	config *tls.Config
	limits Limits

	ready   chan net.Conn
	failed  chan error
	done    chan struct{}
	closing sync.Once
	running sync.WaitGroup

	mu      sync.Mutex // guards waiting
	waiting list.List  // of net.Conn: the handshakes in progress, oldest first
}

// Accept returns the next connection with a completed handshake.
func (l *listener) Accept() (net.Conn, error) {
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
func (l *listener) Close() error {
	var err error
	l.closing.Do(func() {
		close(l.done)
		err = l.Listener.Close()
		l.mu.Lock()
		for e := l.waiting.Front(); e != nil; e = e.Next() {
			_ = e.Value.(net.Conn).Close() // dropped: its error has no reader
		}
		l.mu.Unlock()
	})
	l.running.Wait()
	return err
}

func (l *listener) accept() {
	for {
		conn, err := l.Listener.Accept()
		if err == nil {
			e := l.begin(conn)
			l.running.Go(func() { l.handshake(conn, e) })
			continue
		}
		select {
		case l.failed <- err: // the caller of Accept decides when to retry
		case <-l.done:
			return
		}
	}
}

// begin registers a handshake, and drops the oldest one if the limit is reached.
func (l *listener) begin(conn net.Conn) *list.Element {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting.Len() >= l.limits.Handshakes {
		oldest := l.waiting.Front()
		_ = oldest.Value.(net.Conn).Close() // its handshake fails and cleans up
		l.waiting.Remove(oldest)
	}
	select {
	case <-l.done: // Close has already walked the list
		_ = conn.Close()
	default:
	}
	return l.waiting.PushBack(conn)
}

func (l *listener) handshake(raw net.Conn, e *list.Element) {
	ctx, cancel := context.WithTimeout(context.Background(), l.limits.Handshake)
	defer cancel()
	conn := tls.Server(raw, l.config)
	err := conn.HandshakeContext(ctx)
	l.mu.Lock()
	l.waiting.Remove(e) // no effect if begin has removed it
	l.mu.Unlock()
	if err != nil {
		l.limits.Log.Info("TLS handshake refused", "client", raw.RemoteAddr().String(), "error", err.Error())
		_ = raw.Close() // the handshake's error is logged
		return
	}
	select {
	case l.ready <- conn:
	case <-l.done:
		_ = conn.Close() // never returned by Accept
	}
}
