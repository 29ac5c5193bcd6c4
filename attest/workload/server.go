// Package workload is a SPIFFE Workload API server for development and tests. It issues the identities of one trust
// domain. Its keys live in memory and end with the process.
//
// There are two kinds of socket. [Server.Listen] identifies a client like a real agent does: the kernel reports the
// process, and Config.Identify maps it to identities. [Server.Socket] gives every client the same identity, so that one
// process can have several. [Server.Source] does the same without a socket. A rotation is pushed to all clients at
// once.
package workload

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	pb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
)

// defaultSVIDTTL is the default lifetime of an SVID.
const defaultSVIDTTL = 5 * time.Minute

// Config configures a [Server].
type Config struct {
	TrustDomain string                   // its name, without scheme; required
	SVIDTTL     time.Duration            // lifetime of X.509- and JWT-SVIDs; zero means 5 min
	Now         func() time.Time         // nil means time.Now
	Identify    func(Peer) []spiffeid.ID // identities of a client of Listen, the default first; nil means none
}

// Peer is the process at the other end of a unix socket, as the kernel reported it at the time of the connection. The
// kernel may have reused the pid since: good enough for development.
type Peer struct {
	UID, GID uint32
	PID      int32
}

// Server issues SVIDs and serves them. Safe for concurrent use.
type Server struct {
	td       spiffeid.TrustDomain
	ttl      time.Duration
	now      func() time.Time
	identify func(Peer) []spiffeid.ID

	mu          sync.Mutex  // guards the fields below
	authorities []authority // oldest first; the last one signs
	svids       map[spiffeid.ID]*x509svid.SVID
	changed     chan struct{} // closed and replaced at every rotation
	sockets     map[spiffeid.ID]string
	dir         string // of the sockets; empty until there is one
	closed      bool

	servers []*grpc.Server
	serving sync.WaitGroup
}

// New returns a server with a first authority. It does not listen yet.
func New(c Config) (*Server, error) {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil || td.Name() != c.TrustDomain {
		return nil, fmt.Errorf("workload: TrustDomain %.260q is not the name of a trust domain", c.TrustDomain)
	}
	if c.SVIDTTL < 0 {
		return nil, errors.New("workload: SVIDTTL is negative")
	}
	if c.SVIDTTL == 0 {
		c.SVIDTTL = defaultSVIDTTL
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Identify == nil {
		c.Identify = func(Peer) []spiffeid.ID { return nil }
	}
	s := &Server{
		td: td, ttl: c.SVIDTTL, now: c.Now, identify: c.Identify,
		svids: map[spiffeid.ID]*x509svid.SVID{}, changed: make(chan struct{}), sockets: map[spiffeid.ID]string{},
	}
	return s, s.RotateAuthority()
}

// ID returns the SPIFFE ID with the given path ("/agent/planner") in the server's trust domain. It panics if the path
// is not valid: callers must pass a literal.
func (s *Server) ID(path string) spiffeid.ID { return spiffeid.RequireFromPath(s.td, path) }

// Listen serves the Workload API on a unix socket at path. Config.Identify determines the identities of each client.
// Every local user may connect. Listen returns the address for SPIFFE_ENDPOINT_SOCKET.
func (s *Server) Listen(path string) (addr string, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return "", fmt.Errorf("workload: resolving the socket's path: %w", err)
	}
	removeStale(path)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.listenLocked(path, 0o666, api{server: s, identify: s.peerIDs}, grpc.Creds(peerCredentials{}))
}

// removeStale removes a socket that a killed process has left behind. It keeps a socket in use and any other kind of
// file: Listen then fails.
func removeStale(path string) {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != os.ModeSocket {
		return
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		_ = conn.Close() // it only proved that the socket is in use
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		_ = os.Remove(path) // net.Listen returns a clearer error
	}
}

// Socket serves the Workload API on a separate unix socket, on which every client has the identity id. Only the user of
// this process can connect. Socket returns the address for SPIFFE_ENDPOINT_SOCKET. A second call with the same id
// returns the same address.
func (s *Server) Socket(id spiffeid.ID) (addr string, err error) {
	if err := s.member(id); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if addr, ok := s.sockets[id]; ok {
		return addr, nil
	}
	if s.dir == "" && !s.closed {
		if s.dir, err = os.MkdirTemp("", "spiffe-"); err != nil { // 0700
			return "", fmt.Errorf("workload: making a directory for sockets: %w", err)
		}
	}
	path := filepath.Join(s.dir, strconv.Itoa(len(s.sockets)))
	addr, err = s.listenLocked(path, 0o600, api{server: s, identify: always(id)})
	if err == nil {
		s.sockets[id] = addr
	}
	return addr, err
}

func (s *Server) listenLocked(path string, mode os.FileMode, a api, opts ...grpc.ServerOption) (string, error) {
	if s.closed {
		return "", errors.New("workload: the server is closed")
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", fmt.Errorf("workload: listening: %w", err)
	}
	if err := os.Chmod(path, mode); err != nil {
		_ = l.Close() // the error of chmod is returned
		return "", fmt.Errorf("workload: opening the socket to clients: %w", err)
	}
	g := grpc.NewServer(append(opts, grpc.UnaryInterceptor(requireHeader), grpc.StreamInterceptor(requireHeaderOfStream))...)
	pb.RegisterSpiffeWorkloadAPIServer(g, a)
	s.servers = append(s.servers, g)
	s.serving.Go(func() { _ = g.Serve(l) }) // ends with Close; its clients notice a broken listener
	return "unix://" + path, nil
}

// Close ends every stream and removes the sockets. It returns when all goroutines have ended.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	servers, dir := s.servers, s.dir
	s.servers, s.dir = nil, ""
	s.mu.Unlock()
	for _, g := range servers {
		g.Stop()
	}
	s.serving.Wait()
	if dir == "" {
		return nil
	}
	return os.RemoveAll(dir)
}

// member returns an error if the identity is not a workload of the trust domain.
func (s *Server) member(id spiffeid.ID) error {
	if !id.MemberOf(s.td) || id.Path() == "" {
		return fmt.Errorf("workload: %q is not a workload of trust domain %q", id, s.td.Name())
	}
	return nil
}
