package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
)

// certificate returns the current SVID as a TLS client certificate.
func certificate(source x509svid.Source) (*tls.Certificate, error) {
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("the broker's own SVID: %w", err)
	}
	c := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, cert := range svid.Certificates {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c, nil
}

func jwtFor(svids *svidSource, audience string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, identityWait) // a Workload API that hangs must not hold up the report of that
		defer cancel()
		svids.await(ctx)         // otherwise the first login of a start may be too early
		if svids.id().IsZero() { // without a subject the Workload API gives the first of several
			_, err := svids.GetX509SVID()
			return "", fmt.Errorf("the broker's own JWT-SVID: %w", err)
		}
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, Subject: svids.id()}, svids.options...)
		if err != nil {
			return "", fmt.Errorf("the broker's own JWT-SVID: %w", err)
		}
		return svid.Marshal(), nil
	}
}

// operators authenticates operators: the listed SPIFFE IDs over TLS, and root and the broker's own user
// over the local socket. The socket needs no SVID, so that revoking works when the broker's own SVID has
// expired.
type operators struct {
	listed []string
	a      *attest.Attestor
}

func newOperators(listed []string, a *attest.Attestor) operators { return operators{listed, a} }

func (o operators) identify(r *http.Request) (broker.Operator, error) {
	if peer, ok := r.Context().Value(peerKey{}).(peerUser); ok {
		if peer.err != nil || peer.uid != 0 && int(peer.uid) != os.Getuid() {
			return broker.Operator{}, broker.Errorf(broker.Unauthenticated, "operator",
				"only root and the broker's own user may use this socket")
		}
		return broker.LocalOperator(peer.uid), nil
	}
	c, err := o.a.Identify(r)
	if err != nil {
		return broker.Operator{}, err
	}
	if !slices.Contains(o.listed, c.ID.String()) {
		return broker.Operator{}, broker.Errorf(broker.Unauthenticated, "operator",
			"%s is not an operator of this broker", c.ID)
	}
	return broker.Operator{Name: c.ID.String()}, nil
}

// peerKey is the context key of the peer's user on the local socket. It is in the context because
// net/http has no other way from a connection to its requests.
type peerKey struct{}

type peerUser struct {
	uid uint32
	err error
}

func withPeer(ctx context.Context, conn net.Conn) context.Context {
	uid, err := peerUID(conn)
	return context.WithValue(ctx, peerKey{}, peerUser{uid, err})
}

func peerUID(conn net.Conn) (uint32, error) {
	if below, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = below.NetConn()
	}
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var uid uint32
	var credErr error
	if err := raw.Control(func(fd uintptr) { uid, credErr = socketUID(int(fd)) }); err != nil {
		return 0, err
	}
	return uid, credErr
}

// serveSocket serves operators on a Unix socket. It replaces the socket of a process that died, and
// refuses a socket that answers: that belongs to another broker.
func (s *Server) serveSocket(path string, h http.Handler, log *slog.Logger) error {
	if conn, err := net.Dial("unix", path); err == nil {
		_ = conn.Close()
		return fmt.Errorf("%q is in use by another process", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return err
	}
	s.serveBounded("socket", h, l, nil, attest.Limits{Log: log, Address: s.files.socket, Strangers: s.files.socket,
		Most: s.files.socket, Peer: withPeer})
	return nil
}
