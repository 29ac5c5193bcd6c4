// Package workload is a SPIFFE Workload API server for development and tests: the identities
// of one trust domain, from keys that live in memory and end with the process.
//
// Two kinds of socket lead in. [Server.Listen] asks the kernel which process connected and
// Config.Identify who that is, as a real agent does. [Server.Socket] is one identity to
// everybody who reaches it, so that several can live in one process. [Server.Source] is the
// same without a socket. Everything connected sees a rotation at once.
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

// DefaultSVIDTTL is the life of an SVID where Config does not say.
const DefaultSVIDTTL = 5 * time.Minute

// Config is what a [Server] is made of.
type Config struct {
	TrustDomain string                   // its name, without scheme; required
	SVIDTTL     time.Duration            // life of X.509- and JWT-SVIDs; zero means DefaultSVIDTTL
	Now         func() time.Time         // nil means time.Now
	Identify    func(Peer) []spiffeid.ID // who a process on a Listen socket is, the default first; nil means nobody
}

// Peer is a process at the other end of a unix socket, as the kernel gave it when the process
// connected. A pid may since have passed to another process: good enough for development.
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

	mu          sync.Mutex  // guards what follows
	authorities []authority // oldest first; the last one signs
	svids       map[spiffeid.ID]*x509svid.SVID
	changed     chan struct{} // closed, and replaced, at every rotation
	sockets     map[spiffeid.ID]string
	dir         string // of the sockets; empty until the first
	closed      bool

	servers []*grpc.Server
	serving sync.WaitGroup
}

// New makes a server with a first authority. Nothing listens yet.
func New(c Config) (*Server, error) {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil || td.Name() != c.TrustDomain {
		return nil, fmt.Errorf("workload: TrustDomain %.260q is not the name of a trust domain", c.TrustDomain)
	}
	if c.SVIDTTL < 0 {
		return nil, errors.New("workload: SVIDTTL is negative")
	}
	if c.SVIDTTL == 0 {
		c.SVIDTTL = DefaultSVIDTTL
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

// TrustDomain is the server's trust domain.
func (s *Server) TrustDomain() spiffeid.TrustDomain { return s.td }

// ID is the SPIFFE ID with the given path ("/agent/planner") in the server's trust domain. It
// panics when the path is not valid: paths given here are literals.
func (s *Server) ID(path string) spiffeid.ID { return spiffeid.RequireFromPath(s.td, path) }

// Listen serves the Workload API on a unix socket at path, where a process is who
// Config.Identify says. Every local user may connect. It gives the address for
// SPIFFE_ENDPOINT_SOCKET.
func (s *Server) Listen(path string) (addr string, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return "", fmt.Errorf("workload: resolving the socket's path: %w", err)
	}
	removeStale(path)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.listenLocked(path, 0o666, api{server: s, identify: s.peerIDs}, grpc.Creds(peerCredentials{}))
}

// removeStale takes away a socket that a killed process has left behind. One in use stays, and
// so does whatever is not a socket: then listening fails.
func removeStale(path string) {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != os.ModeSocket {
		return
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		_ = conn.Close() // it only had to answer
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		_ = os.Remove(path) // listening tells better what is wrong
	}
}

// Socket serves the Workload API on a unix socket of its own, where everybody who connects is
// id; only the user running this process can. It gives the address for
// SPIFFE_ENDPOINT_SOCKET, the same one when asked again.
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
		_ = l.Close() // the chmod's error is the one to tell
		return "", fmt.Errorf("workload: opening the socket to clients: %w", err)
	}
	g := grpc.NewServer(append(opts, grpc.UnaryInterceptor(requireHeader), grpc.StreamInterceptor(requireHeaderOfStream))...)
	pb.RegisterSpiffeWorkloadAPIServer(g, a)
	s.servers = append(s.servers, g)
	s.serving.Go(func() { _ = g.Serve(l) }) // ends with Close; a listener that breaks is seen by its clients
	return "unix://" + path, nil
}

// Close ends every stream, removes the sockets, and returns when nothing runs any more.
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

// member refuses an identity that is not a workload's of the trust domain.
func (s *Server) member(id spiffeid.ID) error {
	if !id.MemberOf(s.td) || id.Path() == "" {
		return fmt.Errorf("workload: %q is not a workload of trust domain %q", id, s.td.Name())
	}
	return nil
}
