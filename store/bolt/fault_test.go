package bolt_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/bolt"
)

// enter returns an update that puts key and appends an entry of op.
func enter(op broker.Op, key string) func(broker.Tx) error {
	return func(tx broker.Tx) error {
		if _, err := tx.Append(broker.Entry{At: brokertest.Epoch, Actor: "test", Op: op, Detail: key}); err != nil {
			return err
		}
		return tx.Put(key, []byte("value of "+key))
	}
}

// keys returns all keys of the ledger.
func keys(t testing.TB, l broker.Ledger) (list []string) {
	t.Helper()
	err := l.View(context.Background(), func(tx broker.Tx) error {
		return tx.Scan("", "", func(k string, _ []byte) bool {
			list = append(list, k)
			return true
		})
	})
	if err != nil {
		t.Fatalf("View = %v, want nil", err)
	}
	return list
}

// until waits until other goroutines make ok true.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("not true after 10 s: %s", what)
		}
	}
}

// faults makes the next commits fail, one for each error in next. A nil error lets a commit succeed.
type faults struct {
	at   bolt.Stage
	next chan error
}

func (f faults) strike(at bolt.Stage) error {
	if at != f.at {
		return nil
	}
	select {
	case err := <-f.next:
		return err
	default:
		return nil
	}
}

func TestFailBeforeCommit(t *testing.T) {
	f := faults{bolt.BeforeCommit, make(chan error, 1)}
	l := mustOpen(t, bolt.WithFault(bolt.Config{Path: filepath.Join(t.TempDir(), "ledger"), Reserve: -1}, f.strike))
	boom := errors.New("boom")
	f.next <- boom
	if err := l.Update(t.Context(), enter(broker.OpOpen, "a")); !errors.Is(err, broker.ErrNotCommitted) || !errors.Is(err, boom) {
		t.Errorf("Update = %v, want ErrNotCommitted and the cause", err)
	}
	if err := l.Update(t.Context(), enter(broker.OpOpen, "b")); err != nil {
		t.Errorf("the next Update = %v, want nil", err)
	}
	if got := keys(t, l); !slices.Equal(got, []string{"b"}) {
		t.Errorf("keys = %q, want b alone", got)
	}
	if err := l.Verify(t.Context()); err != nil {
		t.Errorf("Verify = %v, want nil", err)
	}
}

func TestFailAfterCommit(t *testing.T) {
	f := faults{bolt.AfterCommit, make(chan error, 1)}
	c := bolt.Config{Path: filepath.Join(t.TempDir(), "ledger"), Reserve: -1}
	l := mustOpen(t, bolt.WithFault(c, f.strike))
	boom := errors.New("boom")
	f.next <- boom
	if err := l.Update(t.Context(), enter(broker.OpOpen, "a")); !errors.Is(err, boom) || errors.Is(err, broker.ErrNotCommitted) {
		t.Errorf("Update = %v, want the cause and not ErrNotCommitted: the commit may have succeeded", err)
	}
	for range 2 {
		err := l.Update(t.Context(), enter(broker.OpFence, "b"))
		if !errors.Is(err, bolt.ErrStopped) || !errors.Is(err, broker.ErrNotCommitted) || !errors.Is(err, boom) {
			t.Errorf("Update after that = %v, want ErrStopped, ErrNotCommitted and the cause", err)
		}
	}
	if err := l.Err(); !errors.Is(err, bolt.ErrStopped) {
		t.Errorf("Err = %v, want ErrStopped", err)
	}
	if got := keys(t, l); !slices.Equal(got, []string{"a"}) {
		t.Errorf("a view reads %q, want a alone", got)
	}
	if err := l.Close(); err != nil {
		t.Fatalf("Close = %v, want nil", err)
	}
	l = mustOpen(t, c)
	if err := l.Update(t.Context(), enter(broker.OpOpen, "b")); err != nil {
		t.Errorf("Update after opening again = %v, want nil", err)
	}
	if got := keys(t, l); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("keys = %q, want a and b", got)
	}
}

// hang is a fault that blocks the writer before a commit until free receives.
type hang struct{ held, free chan struct{} }

func newHang() hang { return hang{make(chan struct{}), make(chan struct{})} }

func (h hang) strike(at bolt.Stage) error {
	if at == bolt.BeforeCommit {
		h.held <- struct{}{}
		<-h.free
	}
	return nil
}

