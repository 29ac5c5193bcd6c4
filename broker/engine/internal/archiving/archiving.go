// Package archiving moves closed and old records from the ledger to its archive, and reads it there.
package archiving

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Mover moves records and entries, and reads them there. Without an Archive there is nothing of this, and its reads
// are those of the ledger. All other fields are required.
type Mover struct {
	Archive broker.Archive
	Keep    time.Duration // how long ended chains stay in the ledger; zero: for ever
	Cache   *records.Cache
	View    func(ctx context.Context, op string, f func(*records.Tx) error) error
	Update  func(ctx context.Context, op string, f func(*records.Tx) error) error
	Now     func() time.Time
	Alarm   func(op string, err error)
}

const (
	enough  = 4 << 20        // bytes of records for which a segment is made at once
	most    = 32 << 20       // bytes of records of one segment
	longest = 24 * time.Hour // for which fewer wait

	chainsAtOnce  = 64   // that one transaction reads or detaches
	recordsAtOnce = 256  // that one transaction removes: a fence waits for so many
	entriesAtOnce = 500  // likewise
	revocations   = 1000 // of one segment
)

// Run moves old records, on a schedule, until ctx ends.
func (m Mover) Run(ctx context.Context) {
	if m.Archive == nil || m.Keep <= 0 {
		return
	}
	every := min(max(m.Keep/60, time.Minute), time.Hour)
	retry := backoff.Exponential{First: time.Second, Most: every}
	last := time.Time{} // a small segment may be made after each start
	for {
		moved, err := m.Move(ctx, m.Now().Sub(last) >= min(m.Keep, longest))
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			m.Alarm("archiving", err)
			if retry.Wait(ctx) != nil {
				return
			}
			continue
		case moved:
			last = m.Now()
			continue
		}
		retry = backoff.Exponential{First: time.Second, Most: every}
		if backoff.Sleep(ctx, every) != nil {
			return
		}
	}
}

// Move finishes an interrupted move, or makes one segment of old records. With few of them it waits for more, unless all is
// set. moved is false when there was nothing to do.
//
// Step 1 reads the records, in several views: what changes afterwards is not removed. Step 2 has the archive keep them.
// A crash after it leaves them in both, and the next process goes on with step 3. Step 3 removes them from the ledger,
// some at a time, and then the entries.
func (m Mover) Move(ctx context.Context, all bool) (moved bool, err error) {
	s, unfinished, err := m.Archive.Unfinished(ctx)
	if err != nil {
		return false, err
	}
	old := m.Now().Add(-m.Keep)
	if !unfinished {
		list, size, err := m.collect(ctx, old)
		if err != nil || size < enough && !all {
			return false, err
		}
		if s, err = m.Archive.Add(ctx, list, old); err != nil || s.Number == 0 {
			return false, err
		}
	}
	return true, m.remove(ctx, s, old)
}

// collect is step 1.
func (m Mover) collect(ctx context.Context, old time.Time) (list []broker.Archived, size int, err error) {
	add := func(part []broker.Archived) {
		list = append(list, part...)
		for _, r := range part {
			size += len(r.Key) + len(r.Value)
		}
	}
	for after, more := broker.ChainID(""), true; more && size < most; {
		if err := m.View(ctx, "archive", func(tx *records.Tx) error {
			found, last, err := tx.Archivable(old, after, chainsAtOnce)
			if err != nil {
				return err
			}
			after, more = last, last != ""
			for _, id := range found {
				part, err := tx.ArchiveChain(id, old)
				if err != nil {
					return err
				}
				if add(part); size >= most {
					return nil
				}
			}
			return nil
		}); err != nil {
			return nil, 0, err
		}
	}
	err = m.View(ctx, "archive", func(tx *records.Tx) error {
		found, err := tx.ArchivableRevocations(old, revocations)
		for i := 0; err == nil && i < len(found); i++ {
			var part []broker.Archived
			part, err = tx.ArchiveRevocation(found[i])
			add(part)
		}
		return err
	})
	return list, size, err
}

// remove is step 3. Each of its parts may be repeated.
func (m Mover) remove(ctx context.Context, s broker.Segment, old time.Time) error {
	var heads []string
	if err := m.Archive.Records(ctx, s, func(part []broker.Archived) error {
		for _, r := range part {
			if records.IsHead(r.Key) {
				heads = append(heads, r.Key)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	for part := range slices.Chunk(heads, chainsAtOnce) {
		if err := m.enter(ctx, s, fmt.Sprintf("%d chains or revocations", len(part)), func(tx *records.Tx) error {
			_, err := tx.Detach(part, old)
			return err
		}); err != nil {
			return err
		}
	}
	kept, err := m.kept(ctx, heads)
	if err != nil {
		return err
	}
	if err := m.Archive.Records(ctx, s, func(all []broker.Archived) error {
		for part := range slices.Chunk(all, recordsAtOnce) {
			if err := m.enter(ctx, s, fmt.Sprintf("%d records", len(part)), func(tx *records.Tx) error {
				return tx.DropArchived(part, kept)
			}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return m.trim(ctx, s)
}

// kept returns the keys of the chains that were not detached, since something happened to them after step 1.
func (m Mover) kept(ctx context.Context, heads []string) (keys map[string]bool, err error) {
	err = m.View(ctx, "archive", func(tx *records.Tx) error {
		keys = map[string]bool{}
		chains, err := tx.Kept(heads)
		for i := 0; err == nil && i < len(chains); i++ {
			var list []string
			list, err = tx.KeysOf(chains[i])
			for _, key := range list {
				keys[key] = true
			}
		}
		return err
	})
	return keys, err
}

// trim removes the archived entries, and finishes the segment with the last of them.
func (m Mover) trim(ctx context.Context, s broker.Segment) error {
	for through := min(s.First, s.Last); ; through = min(through+entriesAtOnce, s.Last) {
		if err := m.enter(ctx, s, fmt.Sprintf("entries up to %d", through), func(tx *records.Tx) error {
			if err := tx.Trim(through); err != nil || through < s.Last {
				return err
			}
			return tx.FinishSegment(m.Archive, s)
		}); err != nil || through >= s.Last {
			return err
		}
	}
}

// enter runs one transaction of a removal, with its entry.
func (m Mover) enter(ctx context.Context, s broker.Segment, what string, f func(*records.Tx) error) error {
	return m.Update(ctx, "archive", func(tx *records.Tx) error {
		if err := f(tx); err != nil {
			return err
		}
		_, err := tx.Enter(broker.Entry{At: m.Now(), Actor: "pawl", Op: broker.OpArchived,
			Detail: fmt.Sprintf("segment %s: %s left the ledger", s.Name, what)})
		return err
	})
}
