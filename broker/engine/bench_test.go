package engine_test

import (
	"crypto/rand"
	"path/filepath"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/store/bolt"
)

// newBoltBroker makes an engine on the embedded ledger, with a Vault and a target in memory.
func newBoltBroker(b testing.TB, now func() time.Time) *engine.Engine {
	b.Helper()
	ledger, err := bolt.Open(bolt.Config{Path: filepath.Join(b.TempDir(), "ledger.db"), Reserve: -1})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = ledger.Close() }) // the file is temporary
	target := brokertest.NewTarget()
	policy := brokertest.AllowAll("db.read")
	pawl, err := engine.New(engine.Config{Ledger: ledger, Policy: func() broker.Policy { return policy },
		Vault: brokertest.NewVault(target), Backends: map[string]broker.Backend{"target": target}, Now: now,
		Random: rand.Reader, SweepEvery: -1})
	if err != nil {
		b.Fatal(err)
	}
	if err := pawl.Resume(ctx); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(pawl.Stop)
	return pawl
}

func BenchmarkIssue(b *testing.B) {
	pawl := newBoltBroker(b, time.Now)
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

// BenchmarkStatus measures the request that each agent of a chain makes after a fence in it. The chain has a thousand
// live secrets.
func BenchmarkStatus(b *testing.B) {
	pawl, c := newBoltBroker(b, time.Now), as("planner")
	root, err := pawl.Open(ctx, c, broker.OpenRequest{Task: "bench", Rights: use("db.read")})
	if err != nil {
		b.Fatal(err)
	}
	for range 1000 {
		if _, err := pawl.Issue(ctx, c, step(root, "db.read")); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if _, err := pawl.Status(ctx, c, root.ID); err != nil {
			b.Fatal(err)
		}
	}
}
