package engine_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// readCounter counts the grants that the first view reads. It is that of Resume: no background work runs before.
type readCounter struct {
	*brokertest.Memory
	once sync.Once
	n    int
}

func (l *readCounter) View(ctx context.Context, f func(broker.Tx) error) error {
	first := false
	l.once.Do(func() { first = true })
	return l.Memory.View(ctx, func(tx broker.Tx) error {
		if first {
			l.n = 0
			tx = grantReads{tx, &l.n}
		}
		return f(tx)
	})
}

type grantReads struct {
	broker.Tx
	n *int
}

func (t grantReads) Get(key string) ([]byte, error) {
	if strings.HasPrefix(key, "g/") {
		*t.n++
	}
	return t.Tx.Get(key)
}

// restart starts another broker on the ledger and returns how many grants its Resume read.
func (w *world) restart() int {
	w.t.Helper()
	w.Stop()
	w.vault = w.vault.Restarted()
	l := &readCounter{Memory: w.ledger}
	w.start(l)
	return l.n
}

// relist puts other content under the keys of the list of live grants, as an earlier build leaves it.
func (w *world) relist(content func(key string, was []byte) []byte) {
	w.t.Helper()
	if err := w.ledger.Update(ctx, func(tx broker.Tx) error {
		list := map[string][]byte{}
		if err := tx.Scan("l/", "", func(key string, was []byte) bool { list[key] = content(key, was); return true }); err != nil {
			return err
		}
		for key, raw := range list {
			if err := tx.Put(key, raw); err != nil {
				return err
			}
		}
		_, err := tx.Append(broker.Entry{Op: broker.OpResume})
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
}

// TestResumeReadsTheSchedule restarts a broker with live grants. It must read the list of live grants alone, and end
// each grant at its time: the one that was in flight at once, and the others when they expire.
func TestResumeReadsTheSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		for range 20 {
			w.issue("planner", step(root, "db.read"))
		}
		w.vault.Fail(func(point string) error {
			if point == "mint done" || point == "kill" {
				return errors.New("no answer")
			}
			return nil
		})
		if _, err := w.Issue(ctx, as("planner"), step(root, "db.read")); err == nil {
			t.Fatal("Issue with a lost answer = nil, want an error")
		}
		synctest.Wait()
		if n := w.restart(); n != 0 {
			t.Errorf("Resume read %d grants, want the list alone", n)
		}
		synctest.Wait()
		if n := len(w.target.Alive()); n != 20 {
			t.Errorf("%d secrets live after the restart, want the 20 that were handed out", n)
		}
		pass(2 * time.Minute)
		synctest.Wait()
		w.wantAllClosed()
	})
}

// TestScheduleIsAdded restarts a broker on the ledger of an earlier build, which listed live grants without their times.
// The first start reads each grant, and the second one none.
func TestScheduleIsAdded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		for range 20 {
			w.issue("planner", step(root, "db.read"))
		}
		synctest.Wait()
		w.Stop()
		want := map[string]string{}
		w.relist(func(key string, was []byte) []byte { want[key] = string(was); return []byte{} })
		if n := w.restart(); n != 20 {
			t.Errorf("Resume read %d grants of an earlier build, want 20", n)
		}
		synctest.Wait()
		w.Stop()
		w.relist(func(key string, got []byte) []byte {
			if string(got) != want[key] {
				t.Errorf("%s = %x after the first start, want %x", key, got, want[key])
			}
			return got
		})
		if n := w.restart(); n != 0 {
			t.Errorf("the next Resume read %d grants, want none", n)
		}
		pass(2 * time.Minute)
		synctest.Wait()
		w.wantAllClosed()
	})
}

// TestScheduleIsCorrected restarts a broker on a ledger in which an earlier build began to end a grant that this build
// had listed as alive. It must be ended at once and not at its expiry.
func TestScheduleIsCorrected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		root := w.open("planner", broker.OpenRequest{})
		ending := w.issue("planner", step(root, "db.read")).Grant.ID
		w.issue("planner", step(root, "db.read"))
		synctest.Wait()
		list := map[string][]byte{}
		w.relist(func(key string, was []byte) []byte { list[key] = was; return was })
		w.target.Fail(func(string) error { return errors.New("it is away") })
		w.vault.Fail(func(string) error { return errors.New("it is away") })
		closing, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		if _, err := w.Close(closing, as("planner"), ending); err != nil {
			t.Fatal(err)
		}
		w.Stop()
		w.relist(func(key string, _ []byte) []byte { return list[key] })
		w.target.Fail(nil)
		w.vault.Fail(nil)
		w.restart()
		pass(time.Second) // retries begin at 10 ms, and a grant lives for a minute
		synctest.Wait()
		if live := w.target.Alive(); len(live) != 1 || live[0] == ending {
			t.Errorf("%v live after the restart, want the other grant alone", live)
		}
	})
}
