package broker_test

import (
	"crypto/rand"
	"path/filepath"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/store/bolt"
)

// BenchmarkIssue is the engine and the embedded ledger, with a Vault and a target in memory.
func BenchmarkIssue(b *testing.B) {
	ledger, err := bolt.Open(bolt.Config{Path: filepath.Join(b.TempDir(), "ledger.db"), Reserve: -1})
	if err != nil {
		b.Fatal(err)
	}
	defer ledger.Close() //nolint:errcheck // a temporary file
	target := brokertest.NewTarget()
	policy := brokertest.AllowAll("db.read")
	pawl, err := broker.New(broker.Config{Ledger: ledger, Policy: func() broker.Policy { return policy }, Vault: brokertest.NewVault(target),
		Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1})
	if err != nil {
		b.Fatal(err)
	}
	if err := pawl.Resume(ctx); err != nil {
		b.Fatal(err)
	}
	defer pawl.Stop()
	b.SetParallelism(32) // 64 clients on two cores
	b.RunParallel(func(pb *testing.PB) {
		c := as("planner")
		root, err := pawl.Open(ctx, c, broker.OpenRequest{Task: "bench", Rights: use("db.read")})
		if err != nil {
			b.Error(err)
			return
		}
		for pb.Next() {
			if _, err := pawl.Issue(ctx, c, step(root, "db.read")); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "issues/s")
}
