// Bench measures Pawl and its alternatives in the same run, and writes the table, build/bench.json, a chart and
// docs/performance.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"

	"github.com/pawlsec/pawl/cmd/bench/against"
	"github.com/pawlsec/pawl/cmd/bench/flooder"
	"github.com/pawlsec/pawl/cmd/bench/profiled"
	"github.com/pawlsec/pawl/cmd/wire"
)

func main() {
	wire.PaceCollector() // as the broker does, for the rows that measure the engine in process
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench: error: "+err.Error())
		os.Exit(1)
	}
}

func command(ctx context.Context, args []string) error {
	if len(args) == 2 && args[0] == flooderCommand {
		return flooder.Run(ctx, args[1])
	}
	if len(args) == 5 && args[0] == profiled.Command { // broker FILE server --config FILE
		return profiled.Run(ctx, args[1], args[4])
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	var o options
	flags.BoolVar(&o.quick, "quick", false, "fewer rounds and sizes, in under three minutes")
	flags.StringVar(&o.root, "C", ".", "root of the source tree")
	flags.BoolVar(&o.page, "page", true, "write docs/performance.md and its chart; only with all sections")
	flags.StringVar(&o.profile, "cpuprofile", "", "file for a CPU profile of this process, which runs the engine's rows")
	flags.StringVar(&o.profileBroker, "profile-broker", "",
		"file for a CPU profile of the broker, which this program then runs instead of pawl; the memory's is beside it, in FILE.mem")
	rows := flags.String("rows", "", "beginnings of the names of the rows to measure, with commas; empty: all")
	only := flags.String("only", "", "regular expression of the sections to measure; empty: all")
	gate := flags.Bool("gate", false, "fail when a ratio is more than twice its bound in three runs out of three")
	flags.DurationVar(&o.soak, "soak", 0, "keep a load on the broker for this time, and compare its memory at the end with that after a sixth of the time, ten minutes at most")
	older := flags.String("against", "", "run an older commit of this repository in turns with this tree, and compare their rows")
	rounds := flags.Int("rounds", 4, "with -against: how often each build is run")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var err error
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("%q is no flag: `go run ./cmd/bench -h` lists them", flags.Arg(0))
	case *older != "" && *gate:
		return errors.New("-gate holds the rows of one build, and -against compares two: give one of them")
	}
	if o.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if o.root, err = filepath.Abs(o.root); err != nil {
		return err
	}
	if *rows != "" {
		o.rows = strings.Split(*rows, ",")
	}
	if o.profileBroker != "" {
		if o.profileBroker, err = filepath.Abs(o.profileBroker); err != nil {
			return err
		}
	}
	o.page = o.page && *only == "" && *rows == "" && o.profileBroker == ""
	if o.profile != "" {
		f, err := os.Create(o.profile)
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // reading a truncated profile fails
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	if *older != "" {
		return compare(ctx, against.Config{Root: o.root, Commit: *older, Rounds: *rounds, Quick: o.quick, Only: *only, Log: os.Stderr})
	}
	ctx, cancel := context.WithTimeout(ctx, 90*time.Minute+o.soak)
	defer cancel()
	if *gate {
		return held(ctx, o, sections)
	}
	_, err = run(ctx, o, sections)
	return err
}

// compare prints the rows of an older commit beside those of this tree, and stores them in build/against.json.
func compare(ctx context.Context, c against.Config) error {
	compared, err := against.Run(ctx, c)
	if err != nil {
		return err
	}
	compared.Table(os.Stdout)
	return compared.WriteJSON(filepath.Join(c.Root, "build", "against.json"))
}

var sections = []section{
	{"policy", false, measurePolicy},
	{"ledger", false, measureLedger},
	{"fence", false, measureFence},
	{"resume", false, measureResume},
	{"first-fence", false, measureFirstFence},
	{"chains", false, measureChains},
	{"idle", true, measureIdle},
	{"connections", true, measureConnections},
	{"dead", true, measureDead},
	{"dead.pki", true, measureDeadCertificates},
	{"issue", true, measureIssue},
	{"chain", true, measureChain},
	{"stranger", true, measureStranger},
	{"events", true, measureEvents},
	{"vault-down", true, measureVaultDown},
	{"dead.many", true, measureDeadMany},
	{"hostile", true, measureHostile},
	{"flood", false, measureFlood},
	{"growth", false, measureGrowth},
	{"alone", false, measureAlone},
	{"soak", false, measureSoak},
}
