package volatile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Refusals bounds the refusals of one caller that are recorded one by one. Those beyond are counted, and each minute's
// count is recorded in one entry. A violation of another kind, or of another delegation, is recorded beyond the limit
// too, up to ten times as many: responders search for violations. A restart loses the counts of the present minute.
type Refusals struct {
	Each int // recorded refusals of one caller a minute; zero means 60

	mu      sync.Mutex // guards minutes
	minutes map[minuteOf]*refused
}

type minuteOf struct {
	actor string
	start time.Time
}

// refused are the refusals of one caller in one minute.
type refused struct {
	recorded   int
	violations map[violation]bool // that were recorded
	more       map[broker.Code]int
	moreOf     map[violation]int
}

// violation is a kind of violation of one delegation.
type violation struct {
	code       broker.Code
	chain      broker.ChainID
	delegation broker.DelegationID
}

// ErrRepeated discards the transaction of a violation that is not recorded by itself.
var ErrRepeated = errors.New("a repeated violation beyond the limit")

// Record counts a refusal or violation. It is true when the entry must be recorded by itself. The caller counts a
// violation that must not with [Refusals.Repeated], unless it has a new effect.
func (r *Refusals) Record(e broker.Entry) bool {
	each := cmp.Or(r.Each, 60)
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.ofLocked(e)
	v := violation{e.Code, e.Chain, e.Delegation}
	first := e.Op == broker.OpViolation && !m.violations[v] && len(m.violations) < 10*each
	if first {
		m.violations[v] = true
	}
	if m.recorded++; m.recorded <= each || first {
		return true
	}
	if e.Op != broker.OpViolation {
		m.more[e.Code]++
	}
	return false
}

// Repeated counts a violation that is not recorded by itself. It refuses a report instead, with OverLimit: its reporter
// must know that it was not recorded.
func (r *Refusals) Repeated(op string, e broker.Entry) error {
	if op == "report" {
		return broker.Errorf(broker.OverLimit, op, "%s has reported too much in this minute; nothing was recorded", e.Actor).
			With(broker.CodeTooManyReports).After(time.Minute)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.ofLocked(e)
	v := violation{e.Code, e.Chain, e.Delegation}
	if m.violations[v] {
		m.moreOf[v]++
	} else {
		m.more[e.Code]++
	}
	return nil
}

func (r *Refusals) ofLocked(e broker.Entry) *refused {
	key := minuteOf{e.Actor, e.At.Truncate(time.Minute)}
	m := r.minutes[key]
	if m == nil {
		if r.minutes == nil {
			r.minutes = map[minuteOf]*refused{}
		}
		m = &refused{violations: map[violation]bool{}, more: map[broker.Code]int{}, moreOf: map[violation]int{}}
		r.minutes[key] = m
	}
	return m
}

// Take removes the counts of the minutes that ended before a time, and returns their entries.
func (r *Refusals) Take(before time.Time) (entries []broker.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, m := range r.minutes {
		end := key.start.Add(time.Minute)
		if end.After(before) {
			continue
		}
		delete(r.minutes, key)
		from := key.start.UTC().Format(time.RFC3339)
		for v, n := range m.moreOf {
			entries = append(entries, broker.Entry{At: before, Actor: key.actor, Op: broker.OpViolation, Code: v.code,
				Chain: v.chain, Delegation: v.delegation, Detail: fmt.Sprintf("%d more like it in the minute from %s", n, from)})
		}
		if len(m.more) > 0 {
			entries = append(entries, broker.Entry{At: before, Actor: key.actor, Op: broker.OpSummed,
				Detail: fmt.Sprintf("in the minute from %s: %s", from, counts(m.more))})
		}
	}
	return entries
}

// counts formats the number of each code, the most frequent first.
func counts(more map[broker.Code]int) string {
	codes := make([]broker.Code, 0, len(more))
	for c := range more {
		codes = append(codes, c)
	}
	slices.SortFunc(codes, func(a, b broker.Code) int { return cmp.Or(more[b]-more[a], cmp.Compare(a, b)) })
	var out strings.Builder
	total := 0
	for i, c := range codes {
		total += more[c]
		if i < 20 {
			fmt.Fprintf(&out, ", %s %d", c, more[c])
		}
	}
	return fmt.Sprintf("%d more%s", total, out.String())
}

// Run records the counts of each minute with write, until ctx ends, and then the rest. Counts that write does not take
// are lost, with an alarm.
func (r *Refusals) Run(ctx context.Context, now func() time.Time, alarm func(string, error),
	write func(context.Context, []broker.Entry) error) {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for ctx.Err() == nil {
		var ended time.Time
		select {
		case <-tick.C:
			ended = now()
		case <-ctx.Done():
			ended = now().Add(time.Minute)
		}
		entries := r.Take(ended)
		if len(entries) == 0 {
			continue
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		if err := write(last, entries); err != nil {
			alarm("recording the counts of refusals", err)
		}
		cancel()
	}
}
