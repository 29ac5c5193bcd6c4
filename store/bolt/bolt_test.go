package bolt_test

import (
	"path/filepath"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/bolt"
)

func TestLedger(t *testing.T) {
	paths := map[broker.Ledger]string{}
	open := func(t testing.TB, path string) broker.Ledger {
		t.Helper()
		l := mustOpen(t, bolt.Config{Path: path, Reserve: -1})
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
