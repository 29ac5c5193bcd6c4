// Package indexing keeps the ledger's index of chains and its schedule of live grants complete, and takes out of the
// index all that is not needed any more.
package indexing

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Index has the access to the ledger. All fields are required.
type Index struct {
	Cache  *records.Cache
	View   func(ctx context.Context, op string, f func(*records.Tx) error) error
	Update func(ctx context.Context, op string, f func(*records.Tx) error) error
	Now    func() time.Time
	Alarm  func(op string, err error)

	Schedule func([]records.Scheduled) // schedules the ends of grants
}

// atOnce is the number of chains that one transaction compares with the index, so that a fence waits for few.
const atOnce = 256

// Run completes the index, and then the schedule, until the ledger lets it.
func (x Index) Run(ctx context.Context) {
	x.until(ctx, "comparing the index of chains", x.complete)
	x.until(ctx, "comparing the schedule of live grants", x.reschedule)
}

// until calls f until it succeeds.
func (x Index) until(ctx context.Context, op string, f func(context.Context) error) {
	retry := backoff.Exponential{First: 100 * time.Millisecond, Most: 10 * time.Second}
	for {
		err := f(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		x.Alarm(op, err)
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// reschedule compares the list of live grants, from which this process took its schedule, with the grants. An earlier
// build listed the ids alone, and may have run since this build listed more: then a grant that it was ending is listed as
// one that ends at its expiry. Each item that differs is listed and scheduled anew.
//
// A crash in it leaves a part of the list, which the next process corrects.
func (x Index) reschedule(ctx context.Context) error {
	const op = "schedule"
	for last := ""; ; {
		var plain, wrong []broker.GrantID
		if err := x.View(ctx, op, func(tx *records.Tx) (err error) {
			plain, wrong, last, err = tx.Misscheduled(last, atOnce)
			return err
		}); err != nil {
			return err
		}
		if all := append(plain, wrong...); len(all) > 0 {
			var list []records.Scheduled
			if err := x.Update(ctx, op, func(tx *records.Tx) (err error) {
				if list, err = tx.Reschedule(all); err != nil {
					return err
				}
				_, err = tx.Enter(broker.Entry{At: x.Now(), Actor: "pawl", Op: broker.OpResume,
					Detail: fmt.Sprintf("scheduled %d live grants", len(all))})
				return err
			}); err != nil {
				return err
			}
			x.Schedule(slices.DeleteFunc(list, func(s records.Scheduled) bool { return !slices.Contains(wrong, s.ID) }))
		}
		if last == "" {
			return nil
		}
	}
}

// complete compares the index with the chains, and adds the missing keys. From then on the index is used; until then all
// chains are read, as without it. An earlier build wrote none, so the ledger may lack any part of it.
//
// A crash in it leaves a part of the index, which the next process adds to.
func (x Index) complete(ctx context.Context) error {
	var all []broker.ChainID
	now := x.Now()
	if err := x.View(ctx, "index", func(tx *records.Tx) (err error) {
		all, err = tx.ToIndex(now)
		return err
	}); err != nil {
		return err
	}
	for part := range slices.Chunk(all, atOnce) {
		var lacking []broker.ChainID
		if err := x.View(ctx, "index", func(tx *records.Tx) (err error) {
			lacking, err = tx.Unindexed(part, now)
			return err
		}); err != nil {
			return err
		}
		if len(lacking) == 0 {
			continue
		}
		if err := x.Update(ctx, "index", func(tx *records.Tx) error {
			if err := tx.Index(lacking, now); err != nil {
				return err
			}
			_, err := tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: broker.OpResume,
				Detail: fmt.Sprintf("indexed %d chains", len(lacking))})
			return err
		}); err != nil {
			return err
		}
	}
	return x.View(ctx, "index", func(tx *records.Tx) error {
		head, err := tx.Head()
		if err == nil {
			x.Cache.SetIndexed(head)
		}
		return err
	})
}

// Retire takes chains out of the index that have ended.
func (x Index) Retire(ctx context.Context) error {
	for {
		now := x.Now()
		var list []broker.ChainID
		if err := x.View(ctx, "index", func(tx *records.Tx) (err error) {
			list, err = tx.Retired(now)
			return err
		}); err != nil || len(list) == 0 {
			return err
		}
		if err := x.Update(ctx, "index", func(tx *records.Tx) error {
			if err := tx.Retire(list, now); err != nil {
				return err
			}
			_, err := tx.Enter(broker.Entry{At: now, Actor: "pawl", Op: broker.OpEnd,
				Detail: fmt.Sprintf("took %d chains that ended out of the index", len(list))})
			return err
		}); err != nil {
			return err
		}
	}
}
