package closing

import (
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/sched"
)

// Found is the state of a grant as a worker found it last.
type Found struct {
	Chain     broker.ChainID
	Outcome   broker.Outcome
	LatestEnd time.Time // when its secret ends by itself
}

// Progress is how far the end of some grants has come. The workers report to it directly. It is safe for concurrent use.
type Progress struct {
	Changed sched.Signal // something was reported

	r      *Reaper
	mu     sync.Mutex // guards what follows
	left   map[broker.GrantID]Found
	static map[broker.GrantID]bool // closed, and the static secret works on
}

// Follow gives the progress of grants that were read as not closed, and of static ones that are closed. Close must be called.
func (r *Reaper) Follow(grants []broker.Grant, static []broker.GrantID) *Progress {
	p := &Progress{r: r, Changed: sched.NewSignal(), left: make(map[broker.GrantID]Found, len(grants)), static: map[broker.GrantID]bool{}}
	for _, id := range static {
		p.static[id] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range grants {
		p.left[g.ID] = Found{g.Chain, g.Outcome, g.LatestEnd()}
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

// Left gives a copy of what is not closed.
func (p *Progress) Left() map[broker.GrantID]Found {
	p.mu.Lock()
	defer p.mu.Unlock()
	left := make(map[broker.GrantID]Found, len(p.left))
	for id, f := range p.left {
		left[id] = f
	}
	return left
}

// Count gives the numbers of grants that are not closed, of those shown to work, and of static ones that work on; and
// when the last of what is not closed ends by itself.
func (p *Progress) Count() (left, alive, static int, latest time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.left {
		if f.Outcome == broker.OutcomeAlive {
			alive++
		}
		if f.LatestEnd.After(latest) {
			latest = f.LatestEnd
		}
	}
	return len(p.left), alive, len(p.static), latest
}

// Report says that a grant was found like this; closed: it is CLOSED.
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
	}
	p.Changed.Notify()
}

// report tells the grants' waiting callers and followers what a worker has recorded.
func (r *Reaper) report(grants []broker.Grant) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range grants {
		g := &grants[i]
		closed := g.State == broker.StateClosed
		for _, p := range r.progress[g.ID] {
			p.Report(g.ID, Found{g.Chain, g.Outcome, g.LatestEnd()}, closed)
		}
		if !closed {
			continue
		}
		delete(r.progress, g.ID)
		for _, done := range r.waiting[g.ID] {
			close(done)
		}
		delete(r.waiting, g.ID)
	}
}
