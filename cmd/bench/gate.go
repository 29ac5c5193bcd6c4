package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/pawlsec/pawl/cmd/bench/report"
)

// held measures the sections and holds the rows of build/bench.json to their bounds. It repeats the missed rows, up to
// three runs in all, and keeps the rows of the first run in the file, with the figures of the others.
func held(ctx context.Context, o options, sections []section) error {
	file := filepath.Join(o.root, "build", "bench.json")
	g := report.NewGate()
	var first []report.Row
	for again := o; ; {
		r, err := run(ctx, again, sections)
		if err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			if first != nil {
				err = errors.Join(err, report.WriteRows(file, first))
			}
			return fmt.Errorf("the gate was interrupted, and held nothing: %w", err)
		}
		if r.LeftOut("dead", errNoPostgres) {
			g.Without(errNoPostgres.Error(), "dead", "closed")
		}
		rows, err := report.ReadRows(file)
		if err != nil {
			return err
		}
		if g.Run(rows); first == nil {
			first = rows
		}
		repeat := g.Again()
		if len(repeat) == 0 {
			break
		}
		if again, err = narrowed(o, repeat); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "bench: gate: missed, and measured again: %s\n", strings.Join(again.rows, ", "))
	}
	g.Mark(first)
	g.Print(os.Stdout)
	if err := report.WriteRows(file, first); err != nil {
		return err
	}
	return g.Err()
}

// narrowed gives the options of a run that measures the rows of bounds alone.
func narrowed(o options, bounds []report.Bound) (options, error) {
	var names []string
	o.rows, o.page = nil, false
	for _, b := range bounds {
		o.rows, names = append(o.rows, b.Row), append(names, b.Section)
	}
	var err error
	o.only, err = regexp.Compile("^(" + strings.Join(names, "|") + ")$")
	return o, err
}
