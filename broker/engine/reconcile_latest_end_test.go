package engine_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestLatestEnd holds that a revocation's LatestEnd is never earlier than the true end of a secret. Vault and the
// target are down, so every secret lives until its own end. After a mint with a lost answer, that is as long as the
// target lets a login live.
func TestLatestEnd(t *testing.T) {
	down := func(string) error { return errors.New("connection refused") }
	for _, row := range []struct {
		name   string
		grants int
		lost   bool
	}{
		{"one grant", 1, false}, {"one grant and a lost answer", 1, true},
		{"many grants", 1001, false}, {"many grants and a lost answer", 1001, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{})
				var latest time.Time
				for range row.grants {
					latest = w.issue("root", step(root, "db.read")).Grant.Expires
				}
				if row.lost {
					w.vault.Fail(func(point string) error {
						if point == "mint created" {
							return errors.New("connection reset")
						}
						return nil
					})
					_, err := w.Issue(ctx, as("root"), step(root, "db.read"))
					refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
					// Vault may complete the mint until MintTimeout and MintBound have passed. The login then lives
					// MaxTTL.
					latest = time.Now().Add(2*time.Second + 5*time.Second + broker.MaxTTL)
				}
				w.vault.Fail(down)
				w.target.Fail(down)
				rv := w.revoke("chain:%s", root.Chain)
				for _, d := range []time.Duration{0, time.Millisecond, time.Second, 5 * time.Second} {
					pass(d)
					if got, err := w.Revocation(ctx, rv.ID); err != nil || got.LatestEnd.Before(latest) {
						t.Errorf("%v later LatestEnd = %v, %v; want %v or later", d, got.LatestEnd, err, latest)
					}
				}
			})
		})
	}
}
