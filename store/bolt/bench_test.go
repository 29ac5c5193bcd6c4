package bolt_test

import (
	"crypto/rand"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/store/bolt"
)

// BenchmarkUpdate simulates issuing. Each update appends an entry, and reads and writes three records: a grant (a new
// one with every third update), the chain's list of live grants, and the delegation's usage. Records have about 600
// bytes. Each random id touches its own page of the tree. Ids in order of time share pages, and the disk has less to
// write.
func BenchmarkUpdate(b *testing.B) {
	ids := []struct {
		name string
		next func() string
	}{
		{"random", rand.Text},
		{"ordered", func() string { return fmt.Sprintf("%012x%s", time.Now().UnixMilli(), rand.Text()[:12]) }},
	}
	for _, id := range ids {
		for _, writers := range []int{1, 16, 64} {
			b.Run(fmt.Sprintf("ids=%s/writers=%d", id.name, writers), func(b *testing.B) {
				l := mustOpen(b, bolt.Config{Path: filepath.Join(b.TempDir(), "ledger"), Reserve: -1})
				var left atomic.Int64
				left.Store(int64(b.N))
				b.ResetTimer()
				var wg sync.WaitGroup
				for w := range writers {
					wg.Go(func() { issue(b, l, w, id.next, &left) })
				}
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "updates/s")
			})
		}
	}
}

func issue(b *testing.B, l broker.Ledger, writer int, id func() string, left *atomic.Int64) {
	record := []byte(strings.Repeat("x", 600))
	entry := broker.Entry{At: time.Now(), Actor: "spiffe://example.org/agent/fetcher", Op: broker.OpIntent,
		Chain: "ch0123456789abcdefghjkmnpq", Delegation: "dl0123456789abcdefghjkmnpq", Tool: "postgres",
		Bundle: strings.Repeat("d", 64), Policies: []string{"readers", "office-hours"}, Detail: strings.Repeat("x", 200)}
	usage, grant, step := fmt.Sprintf("u/dl%024d", writer), "", 0
	for left.Add(-1) >= 0 {
		if step%3 == 0 {
			grant = id()
		}
		step++
		err := l.Update(b.Context(), func(tx broker.Tx) error {
			for _, key := range []string{"g/gr" + grant, "l/ch0123456789abcdefghjkmnpq/gr" + grant, usage} {
				if _, err := tx.Get(key); err != nil {
					return err
				}
				if err := tx.Put(key, record); err != nil {
					return err
				}
			}
			_, err := tx.Append(entry)
			return err
		})
		if err != nil {
			b.Errorf("Update = %v, want nil", err)
		}
	}
}
