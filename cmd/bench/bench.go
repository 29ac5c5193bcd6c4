package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// options are the flags of the command line.
type options struct {
	quick   bool
	root    string         // of the source tree: build/ and docs/ are below it
	only    *regexp.Regexp // sections to measure
	rows    []string       // rows to measure, where a section can measure a part of its rows; empty: all
	soak    time.Duration  // of the load that shows growth; zero: none
	page    bool           // write docs/performance.md
	profile string         // of this process; empty: none

	profileBroker string // file for a profile of the broker; empty: none
}

// section is a part of the run. It leaves out of the report whatever it cannot measure, with the reason. Its error
// costs its rows and never ends the run.
type section struct {
	name string
	real bool // needs the real Vault, PostgreSQL and broker
	run  func(context.Context, *bench) error
}

// bench is one run.
type bench struct {
	options
	report report.Report
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

// wants reports whether a row with this prefix is to be measured.
func (b *bench) wants(prefix string) bool {
	return len(b.rows) == 0 || slices.ContainsFunc(b.rows, func(row string) bool { return strings.HasPrefix(row, prefix) })
}

// errNoPostgres is the reason why a machine has no rows of PostgreSQL.
var errNoPostgres = errors.New("there is no PostgreSQL on this machine")

// errLate is the reason why a quick run leaves out a long measurement.
var errLate = errors.New("a quick run had no time left for it")

// quickTime is the age at which a quick run starts no long measurement any more. The short sections at its end take
// ten seconds.
const quickTime = 165 * time.Second

// late reports whether a quick run has no time left for a measurement of this duration.
func (b *bench) late(takes time.Duration) bool {
	return b.quick && time.Since(b.report.Began)+takes > quickTime
}

// run measures the sections, and writes the report.
func run(ctx context.Context, o options, sections []section) (*report.Report, error) {
	build := filepath.Join(o.root, "build")
	if err := os.MkdirAll(build, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(build, "bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // below build/, which `make clean` removes
	b := &bench{options: o, dir: dir}
	b.report.Began = time.Now()
	b.report.Machine = process.Machine()
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
			b.report.LeaveOut(s.name, err)
			fmt.Fprintf(os.Stderr, "bench: %s: left out: %v\n", s.name, err)
		}
	}
	b.report.Took = time.Since(b.report.Began)
	return &b.report, b.write(build)
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
	r.Judge()
	r.Table(os.Stdout)
	if err := r.WriteJSON(filepath.Join(build, "bench.json")); err != nil {
		return err
	}
	if len(b.rows) > 0 { // a part of a run that has drawn its chart
		return nil
	}
	if err := os.WriteFile(filepath.Join(build, "bench.svg"), []byte(r.Chart()), 0o644); err != nil {
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
		os.WriteFile(filepath.Join(docs, "performance.svg"), []byte(r.Chart()), 0o644),
		os.WriteFile(filepath.Join(docs, "performance.md"), []byte(r.Page(b.quick)), 0o644),
		promise(filepath.Join(docs, "promises.md"), r))
}

// promise writes the figures of this run beside the bounds of docs/promises.md.
func promise(page string, r *report.Report) error {
	old, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	text, err := report.Promises(string(old), r.Rows())
	if err != nil {
		return err
	}
	return os.WriteFile(page, []byte(text), 0o644)
}
