// Package profiled runs a broker that records profiles of itself.
package profiled

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/pprof"

	"github.com/pawlsec/pawl/cmd/wire"
)

// Command is the argument that makes the program of the measurements such a broker, before the file for the profiles and
// the arguments of `pawl`.
const Command = "broker"

// allocations is the end of the name of the profile of memory.
const allocations = ".mem"

// Run runs the broker of a configuration until ctx ends. Then it writes a CPU profile to file, and one of the
// memory beside it: all allocations, and the live heap.
func Run(ctx context.Context, file, config string) (err error) {
	c, err := wire.ReadConfig(config)
	if err != nil {
		return err
	}
	cpu, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cpu.Close()) }()
	if err := pprof.StartCPUProfile(cpu); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	s, err := wire.Start(ctx, c, log)
	if err != nil {
		return err
	}
	defer s.Close()
	log.Info("serving", "agents", s.Agents().String())
	select {
	case <-ctx.Done():
	case err := <-s.Failed():
		return err
	}
	memory, err := os.Create(file + allocations)
	if err != nil {
		return err
	}
	if err := pprof.Lookup("allocs").WriteTo(memory, 0); err != nil {
		return errors.Join(fmt.Errorf("writing the profile of memory: %w", err), memory.Close())
	}
	s.Drain()
	return memory.Close()
}
