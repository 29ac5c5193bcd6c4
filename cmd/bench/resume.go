package main

import (
	"context"
	"errors"
	"path/filepath"
	"runtime"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/store/bolt"
)

// measureResume starts an engine on a ledger with 100,000 live grants in 100 chains, as a restarted broker does.
func measureResume(ctx context.Context, b *bench) error {
	const chains, grants = 100, 100_000
	path := filepath.Join(b.dir, "resume.db")
	e, err := newEngine(ctx, path)
	if err != nil {
		return err
	}
	for range chains {
		if _, err := e.grow(ctx, grants/chains); err != nil {
			return errors.Join(err, e.close())
		}
	}
	if err := e.close(); err != nil {
		return err
	}
	var seconds, opening, bytes report.Samples
	for range pick(b, 5, 3) {
		before := heap()
		began := time.Now()
		e, err := newEngine(ctx, path)
		if err != nil {
			return err
		}
		seconds = append(seconds, time.Since(began).Seconds())
		bytes = append(bytes, (heap()-before)/grants)
		if err := e.close(); err != nil {
			return err
		}
		opened, err := openLedger(path)
		if err != nil {
			return err
		}
		opening = append(opening, opened.Seconds())
	}
	b.report.Add(report.Row{Name: "resume.100000.seconds", Unit: "s", N: grants,
		Against: "opening the ledger alone, which reads and checks the whole file; ours also resumes"}, seconds, opening)
	b.report.Add(report.Row{Name: "resume.bytes_per_grant", Unit: "bytes", N: grants,
		Note: "of heap, after a collection"}, bytes, nil)
	return nil
}

// measureFirstFence starts an engine on a ledger with 150,000 closed steps, and sets a fence at once.
func measureFirstFence(ctx context.Context, b *bench) error {
	const steps, entries = 150_000, 5
	path := filepath.Join(b.dir, "closed.db")
	e, err := newEngine(ctx, path)
	if err != nil {
		return err
	}
	_, err = e.growIn(ctx, steps, "p/", entries)
	chains := make([]selector.Selector, pick(b, 5, 3)) // a fence of each is new
	for i := range chains {
		d, opened := e.open(ctx)
		s, parsed := selector.Parse("chain:" + string(d.Chain))
		chains[i], err = s, errors.Join(err, opened, parsed)
	}
	if err := errors.Join(err, e.close()); err != nil {
		return err
	}
	var fence, check report.Samples
	for _, s := range chains {
		began := time.Now()
		ledger, err := bolt.OpenUnchecked(bolt.Config{Path: path, Reserve: -1})
		if err != nil {
			return err
		}
		if e, err = newEngineOn(ctx, ledger); err != nil {
			return err
		}
		if _, err := e.Revoke(ctx, broker.Operator{Name: "ada"}, selector.Request{Selector: s, Reason: "bench"}); err != nil {
			return errors.Join(err, e.close())
		}
		fence = append(fence, ms(time.Since(began)))
		<-ledger.Checked()
		check = append(check, ms(time.Since(began)))
		if err := errors.Join(ledger.Err(), e.close()); err != nil {
			return err
		}
	}
	b.report.Add(report.Row{Name: "fence.first.150000.ms", Unit: "ms", N: steps,
		Against: "the check of the whole file, for which a fence had to wait", Note: "from the start of the process's work"}, fence, check)
	return nil
}

// heap gives the allocated heap after a collection, in bytes.
func heap() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // collects the memory that finalizers and pools released in the first
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}