func TestCancel(t *testing.T) {
	h := newHang()
	l := mustOpen(t, bolt.WithFault(bolt.Config{Path: filepath.Join(t.TempDir(), "ledger"), Reserve: -1}, h.strike))
	ran, waits := make(chan error, 1), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())

	go func() { ran <- l.Update(ctx, enter(broker.OpOpen, "ran")) }()
	<-h.held
	go func() { waits <- l.Update(ctx, enter(broker.OpOpen, "waits")) }()
	until(t, "one update waits", func() bool { return l.Waiting() == 1 })
	cancel()
	if err := <-waits; !errors.Is(err, context.Canceled) || !errors.Is(err, broker.ErrNotCommitted) {
		t.Errorf("an Update cancelled before it ran = %v, want Canceled and ErrNotCommitted", err)
	}
	select {
	case err := <-ran:
		t.Errorf("an Update cancelled after it ran = %v before the commit, want it to wait", err)
	default:
	}
	h.free <- struct{}{}
	if err := <-ran; err != nil {
		t.Errorf("an Update cancelled after it ran = %v, want nil: it was committed", err)
	}
	if got := keys(t, l); !slices.Equal(got, []string{"ran"}) {
		t.Errorf("keys = %q, want ran alone", got)
	}
}

func TestClose(t *testing.T) {
	h := newHang()
	l := mustOpen(t, bolt.WithFault(bolt.Config{Path: filepath.Join(t.TempDir(), "ledger"), Reserve: -1}, h.strike))
	results := make(chan error, 2)
	go func() { results <- l.Update(t.Context(), enter(broker.OpOpen, "a")) }()
	<-h.held
	go func() { results <- l.Update(t.Context(), enter(broker.OpOpen, "b")) }()
	until(t, "one update waits", func() bool { return l.Waiting() == 1 })
	closed := make(chan error, 1)
	go func() { closed <- l.Close() }()
	until(t, "the ledger closes", func() bool {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		before := l.Waiting()
		done := make(chan error, 1)
		go func() { done <- l.Update(ctx, enter(broker.OpOpen, "late")) }()
		until(t, "an answer, or a place in the queue", func() bool { return len(done) == 1 || l.Waiting() > before })
		cancel()
		return errors.Is(<-done, bolt.ErrClosed)
	})
	h.free <- struct{}{}
	<-h.held
	h.free <- struct{}{}
	for range 2 {
		if err := <-results; err != nil {
			t.Errorf("an Update that waited when the ledger was closed = %v, want nil", err)
		}
	}
	if err := <-closed; err != nil {
		t.Errorf("Close = %v, want nil", err)
	}
}

// full is the error of a write without disk space.
var full = &fs.PathError{Op: "write", Path: "ledger", Err: syscall.ENOSPC}

