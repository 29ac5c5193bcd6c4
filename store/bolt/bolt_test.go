package bolt_test

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/bolt"
)

func TestLedger(t *testing.T) {
	paths := map[broker.Ledger]string{}
	var writing sync.Mutex // held while a file is copied: bbolt writes nothing before a commit
	open := func(t testing.TB, path string) broker.Ledger {
		t.Helper()
		l := mustOpen(t, bolt.WithFault(bolt.Config{Path: path, Reserve: -1}, func(at bolt.Stage) error {
			switch at {
			case bolt.BeforeCommit:
				writing.Lock()
			case bolt.AfterCommit:
				writing.Unlock()
			}
			return nil
		}))
		paths[l] = path
		return l
	}
	brokertest.Ledger(t,
		func(t testing.TB) broker.Ledger { return open(t, filepath.Join(t.TempDir(), "ledger")) },
		func(t testing.TB, l broker.Ledger) broker.Ledger {
			if err := l.(*bolt.Ledger).Close(); err != nil {
				t.Fatalf("Close = %v, want nil", err)
			}
			return open(t, paths[l])
		},
		func(t testing.TB, l broker.Ledger) broker.Ledger {
			writing.Lock()
			left, err := os.ReadFile(paths[l])
			writing.Unlock()
			path := filepath.Join(t.TempDir(), "ledger")
			if err == nil {
				err = os.WriteFile(path, left, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			return open(t, path)
		})
}

// mustOpen opens a ledger and closes it at the end of the test.
func mustOpen(t testing.TB, c bolt.Config) *bolt.Ledger {
	t.Helper()
	l, err := bolt.Open(c)
	if err != nil {
		t.Fatalf("Open(%q) = %v, want nil", c.Path, err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close = %v, want nil", err)
		}
	})
	return l
}
