package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/goccy/go-yaml"

	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/wire"
)

// measureIdle measures an idle broker: memory, size on disk, time to start.
func measureIdle(ctx context.Context, b *bench) error {
	w := b.world
	ours, err := process.Resident(w.broker.PID())
	if err != nil {
		return err
	}
	var beside report.Samples
	if theirs, err := process.Resident(w.vaultPID); err == nil {
		beside = report.Samples{theirs / 1e6}
	}
	b.report.Add(report.Row{Name: "idle.rss_mb", Unit: "MB",
		Against: "Vault", Note: "after one step"}, report.Samples{ours / 1e6}, beside)
	if err := b.binarySize(); err != nil {
		return err
	}
	return b.coldStart(ctx)
}

func (b *bench) binarySize() error {
	info, err := os.Stat(b.world.program)
	if err != nil {
		return err
	}
	var beside report.Samples
	if vault, err := os.Stat(fmt.Sprintf("/proc/%d/exe", b.world.vaultPID)); err == nil {
		beside = report.Samples{float64(vault.Size()) / 1e6}
	}
	b.report.Add(report.Row{Name: "binary.size_mb", Unit: "MB",
		Against: "the Vault server of this run, built with six engines"},
		report.Samples{float64(info.Size()) / 1e6}, beside)
	return nil
}

// coldStart times from starting the program to serving, while the other broker runs.
func (b *bench) coldStart(ctx context.Context) error {
	c, err := wire.ReadConfig(b.world.config)
	if err != nil {
		return err
	}
	dir := filepath.Join(b.dir, "cold")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	c.Listen.Socket, c.Ledger = filepath.Join(dir, "s"), filepath.Join(dir, "ledger.db")
	c.Listen.Operators = "" // the other broker has the address
	for name, backend := range c.Backends {
		if backend.KRL != "" {
			backend.KRL = filepath.Join(dir, "krl")
			c.Backends[name] = backend
		}
	}
	raw, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "pawl.yaml")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		return err
	}
	var took report.Samples
	for range pick(b, 5, 3) {
		p, err := process.StartBroker(ctx, []string{b.world.program}, file, filepath.Join(dir, "log"))
		if err != nil {
			return err
		}
		took = append(took, p.Started.Seconds())
		if err := errors.Join(p.Stop(), os.RemoveAll(c.Ledger), os.RemoveAll(c.Ledger+".reserve")); err != nil {
			return err
		}
	}
	b.report.Add(report.Row{Name: "coldstart.seconds", Unit: "s",
		Note: "from starting the program to serving, with a new ledger"}, took, nil)
	return nil
}
