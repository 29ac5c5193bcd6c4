package attest

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Limits bound the share of a client in a listener, and the lifetime of a connection. A connection without an SVID is
// one whose handshake is not complete, or that has sent no client certificate.
type Limits struct {
	Handshake  time.Duration // time for a TLS handshake; zero means 5 s
	Handshakes int           // concurrent handshakes; zero means 512
	Computing  int           // handshakes that compute at a time; zero means half of the processors
	First      time.Duration // time from the handshake to the first request; zero means 10 s
	Age        time.Duration // age at which a connection is closed, between requests; zero means 5 min
	Idle       time.Duration // time without a request; zero means 1 min
	Header     time.Duration // time to read a request's header; zero means 5 s
	Body       time.Duration // time to read a body; over HTTP/1.1 a handler may set another; zero means 10 s
	HeaderSize int           // size of a request's header in bytes; zero means 32 KiB

	Each      int // connections of one SPIFFE ID; zero means 128
	Address   int // connections without an SVID from one address (IPv6: one /64); zero means 64
	Strangers int // connections without an SVID from all addresses; zero means 4096
	Most      int // connections of all kinds; zero means 16384

	// Peer adds what is known of a connection's peer to the context of its requests; nil adds nothing.
	Peer func(context.Context, net.Conn) context.Context

	Log     *slog.Logger       // for refused connections, a line a second at the most; nil means no log
	Now     func() time.Time   // the clock for Age; nil means time.Now
	Refused func(limit string) // is called for each connection that a limit refuses or ends; nil means no call
}

// The names of the limits, for Refused.
const (
	LimitHandshakes = "handshakes"
	LimitEach       = "connections"
	LimitAddress    = "address_connections"
	LimitStrangers  = "stranger_connections"
	LimitMost       = "all_connections"
)

func (l Limits) orDefaults() Limits {
	orDefault(&l.Handshake, 5*time.Second)
	orDefault(&l.Handshakes, 512)
	orDefault(&l.Computing, halfOfThem())
	orDefault(&l.Age, 5*time.Minute)
	orDefault(&l.Idle, time.Minute)
	orDefault(&l.Header, 5*time.Second)
	orDefault(&l.Body, 10*time.Second)
	orDefault(&l.HeaderSize, 32<<10)
	orDefault(&l.First, 10*time.Second)
	orDefault(&l.Each, 128)
	orDefault(&l.Address, 64)
	orDefault(&l.Strangers, 4096)
	orDefault(&l.Most, 16384)
	if l.Log == nil {
		l.Log = slog.New(slog.DiscardHandler)
	}
	if l.Now == nil {
		l.Now = time.Now
	}
	if l.Refused == nil {
		l.Refused = func(string) {}
	}
	return l
}

func orDefault[T int | time.Duration](v *T, value T) {
	if *v <= 0 {
		*v = value
	}
}

// Server returns an http.Server for h with the limits. Use it with a [Listener]. It does not limit the time for
// responses: some are streams, so the handler must. A connection beyond its age completes its requests and closes with
// the next response. On HTTP/2 it sends GOAWAY, which does not affect running streams.
func Server(h http.Handler, limits Limits) *http.Server {
	l := limits.orDefaults()
	type bornKey struct{}
	return &http.Server{
		MaxHeaderBytes:    l.HeaderSize,
		ReadHeaderTimeout: l.Header,
		IdleTimeout:       l.Idle,
		// A body has at most 64 KiB. The defaults keep 1 MiB of unread bodies for each connection, and read frames of 1 MiB.
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: 256 << 10, MaxReceiveBufferPerStream: 64 << 10,
			MaxReadFrameSize: 16 << 10},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			ctx = context.WithValue(ctx, bornKey{}, l.Now())
			if c := boundOf(c); c != nil {
				ctx = context.WithValue(ctx, boundKey{}, c)
			}
			if l.Peer != nil {
				ctx = l.Peer(ctx, c)
			}
			return ctx
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, bounded := r.Context().Value(boundKey{}).(*bound)
			if bounded {
				defer c.begin()()
			}
			born, ok := r.Context().Value(bornKey{}).(time.Time)
			if ok && l.Now().Sub(born) >= l.Age || bounded && c.over != nil {
				w.Header().Set("Connection", "close")
			}
			if r.ContentLength != 0 {
				defer within(l.Body, r, http.NewResponseController(w))()
			}
			h.ServeHTTP(w, r)
		}),
	}
}

// within lets the reads of a request's body fail after d. Over HTTP/1.1 that holds after the handler too: net/http reads
// the rest of a body that the handler leaves, for as long as it takes. Over HTTP/2 it drops the rest, and each deadline is
// a message to the goroutine of the connection: it is set only after that time. A test's recorder has no socket, so
// the errors are ignored.
func within(d time.Duration, r *http.Request, control *http.ResponseController) (stop func()) {
	if r.ProtoMajor == 1 {
		_ = control.SetReadDeadline(time.Now().Add(d))
		return func() {}
	}
	set := make(chan struct{})
	timer := time.AfterFunc(d, func() {
		defer close(set)
		_ = control.SetReadDeadline(time.Unix(1, 0))
	})
	return func() {
		if !timer.Stop() {
			<-set // net/http ends the process when the request is over before it
		}
	}
}
