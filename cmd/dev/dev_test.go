package dev_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestStartAndClose holds that the parts that Start starts serve, that the configuration file describes them, and
// that Close leaves nothing behind.
func TestStartAndClose(t *testing.T) {
	parts.NeedVault(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var progress strings.Builder
	e, err := dev.Start(ctx, dev.Config{NoPostgres: true, Progress: &progress})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if c, err := wire.ReadConfig(e.ConfigFile); err != nil || fmt.Sprint(c) != fmt.Sprint(e.Config) {
		t.Errorf("ReadConfig(%s) = %+v, %v, want %+v", e.ConfigFile, c, err, e.Config)
	}
	if err := e.Broker.Vault.Ready(); err != nil {
		t.Errorf("Ready() = %v right after Start", err)
	}
	if e.Postgres != nil || e.Database != "" || !strings.Contains(progress.String(), "starting the broker") {
		t.Errorf("Start with NoPostgres has the database %q and the progress %q", e.Database, &progress)
	}
	addresses := []string{e.Broker.Agents().String(), e.Broker.Operators().String(),
		strings.TrimPrefix(e.Vault.Address(), "https://")}
	e.Close()
	for _, a := range addresses {
		if conn, err := net.Dial("tcp", a); err == nil {
			_ = conn.Close()
			t.Errorf("%s answers after Close", a)
		}
	}
	if _, err := os.Stat(e.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Stat(%s) = %v after Close, want that it does not exist", e.Dir, err)
	}
}
