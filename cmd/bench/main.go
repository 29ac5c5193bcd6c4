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
	"syscall"
	"time"

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

// options are the flags of the command line.
type options struct {
	quick   bool
	root    string         // of the source tree: build/ and docs/ are below it
	only    *regexp.Regexp // sections to measure
	page    bool           // write docs/performance.md
	profile string         // of this process; empty: none
}

func command(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	var o options
	flags.BoolVar(&o.quick, "quick", false, "fewer rounds and sizes, in under three minutes")
	flags.StringVar(&o.root, "C", ".", "root of the source tree")
	flags.BoolVar(&o.page, "page", true, "write docs/performance.md and its chart; only with all sections")
	flags.StringVar(&o.profile, "cpuprofile", "", "file for a CPU profile of this process, which runs the engine's rows")
	only := flags.String("only", "", "regular expression of the sections to measure; empty: all")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return err
	}
	if o.root, err = filepath.Abs(o.root); err != nil {
		return err
	}
	o.page = o.page && *only == ""
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
	ctx, cancel := context.WithTimeout(ctx, 90*time.Minute)
	defer cancel()
	return run(ctx, o)
}

// section is a part of the run. It leaves out of the report whatever it cannot measure, with the reason. Its error
// costs its rows and never ends the run.
type section struct {
	name string
	real bool // needs the real Vault, PostgreSQL and broker
	run  func(context.Context, *bench) error
}

var sections = []section{
	{"policy", false, measurePolicy},
	{"ledger", false, measureLedger},
	{"fence", false, measureFence},
	{"resume", false, measureResume},
	{"idle", true, measureIdle},
	{"dead", true, measureDead},
	{"dead.pki", true, measureDeadCertificates},
	{"issue", true, measureIssue},
	{"chain", true, measureChain},
	{"events", true, measureEvents},
	{"vault-down", true, measureVaultDown},
	{"dead.many", true, measureDeadMany},
}

// bench is one run.
type bench struct {
	options
	report report
	dir    string // for ledgers and files of this run, on the disk of the source tree
	world  *world // the real servers; nil until a section needs them
	broken error  // the reason why there is no world
}

// pick gives n in a whole run and quick in a quick one.
func pick[T any](b *bench, n, quick T) T {
	if b.quick {
		return quick
	}
	return n
}

// errLate is the reason why a quick run leaves out a long measurement.
var errLate = errors.New("a quick run had no time left for it")

// quickTime is the age at which a quick run starts no long measurement any more. The short sections at its end take
// ten seconds.
const quickTime = 165 * time.Second

// late reports whether a quick run has no time left for a measurement of this duration.
func (b *bench) late(takes time.Duration) bool {
	return b.quick && time.Since(b.report.began)+takes > quickTime
}

func run(ctx context.Context, o options) error {
	build := filepath.Join(o.root, "build")
	if err := os.MkdirAll(build, 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(build, "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // below build/, which `make clean` removes
	b := &bench{options: o, dir: dir}
	b.report.began = time.Now()
	b.report.machine = machine()
	defer func() {
		if b.broken == nil && b.world != nil {
			b.world.close()
		}
	}()
	for _, s := range sections {
		if !o.only.MatchString(s.name) {
			continue
		}
		// After an interrupt the report has the rows so far, and lists the sections that were left out.
		err := context.Cause(ctx)
		if err == nil {
			err = b.section(ctx, s)
		}
		if err != nil {
			b.report.leaveOut(s.name, err)
			fmt.Fprintf(os.Stderr, "bench: %s: left out: %v\n", s.name, err)
		}
	}
	b.report.took = time.Since(b.report.began)
	return b.write(build)
}

func (b *bench) section(ctx context.Context, s section) error {
	began := time.Now()
	fmt.Fprintf(os.Stderr, "bench: %s\n", s.name)
	if s.real && b.world == nil && b.broken == nil {
		b.world, b.broken = newWorld(ctx, b)
	}
	if s.real && b.broken != nil {
		return b.broken
	}
	err := s.run(ctx, b)
	fmt.Fprintf(os.Stderr, "bench: %s: %.1f s\n", s.name, time.Since(began).Seconds())
	return err
}

// write prints the table and stores everything.
func (b *bench) write(build string) error {
	r := &b.report
	r.judge()
	r.table(os.Stdout)
	if err := r.writeJSON(filepath.Join(build, "bench.json")); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(build, "bench.svg"), []byte(r.chart()), 0o644); err != nil {
		return err
	}
	if !b.page {
		return nil
	}
	docs := filepath.Join(b.root, "docs")
	if err := os.MkdirAll(docs, 0o755); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(docs, "performance.svg"), []byte(r.chart()), 0o644),
		os.WriteFile(filepath.Join(docs, "performance.md"), []byte(r.page(b.quick)), 0o644))
}
