package engine_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestLatestEnd: with nobody able to end anything, the time that is shown is never earlier than the true end: of a
// mint whose answer was lost, which lives as long as its target lets it, and of many secrets at once.
func TestLatestEnd(t *testing.T) {
	down := func(string) error { return errors.New("connection refused") }
	for _, row := range []struct {
		name string
		many int
		lost bool
	}{{"one", 1, false}, {"a lost answer", 1, true}, {"many", 1001, false}, {"many, one lost", 1001, true}} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				root := w.open("root", broker.OpenRequest{})
				var latest time.Time
				for range row.many {
					latest = w.issue("root", step(root, "db.read")).Grant.Expires
				}
				if row.lost {
					w.vault.Fail(func(point string) error {
						if point == "mint created" {
							return errors.New("the connection was cut")
						}
						return nil
					})
					_, err := w.Issue(ctx, as("root"), step(root, "db.read"))
					refused(t, "Issue", err, broker.Unavailable, broker.CodeOutcomeUnknown)
					// It may be made as late as MintTimeout and MintBound allow, and the target's logins live MaxTTL.
					latest = time.Now().Add(2*time.Second + 5*time.Second + broker.MaxTTL)
				}
				w.vault.Fail(down)
				w.target.Fail(down)
				rv := w.revoke("chain:%s", root.Chain)
				for _, d := range []time.Duration{0, time.Millisecond, time.Second, 5 * time.Second} {
					pass(d)
					if got, err := w.Revocation(ctx, rv.ID); err != nil || got.LatestEnd.Before(latest) {
						t.Errorf("%v after: the latest end is %v, %v; want %v or later", d, got.LatestEnd, err, latest)
					}
				}
			})
		})
	}
}
