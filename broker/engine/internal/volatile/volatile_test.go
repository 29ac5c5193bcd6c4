package volatile_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/volatile"
)

// TestHub wakes a topic, and checks the watchers of each topic.
func TestHub(t *testing.T) {
	watched := map[string]volatile.Topic{
		"chain a": {Chain: "a"}, "fences of a": {Chain: "a", Fences: true},
		"chain b": {Chain: "b"}, "fences of b": {Chain: "b", Fences: true},
		"all chains": {},
	}
	for name, row := range map[string]struct {
		wake  []volatile.Topic
		woken []string
	}{
		"a change of a chain": {[]volatile.Topic{{Chain: "a"}}, []string{"chain a", "all chains"}},
		"a fence over a chain": {[]volatile.Topic{{Chain: "a", Fences: true}},
			[]string{"chain a", "fences of a", "all chains"}},
		"a change of both chains": {[]volatile.Topic{{Chain: "a"}, {Chain: "b"}},
			[]string{"chain a", "chain b", "all chains"}},
		"an entry of no chain": {[]volatile.Topic{{}}, []string{"chain a", "chain b", "all chains"}},
		"a fence by a rule": {[]volatile.Topic{{Fences: true}},
			[]string{"chain a", "fences of a", "chain b", "fences of b", "all chains"}},
		"an unwatched chain": {[]volatile.Topic{{Chain: "c"}}, []string{"all chains"}},
		"nothing":            {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var h volatile.Hub
			changed := map[string][2]<-chan struct{}{}
			for name, topic := range watched {
				one, cancelOne := h.Watch(topic)
				two, cancelTwo := h.Watch(topic)
				defer cancelOne()
				defer cancelTwo()
				changed[name] = [2]<-chan struct{}{one, two}
			}
			h.Wake(row.wake)
			want := map[string]bool{}
			for _, name := range row.woken {
				want[name] = true
			}
			for name, watchers := range changed {
				for _, w := range watchers {
					if woken(w) != want[name] {
						t.Errorf("a watcher of %s is woken: %v, want %v", name, !want[name], want[name])
					}
				}
			}
		})
	}
}

// TestHubCancel holds that a cancelled watcher is not counted, and that another watcher of its topic is still woken.
func TestHubCancel(t *testing.T) {
	var h volatile.Hub
	topic := volatile.Topic{Chain: "a"}
	first, cancelFirst := h.Watch(topic)
	second, cancelSecond := h.Watch(topic)
	cancelFirst()
	cancelFirst() // again: without effect
	h.Wake([]volatile.Topic{topic})
	if !woken(second) {
		t.Error("the other watcher was not woken")
	}
	third, cancelThird := h.Watch(topic)
	defer cancelThird()
	cancelSecond() // of a topic that was woken since: the third has a channel of its own
	if woken(third) {
		t.Error("the third watcher was woken before a change")
	}
	h.Wake([]volatile.Topic{topic})
	if !woken(third) {
		t.Error("the third watcher was not woken")
	}
	fourth, cancelFourth := h.Watch(topic)
	cancelFourth()
	h.Wake([]volatile.Topic{topic})
	if woken(fourth) || !woken(first) {
		t.Error("want the topic without watchers gone, and the earlier channel closed")
	}
}

func woken(changed <-chan struct{}) bool {
	select {
	case <-changed:
		return true
	default:
		return false
	}
}

func TestLatest(t *testing.T) {
	for name, row := range map[string]struct {
		most int
		put  string // keys, in order; the value is the position
		want map[rune]int
	}{
		"below the limit":       {3, "ab", map[rune]int{'a': 0, 'b': 1}},
		"at the limit":          {3, "abc", map[rune]int{'a': 0, 'b': 1, 'c': 2}},
		"above the limit":       {3, "abcde", map[rune]int{'c': 2, 'd': 3, 'e': 4}},
		"a known key":           {3, "abca", map[rune]int{'a': 3, 'b': 1, 'c': 2}},
		"a known key is oldest": {3, "abcad", map[rune]int{'b': 1, 'c': 2, 'd': 4}},
		"an evicted key again":  {2, "abca", map[rune]int{'c': 2, 'a': 3}},
	} {
		t.Run(name, func(t *testing.T) {
			l := volatile.Latest[rune, int]{Most: row.most}
			for i, key := range row.put {
				l.Put(key, i)
			}
			for _, key := range "abcdef" {
				got, ok := l.Get(key)
				if want, kept := row.want[key]; got != want || ok != kept {
					t.Errorf("Get(%c) = %d, %v; want %d, %v", key, got, ok, want, kept)
				}
			}
		})
	}
}

