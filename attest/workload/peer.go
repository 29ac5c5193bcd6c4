package workload

import (
	"context"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"
)

// peerCredentials are transport credentials that take the word of the kernel for who is at
// the other end of a unix socket. They protect nothing: the bytes stay on this machine.
type peerCredentials struct{}

type peerInfo struct{ Peer }

// AuthType names the kind of credential.
func (peerInfo) AuthType() string { return "unix-peer" }

// ServerHandshake asks the kernel.
func (peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("not a unix socket")
	}
	raw, err := unix.SyscallConn()
	if err != nil {
		return nil, nil, fmt.Errorf("reaching the socket: %w", err)
	}
	var p Peer
	var asked error
	if err := raw.Control(func(fd uintptr) { p, asked = peerOf(int(fd)) }); err != nil {
		return nil, nil, fmt.Errorf("reaching the socket: %w", err)
	}
	if asked != nil {
		return nil, nil, fmt.Errorf("asking for the peer's credentials: %w", asked)
	}
	return conn, peerInfo{p}, nil
}

// ClientHandshake is the server's counterpart and never used.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

// Info describes the credentials to gRPC.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

// Clone copies them.
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName does nothing: there is no name to verify.
func (peerCredentials) OverrideServerName(string) error { return nil }
