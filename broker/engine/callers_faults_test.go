package engine_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// The ways in which one write of the ledger fails.
const (
	notMade      = "is not made"
	madeButFails = "is made and fails"
	diesBefore   = "is not made: the process dies"
	diesAfter    = "is made: the process dies"
)

// The bounds of one caller in these tests.
const (
	mostSteps     = 6 // in an hour, in all chains
	mostChains    = 3
	mostRecorded  = 2 // refusals a minute
	refusalsAsked = 5
)

// nothingMade is the detail of the entry about a step for which nothing was made.
const nothingMade = "nothing was made"

// callersPlay lets an agent on behalf of ana do all that is counted for a caller, while the nth write fails.
type callersPlay struct {
	*world
	way     string
	n       int // the write that fails
	refused int // requests, as policy or a limit wants it
	seen    int // steps with db.read in the history of the caller, at the last decision

	mu     sync.Mutex    // guards the fields below
	writes int           // so far
	failed *broker.Entry // the first entry of that write; nil: the play had fewer
	dead   bool          // the process has died
	refuse error         // of every mint; nil: none
	lose   bool          // the answer of every mint
	minted int           // by Vault
}

// TestCallersThroughFaults fails each write of a play in turn, in each way, and starts the broker again. No caller has
// more steps or open chains than its limits, a step that came to nothing is not counted, and no refusal is counted twice.
func TestCallersThroughFaults(t *testing.T) {
	ops := map[broker.Op]bool{}
	for _, way := range []string{notMade, madeButFails, diesBefore, diesAfter} {
		for n, more := 1, true; more; n++ {
			t.Run(fmt.Sprintf("write %d %s", n, way), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := newCallersPlay(t, way, n)
					p.run()
					if more = p.failed != nil; more {
						ops[p.failed.Op] = true
					}
					p.restart()
					p.check()
				})
			})
		}
	}
	for _, op := range []broker.Op{broker.OpOpen, broker.OpIntent, broker.OpHandle, broker.OpIssued, broker.OpEnd,
		broker.OpUnknown, broker.OpClosed, broker.OpDenied, broker.OpSummed} {
		if !ops[op] {
			t.Errorf("no write of %q failed", op)
		}
	}
}

func newCallersPlay(t *testing.T, way string, n int) *callersPlay {
	w := newWorld(t)
	w.Stop()
	p := &callersPlay{world: w, way: way, n: n}
	counted := limited(broker.Limit{Policy: "p", Steps: mostSteps, Window: time.Hour})
	w.policy.Answer = func(q broker.Question) broker.Decision {
		p.seen = q.CallerHistory[time.Hour]["db.read"].Count
		return counted(q)
	}
	w.policy.Envelopes = map[string]broker.Envelope{
		"for ana": {Issuer: "desk", Behalf: "ana", Expires: time.Now().Add(24 * time.Hour)}}
	w.wrap = func(p *brokertest.Policy) broker.Policy { return callerPolicy{p, []time.Duration{time.Hour}} }
	w.mostChains, w.mostRefusals, w.vault = mostChains, mostRecorded, w.vault.Restarted()
	w.start(w.ledger)
	w.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault { return p.write(entries) })
	w.vault.Fail(p.ask)
	return p
}

// write decides about a write of the ledger.
func (p *callersPlay) write(entries []broker.Entry) brokertest.Fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		return brokertest.NotCommitted
	}
	if p.writes++; p.writes != p.n {
		return brokertest.None
	}
	p.failed = &entries[0]
	p.dead = p.way == diesBefore || p.way == diesAfter
	if p.way == notMade || p.way == diesBefore {
		return brokertest.NotCommitted
	}
	return brokertest.CommittedButFails
}

// ask decides about an act of Vault.
func (p *callersPlay) ask(point string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.dead:
		return errCrashed
	case point == "mint":
		return p.refuse
	case point == "mint created":
		if p.minted++; p.lose {
			return errors.New("connection reset")
		}
	}
	return nil
}

// vaultDoes sets what Vault does with each mint.
func (p *callersPlay) vaultDoes(refuse error, lose bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse, p.lose = refuse, lose
}

// open opens a chain, and once more when that fails.
func (p *callersPlay) open() (d broker.Delegation) {
	for range 2 {
		var err error
		d, err = p.Open(ctx, as("agent"), broker.OpenRequest{Task: "t", Rights: use("db.read"), Envelope: "for ana"})
		if p.count(err); err == nil {
			break
		}
	}
	return d
}

// step takes a step, and ends it. Without a delegation it does nothing.
func (p *callersPlay) step(d broker.Delegation, tool broker.ToolName) {
	if d.ID == "" {
		return
	}
	got, err := p.Issue(ctx, as("agent"), step(d, tool))
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // as the server waits
		defer cancel()
		_, err = p.Close(ctx, as("agent"), got.Grant.ID)
	}
	p.count(err)
}

// count counts a refusal that must be in the audit log.
func (p *callersPlay) count(err error) {
	if kind := broker.KindOf(err); kind == broker.Denied || kind == broker.NotFound {
		p.refused++
	}
}

func (p *callersPlay) run() {
	one, two := p.open(), p.open()
	p.step(one, "db.read")
	p.vaultDoes(fmt.Errorf("429: %w", broker.ErrNotMinted), false)
	p.step(two, "db.read")
	p.vaultDoes(nil, true)
	p.step(one, "db.read")
	p.vaultDoes(nil, false)
	p.open()
	p.open() // one too many
	for range refusalsAsked {
		p.step(two, "deploy")
	}
	pass(75 * time.Second) // the minute's refusals are summed
	p.step(two, "db.read")
}