// TestFullDisk commits fences and other updates in one batch on a full disk.
func TestFullDisk(t *testing.T) {
	var clock brokertest.Clock
	var commits atomic.Int32
	h := newHang()
	strike := func(at bolt.Stage) error {
		if at != bolt.BeforeCommit {
			return nil
		}
		switch commits.Add(1) {
		case 1: // meanwhile the next batch is queued
			return h.strike(at)
		case 2:
			return full
		}
		return nil
	}
	path := filepath.Join(t.TempDir(), "ledger")
	l := mustOpen(t, bolt.WithFault(bolt.Config{Path: path, Reserve: 1 << 20, Now: clock.Now}, strike))
	if info, err := os.Stat(path + ".reserve"); err != nil || info.Size() != 1<<20 {
		t.Fatalf("the reserve is %v, %v, want 1 MiB", info, err)
	}

	go func() { _ = l.Update(t.Context(), enter(broker.OpOpen, "before")) }()
	<-h.held
	ops := []broker.Op{broker.OpIntent, broker.OpFence, broker.OpDelegate, broker.OpClosed, broker.OpEnd, broker.OpResume, broker.OpPolicy, broker.OpIssued}
	results := make([]error, len(ops))
	var wg sync.WaitGroup
	for i, op := range ops {
		wg.Go(func() { results[i] = l.Update(t.Context(), enter(op, string(op))) })
	}
	until(t, "all wait", func() bool { return l.Waiting() == len(ops) })
	h.free <- struct{}{}
	wg.Wait()
	if n := commits.Load(); n != 3 {
		t.Errorf("%d commits were tried, want 3: one before, one without disk space, one of the endings", n)
	}
	for i, op := range ops {
		ends := slices.Contains([]broker.Op{broker.OpFence, broker.OpClosed, broker.OpEnd, broker.OpResume, broker.OpPolicy}, op)
		if err := results[i]; ends && err != nil || !ends && (!errors.Is(err, bolt.ErrDiskFull) || !errors.Is(err, broker.ErrNotCommitted)) {
			t.Errorf("Update(%s) on a full disk = %v", op, err)
		}
	}
	if got := keys(t, l); !slices.Equal(got, []string{"before", "closed", "end", "fence", "policy", "resume"}) {
		t.Errorf("keys = %q, want the earlier key and those of the endings", got)
	}
	if _, err := os.Stat(path + ".reserve"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the reserve still exists (%v), want it released", err)
	}
	if err := l.Err(); !errors.Is(err, bolt.ErrDiskFull) {
		t.Errorf("Err = %v, want ErrDiskFull", err)
	}
	clock.Advance(time.Minute)
	if err := l.Update(t.Context(), enter(broker.OpIntent, "after")); err != nil {
		t.Errorf("Update with disk space again = %v, want nil", err)
	}
	if _, err := os.Stat(path + ".reserve"); err != nil || l.Err() != nil {
		t.Errorf("reserve: %v, Err: %v; want nil for both", err, l.Err())
	}
}

// TestFullDiskReal fills a small file system.
func TestFullDiskReal(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		if os.Getenv("PAWL_REQUIRE") == "all" {
			t.Fatalf("mounting a tmpfs: %v", err)
		}
		t.Skipf("SKIPPED: no test on a full disk: mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	})
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	var clock brokertest.Clock
	c := bolt.Config{Path: filepath.Join(dir, "ledger"), Reserve: 4 << 20, Now: clock.Now}
	l := mustOpen(t, c)

	var err error
	n := 0
	for ; err == nil && n < 100_000; n++ {
		key := fmt.Sprintf("g/%06d", n)
		err = l.Update(t.Context(), func(tx broker.Tx) error {
			return errors.Join(enter(broker.OpIntent, key)(tx), tx.Put(key, make([]byte, 8_000)))
		})
	}
	if !errors.Is(err, bolt.ErrDiskFull) || !errors.Is(err, broker.ErrNotCommitted) {
		t.Fatalf("Update %d = %v, want ErrDiskFull and ErrNotCommitted", n, err)
	}
	if !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("the error is %q, want \"disk is full\" in it", err)
	}
	for i := range 200 {
		if err := l.Update(t.Context(), enter(broker.OpFence, fmt.Sprintf("d/%06d", i))); err != nil {
			t.Fatalf("fence %d on a full disk = %v, want nil", i, err)
		}
		clock.Advance(time.Second) // the ledger tries to reacquire the reserve each time
	}
	if err := l.Update(t.Context(), enter(broker.OpIntent, "no")); !errors.Is(err, bolt.ErrDiskFull) {
		t.Errorf("Update after the fences = %v, want ErrDiskFull", err)
	}
	if err := l.Verify(t.Context()); err != nil {
		t.Errorf("Verify = %v, want nil", err)
	}

	// A ledger opens on a full disk, and accepts fences.
	if err := l.Close(); err != nil {
		t.Fatalf("Close = %v, want nil", err)
	}
	l = mustOpen(t, c)
	if err := l.Update(t.Context(), enter(broker.OpFence, "d/reopened")); err != nil {
		t.Errorf("a fence on a ledger opened on a full disk = %v, want nil", err)
	}
	if got := len(keys(t, l)); got != n-1+201 {
		t.Errorf("%d records, want %d", got, n-1+201)
	}

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	clock.Advance(time.Minute)
	if err := l.Update(t.Context(), enter(broker.OpIntent, "room")); err != nil {
		t.Errorf("Update with disk space again = %v, want nil", err)
	}
	if info, err := os.Stat(c.Path + ".reserve"); err != nil || info.Size() != 4<<20 {
		t.Errorf("the reserve is %v, %v, want 4 MiB again", info, err)
	}
}
