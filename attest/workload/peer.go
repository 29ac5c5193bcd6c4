package workload

import (
	"context"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"
)

// peerCredentials are transport credentials that identify the peer of a unix socket by the kernel's report. They
// encrypt nothing: the bytes stay on this machine.
type peerCredentials struct{}

type peerInfo struct{ Peer }

// AuthType names the kind of credential.
func (peerInfo) AuthType() string { return "unix-peer" }

// ServerHandshake reads the peer's credentials from the kernel.
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
	var peerErr error
	if err := raw.Control(func(fd uintptr) { p, peerErr = peerOf(int(fd)) }); err != nil {
		return nil, nil, fmt.Errorf("reaching the socket: %w", err)
	}
	if peerErr != nil {
		return nil, nil, fmt.Errorf("reading the peer's credentials: %w", peerErr)
	}
	return conn, peerInfo{p}, nil
}

// ClientHandshake always fails: these credentials are for servers.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

// Info describes the credentials to gRPC.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

// Clone returns a copy.
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName does nothing: there is no name to verify.
func (peerCredentials) OverrideServerName(string) error { return nil }