// restart starts the broker again and lets it end everything.
func (p *callersPlay) restart() {
	p.Stop()
	p.ledger.Fail(nil)
	p.vault = p.vault.Restarted()
	p.start(p.ledger)
	pass(2 * time.Minute)
	p.wantAllClosed()
}

func (p *callersPlay) check() {
	p.checkRefusals()
	counted := p.counted()
	if counted < p.minted {
		p.t.Errorf("%d steps count, and Vault made %d secrets", counted, p.minted)
	}
	// A process that died leaves it unknown whether a mint was under way, and so does one that could not record that
	// nothing was made.
	excused := p.dead || p.way == notMade && p.failed != nil && p.failed.Detail == nothingMade
	if over := counted - p.minted; over > 1 || over == 1 && !excused {
		p.t.Errorf("%d steps count, and Vault made %d secrets", counted, p.minted)
	}
	if open, more := p.openNow(), p.openMore(); open+more != mostChains {
		p.t.Errorf("with %d open chains %d more could be opened, want %d in all", open, more, mostChains)
	}
	for name, take := range p.probes() {
		if n := take(); n != mostSteps-counted {
			p.t.Errorf("%s: %d more steps were taken, want %d of %d: %d count", name, n, mostSteps-counted, mostSteps, counted)
		}
	}
	pass(time.Hour + 2*time.Minute)
	if more := p.openMore(); more != mostChains {
		p.t.Errorf("an hour later %d chains could be opened, want %d", more, mostChains)
	}
	for name, take := range p.probes() {
		if n := take(); n != mostSteps {
			p.t.Errorf("%s: an hour later %d steps were taken, want %d", name, n, mostSteps)
		}
	}
}

// counted is how many steps must count, by the audit log: those with a recorded handle, except where it is recorded
// that nothing was made.
func (p *callersPlay) counted() (n int) {
	for _, e := range p.entries() {
		switch {
		case e.Op == broker.OpHandle:
			n++
		case e.Op == broker.OpEnd && e.Detail == nothingMade:
			n--
		}
	}
	return n
}

func (p *callersPlay) entries() []broker.Entry {
	all, err := p.ledger.Entries(ctx, 0, 10000)
	if err != nil {
		p.t.Fatal(err)
	}
	return all
}

// openNow counts the agent's chains that have not ended, in the records of the chains themselves.
func (p *callersPlay) openNow() (n int) {
	chains, err := p.Chains(ctx, true)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, c := range chains {
		v, err := p.Chain(ctx, c.Chain.ID)
		if err != nil {
			p.t.Fatal(err)
		}
		if c.Chain.Opener == as("agent").ID && time.Now().Before(v.Delegations[0].Expires) {
			n++
		}
	}
	return n
}

// openMore opens chains until one is refused, and counts them.
func (p *callersPlay) openMore() (n int) {
	for ; n <= mostChains; n++ {
		_, err := p.Open(ctx, as("agent"), broker.OpenRequest{Task: "t", Rights: use("db.read")})
		if err != nil {
			refused(p.t, "Open", err, broker.Denied, broker.CodeManyChains)
			break
		}
	}
	return n
}

// probes take steps until the limit refuses one, and count them: by the agent in another's chain, and by another agent
// on behalf of ana. The first step of each sees the history of the play.
func (p *callersPlay) probes() map[string]func() int {
	return map[string]func() int{
		"the agent": func() int {
			from := p.world.open("other", broker.OpenRequest{Depth: 1})
			d, err := p.Delegate(ctx, as("other"), broker.DelegateRequest{From: from.ID, To: as("agent").ID,
				Rights: use("db.read")})
			if err != nil {
				p.t.Fatal(err)
			}
			return p.takeAll("agent", d)
		},
		"ana": func() int { return p.takeAll("third", p.world.open("third", broker.OpenRequest{Envelope: "for ana"})) },
	}
}

func (p *callersPlay) takeAll(name string, d broker.Delegation) (n int) {
	seen := 0
	for ; n <= mostSteps; n++ {
		_, err := p.Issue(ctx, as(name), step(d, "db.read"))
		if n == 0 {
			seen = p.seen
		}
		if err != nil {
			refused(p.t, "Issue", err, broker.Denied, broker.CodeCallerLimit)
			break
		}
	}
	if seen != mostSteps-n {
		p.t.Errorf("policy sees %d steps of %s, and the limit counts %d", seen, name, mostSteps-n)
	}
	return n
}

// checkRefusals compares the refusals of the play with the audit log. None is counted twice. One is missing only when
// the process died, or with an alarm.
func (p *callersPlay) checkRefusals() {
	recorded, summed := 0, map[string]int{}
	for _, e := range p.entries() {
		switch {
		case e.Actor != as("agent").ID.String():
		case e.Op == broker.OpDenied:
			recorded++
		case e.Op == broker.OpSummed:
			minute, counts, _ := strings.Cut(e.Detail, "Z: ")
			if _, twice := summed[minute]; twice {
				p.t.Errorf("the refusals %s are summed twice", minute)
			}
			n := 0
			if _, err := fmt.Sscanf(counts, "%d more", &n); err != nil {
				p.t.Fatalf("a sum %q", e.Detail)
			}
			summed[minute] = n
			recorded += n
		}
	}
	missing := p.refused - recorded
	if missing < 0 || missing > 0 && !p.dead && p.countAlarms("") == 0 {
		p.t.Errorf("%d refusals are in the audit log, of %d", recorded, p.refused)
	}
}
