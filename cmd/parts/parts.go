// Package parts finds or builds the real servers that Pawl works with (Vault, SPIRE, PostgreSQL, sshd, poolers) and runs
// them for development and tests.
//
// Every server listens on a free loopback port and keeps its data in a temporary directory of its own. It ends
// together with the process that started it, even if that process is killed. The context of a constructor bounds only
// the start; Close ends the server.
package parts

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
)

// ErrMissing reports that this machine lacks something that a server needs. The error that wraps it names the missing
// part and how to get it.
var ErrMissing = errors.New("not on this machine")

func missing(part, remedy string) error {
	return fmt.Errorf("%s: %w: %s", part, ErrMissing, remedy)
}

// freePort returns a loopback TCP port without a listener. It stays below the range that systems use for outgoing
// connections, so that a server finds its port free again after a restart.
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