// grant is a sealed grant of a caller.
func grant(caller, n int) broker.Grant {
	return broker.Grant{ID: broker.GrantID(fmt.Sprintf("gr%d/%d", caller, n)), Sealed: "thumbprint",
		Caller: spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/%d", caller))}
}

// refused fails the test unless err is the refusal of a full store, with a time after which to retry.
func refused(t *testing.T, call string, err error) {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) || e.Kind != broker.Unavailable || e.Code != broker.CodeDeliveriesFull ||
		e.RetryAfter != time.Second {
		t.Fatalf("%s = %v, want %s after a second", call, err, broker.CodeDeliveriesFull)
	}
}

// TestDeliveriesOfACaller holds that a caller has at most MaxWaitingEach places, and that Take frees one.
func TestDeliveriesOfACaller(t *testing.T) {
	var d volatile.Deliveries
	for n := range broker.MaxWaitingEach {
		if err := d.Reserve(grant(1, n)); err != nil {
			t.Fatalf("Reserve of place %d = %v", n, err)
		}
	}
	refused(t, "Reserve above the caller's limit", d.Reserve(grant(1, -1)))
	if err := d.Reserve(grant(2, 0)); err != nil {
		t.Errorf("Reserve by another caller = %v, want a place", err)
	}
	d.Take(grant(1, 0).ID)
	if err := d.Reserve(grant(1, -1)); err != nil {
		t.Errorf("Reserve after Take = %v, want a place", err)
	}
}

// TestDeliveriesOfAll holds that there are at most MaxWaiting places, and that Drop frees them.
func TestDeliveriesOfAll(t *testing.T) {
	var d volatile.Deliveries
	var all []broker.Grant
	for n := range broker.MaxWaiting {
		g := grant(n/broker.MaxWaitingEach, n)
		if all = append(all, g); d.Reserve(g) != nil {
			t.Fatalf("Reserve of place %d was refused", n)
		}
	}
	other := grant(-1, 0)
	refused(t, "Reserve above the limit", d.Reserve(other))
	open := all[0]
	open.Sealed = ""
	d.Drop([]broker.Grant{open}) // a grant that is not sealed has no place
	refused(t, "Reserve after Drop of another grant", d.Reserve(other))
	d.Drop(all[:1])
	if err := d.Reserve(other); err != nil {
		t.Errorf("Reserve after Drop = %v, want a place", err)
	}
}

// TestDeliveriesInBytes holds that the sealed secrets have at most MaxSealedBytes, and that Take frees them.
func TestDeliveriesInBytes(t *testing.T) {
	var d volatile.Deliveries
	reserve := func(n int) broker.GrantID {
		t.Helper()
		g := grant(n/broker.MaxWaitingEach, n)
		if err := d.Reserve(g); err != nil {
			t.Fatalf("Reserve of place %d = %v", n, err)
		}
		return g.ID
	}
	const full = broker.MaxSealedBytes / broker.MaxSealed
	largest := make([]byte, broker.MaxSealed)
	last := reserve(full)
	for n := range full {
		if err := d.Put(reserve(n), largest); err != nil {
			t.Fatalf("Put %d = %v", n, err)
		}
	}
	refused(t, "Reserve with all bytes taken", d.Reserve(grant(-1, 0)))
	if err := d.Put(last, []byte{1}); !errors.Is(err, volatile.ErrSealedFull) || d.Has(last) {
		t.Errorf("Put with all bytes taken = %v, want %v", err, volatile.ErrSealedFull)
	}
	d.Take(grant(0, 0).ID)
	if err := d.Put(last, make([]byte, broker.MaxSealed+1)); !errors.Is(err, volatile.ErrSealedTooLarge) {
		t.Errorf("Put of too large a secret = %v, want %v", err, volatile.ErrSealedTooLarge)
	}
	if err := d.Put(last, largest); err != nil || !d.Has(last) {
		t.Errorf("Put after Take = %v, want it stored", err)
	}
}

// TestDeliveryIsTakenOnce holds that Take returns a sealed secret once, and that Put into a place that is gone fails.
func TestDeliveryIsTakenOnce(t *testing.T) {
	var d volatile.Deliveries
	g := grant(1, 1)
	if err := d.Reserve(g); err != nil || d.Has(g.ID) {
		t.Fatalf("Reserve = %v, and Has = %v; want a place without a secret", err, d.Has(g.ID))
	}
	if err := d.Put(g.ID, []byte("sealed")); err != nil || !d.Has(g.ID) {
		t.Fatalf("Put = %v, and Has = %v; want it stored", err, d.Has(g.ID))
	}
	for _, want := range []string{"sealed", ""} {
		if got := d.Take(g.ID); string(got) != want {
			t.Errorf("Take = %q, want %q", got, want)
		}
	}
	if err := d.Put(g.ID, []byte("sealed")); broker.KindOf(err) != broker.Revoked {
		t.Errorf("Put without a place = %v, want kind %v", err, broker.Revoked)
	}
}
