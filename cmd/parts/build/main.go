// Command build builds the servers that are Go programs, so that no test has to wait for a build. A server that
// cannot be built on this machine is reported and is not a failure: the tests that need it skip.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/pawlsec/pawl/cmd/parts"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "parts: error: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var binaries parts.Binaries
	vault, _, vaultErr := binaries.Vault(ctx)
	if err := report(vaultErr, vault); err != nil {
		return err
	}
	server, agent, spireErr := binaries.SPIRE(ctx)
	return report(spireErr, server, agent)
}

func report(err error, paths ...string) error {
	if errors.Is(err, parts.ErrMissing) {
		fmt.Fprintf(os.Stderr, "parts: %v\n", err)
		return nil
	}
	if err != nil {
		return err
	}
	for _, path := range paths {
		fmt.Println(path)
	}
	return nil
}
