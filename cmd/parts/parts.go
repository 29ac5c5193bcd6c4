// Package parts finds or builds the real servers that Pawl works with (Vault, SPIRE, PostgreSQL, sshd) and runs
// them for development and tests.
//
// Every server listens on a free loopback port, keeps all it has in a temporary directory of its own, and ends
// together with the process that started it, also when that process is killed. The context given to a constructor
// bounds the start only; Close ends the server.
package parts

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
)

// ErrMissing says that this machine lacks something a server needs. The error that wraps it says what, and how to
// get it.
var ErrMissing = errors.New("not on this machine")

func missing(what, remedy string) error {
	return fmt.Errorf("%s: %w: %s", what, ErrMissing, remedy)
}

// freePort returns a loopback TCP port that nobody listens on. It stays below the range from which systems number
// outgoing connections, so that a server that is down for a moment finds its port free again.
func freePort() (int, error) {
	const low, high, tries = 20000, 32000, 50
	for range tries {
		port := low + rand.IntN(high-low)
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		return port, listener.Close()
	}
	return 0, fmt.Errorf("no free port between %d and %d in %d tries", low, high, tries)
}
