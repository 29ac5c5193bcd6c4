package main

import (
	"context"
	"errors"
	"path/filepath"
	"runtime"
	"time"
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
	var seconds, opening, bytes samples
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
	b.report.add(row{Name: "resume.100000.seconds", Unit: "s", N: grants,
		Against: "opening the ledger alone, which reads and checks the whole file; ours also resumes"}, seconds, opening)
	b.report.add(row{Name: "resume.bytes_per_grant", Unit: "bytes", N: grants,
		Note: "of heap, after a collection"}, bytes, nil)
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
