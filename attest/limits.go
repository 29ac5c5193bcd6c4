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

// Limits bound what a client can take up before anybody knows who it is, and how long a
// connection lives.
type Limits struct {
	Handshake  time.Duration // for a TLS handshake; zero means 5 s
	Handshakes int           // in progress at once; zero means 512
	Age        time.Duration // after which a connection is closed, between requests; zero means 5 min
	Idle       time.Duration // without a request; zero means 1 min
	Header     time.Duration // for reading a request's header; zero means 5 s
	HeaderSize int           // bytes of a request's header; zero means 32 KiB

	Log *slog.Logger     // of failed handshakes; nil means none
	Now func() time.Time // of Age; nil means time.Now
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

// Server is an http.Server for h within the limits, to be used with a [Listener]. Time for
// bodies and answers is the handler's matter, since some answers are streams. A connection
// past its age finishes what is under way and is closed with its next answer; on HTTP/2 by
// GOAWAY, which leaves running streams alone.
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

// Listener accepts TLS connections from inner and gives those whose handshake is done. A
// handshake beyond the limit drops the one that has waited longest: an honest one takes
// milliseconds, so those who hold theirs back drop each other. Close returns when nothing of
// it runs any more.
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
	waiting list.List  // of net.Conn, in a handshake, oldest first
}

// Accept gives the next connection whose handshake is done.
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
			_ = e.Value.(net.Conn).Close() // dropped: nobody waits for its end
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
		case l.failed <- err: // whoever accepts decides when to try again
		case <-l.done:
			return
		}
	}
}

// begin counts a handshake and makes room for it.
func (l *listener) begin(conn net.Conn) *list.Element {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting.Len() >= l.limits.Handshakes {
		oldest := l.waiting.Front()
		_ = oldest.Value.(net.Conn).Close() // its handshake fails and cleans up
		l.waiting.Remove(oldest)
	}
	select {
	case <-l.done: // Close has been through the list
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
	l.waiting.Remove(e) // nothing, when begin has done so
	l.mu.Unlock()
	if err != nil {
		l.limits.Log.Info("TLS handshake refused", "client", raw.RemoteAddr().String(), "error", err.Error())
		_ = raw.Close() // the handshake's error is the one that counts
		return
	}
	select {
	case l.ready <- conn:
	case <-l.done:
		_ = conn.Close() // never handed out
	}
}
