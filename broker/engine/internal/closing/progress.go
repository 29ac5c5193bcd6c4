package closing

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// Found is the state of a grant at a worker's last check.
type Found struct {
	Chain     broker.ChainID
	Outcome   broker.Outcome
	LatestEnd time.Time // when its secret ends by itself
	Why       string    // the check that has not shown it dead, and its answer
	Until     time.Time // when the cause of the wait ends by itself
	Leftover  bool      // it is closed, and Vault has still to remove its lease
}

func foundOf(g *broker.Grant, now time.Time) Found {
	f := Found{Chain: g.Chain, Outcome: g.Outcome, LatestEnd: g.LatestEnd(), Why: "not checked yet", Leftover: isLeftover(g)}
	if f.Until = f.LatestEnd; g.State == broker.StateHandle && g.Lease.Expires.IsZero() && !g.NothingMade && now.Before(g.MintDeadline) {
		f.Until = g.MintDeadline
	}
	for _, e := range g.Evidence {
		if e.Outcome != broker.OutcomeDead {
			f.Why = e.Check + ": " + e.Answer
			break
		}
	}
	return f
}

// Waiting is a grant that is not closed.
type Waiting struct {
	ID broker.GrantID
	Found
}

// Progress counts how many of a set of grants have ended. The workers report to it directly. It is safe for concurrent
// use.
type Progress struct {
	Changed sched.Signal // a worker has reported

	r         *Reaper
	mu        sync.Mutex // guards the fields below
	left      map[broker.GrantID]Found
	static    map[broker.GrantID]bool           // closed, while the static secret still works
	leftovers map[broker.GrantID]broker.ChainID // closed, while Vault has still to remove the lease
}

// Follow returns the progress of grants that were read as not closed, and of static ones and ones with leftover leases
// that are closed. The caller must call Close.
func (r *Reaper) Follow(grants []broker.Grant, static []broker.GrantID, leftovers []broker.Grant) *Progress {
	p := &Progress{r: r, Changed: sched.NewSignal(), left: make(map[broker.GrantID]Found, len(grants)),
		static: map[broker.GrantID]bool{}, leftovers: map[broker.GrantID]broker.ChainID{}}
	for _, id := range static {
		p.static[id] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range leftovers {
		p.leftovers[g.ID] = g.Chain
		r.progress[g.ID] = append(r.progress[g.ID], p)
	}
	for _, g := range grants {
		p.left[g.ID] = foundOf(&g, r.cfg.Now())
		r.progress[g.ID] = append(r.progress[g.ID], p)
	}
	return p
}

// Close ends the reports.
func (p *Progress) Close() {
	p.r.mu.Lock()
	defer p.r.mu.Unlock()
	for id := range p.Left() {
		p.r.unfollowLocked(id, p)
	}
	for id := range p.Leftovers() {
		p.r.unfollowLocked(id, p)
	}
}

func (r *Reaper) unfollowLocked(id broker.GrantID, p *Progress) {
	var others []*Progress
	for _, q := range r.progress[id] {
		if q != p {
			others = append(others, q)
		}
	}
	if r.progress[id] = others; len(others) == 0 {
		delete(r.progress, id)
	}
}

// Left returns a copy of the grants that are not closed.
func (p *Progress) Left() map[broker.GrantID]Found {
	p.mu.Lock()
	defer p.mu.Unlock()
	left := make(map[broker.GrantID]Found, len(p.left))
	for id, f := range p.left {
		left[id] = f
	}
	return left
}

// Leftovers returns a copy of the closed grants of which Vault has still to remove the lease.
func (p *Progress) Leftovers() map[broker.GrantID]broker.ChainID {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.leftovers)
}

// Last returns the n grants, of those that are not closed, of which the wait ends last: the last one first.
func (p *Progress) Last(n int) []Waiting {
	later := func(a, b Waiting) int { return cmp.Or(b.Until.Compare(a.Until), cmp.Compare(a.ID, b.ID)) }
	p.mu.Lock()
	defer p.mu.Unlock()
	last := make([]Waiting, 0, n+1)
	for id, f := range p.left {
		w := Waiting{id, f}
		at, _ := slices.BinarySearchFunc(last, w, later)
		if last = slices.Insert(last, at, w); len(last) > n {
			last = last[:n]
		}
	}
	return last
}

// Counts counts the grants as they are now. Total is zero.
func (p *Progress) Counts() Counts {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := Counts{Left: len(p.left), Static: len(p.static), Leases: len(p.leftovers)}
	for _, f := range p.left {
		c.add(f.Outcome, f.LatestEnd)
	}
	return c
}

// Report notes the state of a grant; closed: the grant is CLOSED.
func (p *Progress) Report(id broker.GrantID, f Found, closed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.left[id]; !ok {
		return
	}
	if p.left[id] = f; closed {
		delete(p.left, id)
		if f.Outcome == broker.OutcomeStatic {
			p.static[id] = true
		}
		if f.Leftover {
			p.leftovers[id] = f.Chain
		}
	}
	p.Changed.Notify()
}

// Removed notes that Vault has removed the lease of a closed grant.
func (p *Progress) Removed(id broker.GrantID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.leftovers, id)
	p.Changed.Notify()
}

// report notifies the followers and the waiting callers of grants that a worker has recorded.
func (r *Reaper) report(grants []broker.Grant) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range grants {
		g := &grants[i]
		closed := g.State == broker.StateClosed
		for _, p := range r.progress[g.ID] {
			p.Report(g.ID, foundOf(g, r.cfg.Now()), closed)
		}
		if !closed {
			continue
		}
		if !isLeftover(g) { // the followers also wait for the end of its lease
			delete(r.progress, g.ID)
		}
		for _, done := range r.waiting[g.ID] {
			close(done)
		}
		delete(r.waiting, g.ID)
	}
}
