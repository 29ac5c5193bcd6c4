package parts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// TB is the part of testing.TB that is used here, so that no program of ours links package testing.
type TB interface {
	Helper()
	Context() context.Context
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
}

// The servers that all tests of a process share. They live as long as the process, and their watchers end them. No
// test is certain to be the last one, and a Vault for each test would cost a second each.
var shared struct {
	vault    once[*VaultServer]
	postgres once[*PostgresServer]
	spire    once[*SPIREServers]
}

type once[T any] struct {
	sync.Once
	server T
	err    error
}

func (o *once[T]) get(start func() (T, error)) (T, error) {
	o.Do(func() { o.server, o.err = start() })
	return o.server, o.err
}

// NeedVault returns the Vault that the tests of this process share. Mount engines under names of your own, and do not
// seal, pause or end it. If there is none, the test is skipped, or fails if PAWL_REQUIRE names "vault". NeedVault
// builds nothing; `make parts` does.
func NeedVault(t TB) *VaultServer {
	t.Helper()
	server, err := shared.vault.get(func() (*VaultServer, error) {
		return Vault(t.Context(), VaultConfig{Binaries: Binaries{NoBuild: true}})
	})
	demand(t, "vault", err)
	return server
}

// OwnVault returns a Vault for this test alone, which may seal, pause and kill it. It is closed with the test.
func OwnVault(t TB, config VaultConfig) *VaultServer {
	t.Helper()
	config.Binaries.NoBuild = true
	server, err := Vault(t.Context(), config)
	demand(t, "vault", err)
	closeWith(t, server.Close)
	return server
}

// NeedPostgreSQL returns the cluster that the tests of this process share. Work in a database from CreateDatabase,
// and with roles under names of your own. It accepts 300 connections. It skips as NeedVault does, with "postgres".
func NeedPostgreSQL(t TB) *PostgresServer {
	t.Helper()
	server, err := shared.postgres.get(func() (*PostgresServer, error) {
		return PostgreSQL(t.Context(), PostgresConfig{NoSync: true, MaxConnections: 300})
	})
	demand(t, "postgres", err)
	return server
}

// OwnPostgreSQL returns a cluster for this test alone, closed with the test.
func OwnPostgreSQL(t TB, config PostgresConfig) *PostgresServer {
	t.Helper()
	server, err := PostgreSQL(t.Context(), config)
	demand(t, "postgres", err)
	closeWith(t, server.Close)
	return server
}

// NeedSPIRE returns the SPIRE server and agent that the tests of this process share. It skips as NeedVault does, with
// "spire".
func NeedSPIRE(t TB) *SPIREServers {
	t.Helper()
	servers, err := shared.spire.get(func() (*SPIREServers, error) {
		return SPIRE(t.Context(), SPIREConfig{Binaries: Binaries{NoBuild: true}})
	})
	demand(t, "spire", err)
	return servers
}

// OwnSPIRE returns a SPIRE server and agent for this test alone, closed with the test.
func OwnSPIRE(t TB, config SPIREConfig) *SPIREServers {
	t.Helper()
	config.Binaries.NoBuild = true
	servers, err := SPIRE(t.Context(), config)
	demand(t, "spire", err)
	closeWith(t, servers.Close)
	return servers
}

// OwnSSHD returns an sshd for this test alone, closed with the test. It skips as NeedVault does, with "sshd".
func OwnSSHD(t TB, config SSHDConfig) *SSHDServer {
	t.Helper()
	server, err := SSHD(t.Context(), config)
	demand(t, "sshd", err)
	closeWith(t, server.Close)
	return server
}

// NeedPython returns the path of a Python interpreter, for plugins in another language than Go. It skips as NeedVault
// does, with "python".
func NeedPython(t TB) string {
	t.Helper()
	path, err := Python(t.Context())
	demand(t, "python", err)
	return path
}

// Without ends a test that this machine cannot run although it has the part. It skips or fails as for a missing part.
func Without(t TB, name, why string) {
	t.Helper()
	demand(t, name, fmt.Errorf("%w: %s", ErrMissing, why))
}

// demand ends the test unless err is nil. A missing part skips the test, and a broken one fails it.
func demand(t TB, name string, err error) {
	t.Helper()
	switch {
	case err == nil:
	case !errors.Is(err, ErrMissing):
		t.Fatalf("%v", err)
	case required(name):
		t.Fatalf("PAWL_REQUIRE demands %s: %v", name, err)
	default:
		t.Skipf("NOT TESTED, %v", err)
	}
}

func required(name string) bool {
	names := strings.Split(os.Getenv("PAWL_REQUIRE"), ",")
	return slices.Contains(names, name) || slices.Contains(names, "all")
}

func closeWith(t TB, closeServer func() error) {
	t.Cleanup(func() {
		if err := closeServer(); err != nil {
			t.Errorf("closing a server: %v", err)
		}
	})
}

// NeedPostgreSQLProgram returns the path of a client program of the same installation as the servers, such as psql or
// pg_dump. If there is none, the test is skipped as in [NeedPostgreSQL].
func NeedPostgreSQLProgram(t TB, name string) string {
	t.Helper()
	bin, err := postgresBin()
	path := filepath.Join(bin, name)
	if err == nil {
		if _, err = os.Stat(path); err != nil {
			err = missing(name, "install the package postgresql-client, or put it beside the server's programs")
		}
	}
	demand(t, "postgres", err)
	return path
}
