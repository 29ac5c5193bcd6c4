// Package model is a small machine of the issue procedure over a ledger with two strengths. [Machine.Check] visits every
// state that its moves can reach, in any order: the acts of issues and of a fence, Vault's answers and lost answers, the
// disk, a crash that loses everything that was ordered and is not durable, a write that fails, and time. In each state it
// checks the promises. A [Fault] builds a known mistake in, so that a test sees the search find it.
//
// The machine shares no code with the engine. docs/architecture.md, "Issue", is what both follow.
package model

import (
	"fmt"
	"strings"
)

// Machine is one configuration of the machine.
type Machine struct {
	Grants   int   // issues, 1 or 2
	Crashes  int   // most crashes
	Failures int   // most writes that fail while the process lives on
	Known    bool  // the handle is known before the intent: INTENT and HANDLE are one record
	Leased   bool  // the secret has a lease: a kill ends it, and its target shows it. Otherwise time alone does
	Shared   bool  // the steps have no tokens of their own: their delegation's token mints. Without Leased
	Ahead    bool  // the token of a later step may be made ahead, and recorded. With Leased
	Closes   bool  // agents close their steps. With Shared: at a target that asks the ledger whether a secret is ended
	Fault    Fault // zero: none
}

// Fault is a mistake in the procedure or in the ledger.
type Fault int

// The faults.
const (
	None            Fault = iota
	IssuedPasses          // ISSUED is checked against the fences first, and ordered in a second transaction
	EarlyAnswer           // a fence is acknowledged when it is ordered, not when it is durable
	EarlyMint             // the mint is sent when the handle is ordered, not when it is durable
	ShortEnd              // HANDLE's latest end does not count the time for which the mint may be under way
	EarlyClose            // a HANDLE is closed while its mint may be under way
	CloseAtDeadline       // a HANDLE without a lease is closed once no mint can be under way, with no thought of its life
	FailureIgnored        // the process leaves a secret alive that it handed out on a write that failed
	SignsOrdered          // a checkpoint has entries that are not durable
	Reordered             // the disk may take a later write without an earlier one
	EarlyUse              // a delegation's token mints when its record is ordered, not when it is durable
	KillsShared           // the end of a step without a token of its own kills its delegation's token
	LeavesToken           // a revocation is CLOSED with no thought of the delegation's tokens
	TakenTwice            // a token that was made ahead is offered to two steps
	TakenLate             // one is used after its tool has changed
	HandleLeft            // a step that takes one records no handle: it was recorded before
	DropsFirst            // the record of one that nobody took is dropped before the token is killed
	LeavesAhead           // a revocation is CLOSED with no thought of the tokens that were made ahead
	ForgetsAhead          // the next process ends no token that was made ahead
	KeepsUnrecorded       // one is offered although its record failed
	EarlyClosed           // an agent is answered when CLOSED is ordered, not when it is durable
)

// The times, in ticks.
const (
	mintTimeout = 1 // of the process, for one mint
	mintBound   = 1 // for which Vault may work on after that
	life        = 1 // of a secret
	lastTick    = 5
)

const (
	maxGrants = 2
	maxLog    = 8
	maxTokens = 2 // of the delegation
)

// at is where the process stands with one issue.
type at uint8

const (
	idle      at = iota
	taking       // it has a token that was made ahead
	intending    // INTENT is ordered
	intended     // INTENT is durable
	recording    // HANDLE is ordered
	sent         // the mint was sent, once
	answered     // the process has the secret
	checked      // only with IssuedPasses
	done         // handed over
	refused      // with an error; nothing was handed over
	gone         // with a process that crashed
)

// issuing reports whether an issue of this process works on the grant.
func (a at) issuing() bool { return a >= taking && a <= checked }

// phase is a grant's state in the ledger.
type phase uint8

const (
	none phase = iota
	intent
	handle
	issued
	closed
)

// record is a grant in the ledger.
type record struct {
	phase  phase
	mintBy uint8 // after it no mint can be under way
	end    uint8 // the latest end of its secret
}

// ledger has the records that a reader sees.
type ledger struct {
	grants [maxGrants]record
	tokens tokens
	ahead  bool // the token that was made ahead
	fence  bool // over all grants
}

// tokens is a set of the delegation's tokens, as bits.
type tokens uint8

func (t tokens) has(token uint8) bool { return t&(1<<token) != 0 }

// write is one transaction: a fence, a token of the delegation, a token that was made ahead or is dropped, or a grant's
// record, with which such a token may be dropped.
type write struct {
	fence  bool
	tokens tokens
	ahead  bool
	drops  bool // the record of the token that was made ahead
	grant  uint8
	to     record // none: not of a grant
}

func (l *ledger) apply(w write) {
	switch {
	case w.fence:
		l.fence = true
	case w.tokens != 0:
		l.tokens |= w.tokens
	case w.to.phase != none:
		l.grants[w.grant] = w.to
	}
	l.ahead = l.ahead && !w.drops || w.ahead
}

// step is one issue, with what Vault and the client have of it.
type step struct {
	at      at
	begun   uint8 // when the mint's time began
	shared  bool  // the delegation's token mints
	ahead   bool  // the token that was made ahead mints
	token   uint8 // that one
	request bool  // at Vault: it may still be carried out
	alive   bool  // the secret works
	end     uint8 // of the secret
	held    bool  // a client has the secret
	ending  bool  // this process knows that it must end the grant
	closing bool  // its agent has asked this process to close it
	told    bool  // its agent was answered that it is CLOSED
}

type fencing uint8

const (
	unasked fencing = iota
	asked           // the fence is ordered
	acknowledged
	settled // the revocation is CLOSED
)

// holding is where the process stands with its token of the delegation.
type holding uint8

const (
	without holding = iota
	naming          // Vault has made it, and its record is ordered
	inUse           // its record is durable
)

// keeping is where the process stands with a token that it made ahead.
type keeping uint8

const (
	unmade   keeping = iota
	unnamed          // Vault has made it
	offered          // its record is ordered: the next step may take it
	taken            // by a step, which has it from now on
	ending           // it must be killed, and its record dropped
	over             // its record is dropped, or was never there
	orphaned         // the process that had it crashed
)

// ahead is a token that is made before its step.
type ahead struct {
	at    keeping
	works bool // Vault accepts it
	known bool // its record was durable once
}

// state is one state of the whole. States are compared, so there is no pointer in it.
type state struct {
	now     uint8
	steps   [maxGrants]step
	durable ledger
	log     [maxLog]write // ordered and not durable, the oldest first
	n       uint8         // writes in log
	fence   fencing
	stopped bool // after a write with an unknown outcome nothing is written until a restart

	crashes, failures uint8

	holding holding // of the token that was made last
	made    uint8   // tokens of the delegation so far
	works   tokens  // those that Vault accepts

	ahead   ahead
	changed bool // the tool has changed since the token was made ahead
	stale   bool // a step took it nevertheless

	signed    uint8 // writes in log that a checkpoint has
	owed      uint8 // grants that were ISSUED before the fence was ordered, as bits
	late      bool  // a secret was handed out after the acknowledgement
	rewritten bool  // a signed write was lost
}

// visible is what every reader of the running process sees.
func (s *state) visible() ledger {
	l := s.durable
	for _, w := range s.log[:s.n] {
		l.apply(w)
	}
	return l
}

func (s *state) canWrite() bool { return !s.stopped && s.n < maxLog }

func (s *state) order(w write) {
	s.log[s.n] = w
	s.n++
}

// drop empties the log.
func (s *state) drop() {
	s.rewritten = s.rewritten || s.signed > 0
	s.log, s.n, s.signed = [maxLog]write{}, 0, 0
}

// take makes write i of the log durable.
func (s *state) take(i uint8) {
	s.durable.apply(s.log[i])
	s.ahead.known = s.ahead.known || s.durable.ahead
	copy(s.log[i:], s.log[i+1:])
	s.n--
	s.log[s.n] = write{}
	if i < s.signed {
		s.signed--
	}
}

// move is one act, for a trace.
type move struct {
	what  string
	grant int // -1: none
}

func (m move) String() string {
	if m.grant < 0 {
		return m.what
	}
	return fmt.Sprintf("%s (grant %d)", m.what, m.grant)
}

// Violation is a promise that a state breaks, and the acts that lead to it.
type Violation struct {
	Promise string
	Trace   []string
}

// Error is the promise and the trace.
func (v *Violation) Error() string {
	return fmt.Sprintf("%s:\n  %s", v.Promise, strings.Join(v.Trace, "\n  "))
}

// Check visits the states, the nearest first. It returns their number, and the first violation or nil.
func (m Machine) Check() (states int, found *Violation) {
	type origin struct {
		from int
		by   move
	}
	var first state
	known, queue, origins := map[state]struct{}{first: {}}, []state{first}, []origin{{from: -1}}
	for i := 0; i < len(queue); i++ {
		if broken := queue[i].broken(); broken != "" {
			v := &Violation{Promise: broken}
			for at := i; origins[at].from >= 0; at = origins[at].from {
				v.Trace = append([]string{origins[at].by.String()}, v.Trace...)
			}
			return len(queue), v
		}
		m.moves(queue[i], func(by move, next state) {
			if _, ok := known[next]; !ok {
				known[next] = struct{}{}
				queue, origins = append(queue, next), append(origins, origin{i, by})
			}
		})
	}
	return len(queue), nil
}

// broken returns the promise that the state breaks, or "".
func (s *state) broken() string {
	switch {
	case s.late:
		return "a secret was handed out after the fence's acknowledgement"
	case s.holding == inUse && !s.works.has(s.made-1) && !s.visible().fence:
		return "a delegation's token was killed without a fence"
	case s.fence == settled && s.holding == inUse && s.works.has(s.made-1):
		return "a revocation is CLOSED, and a token of its delegation can mint"
	case s.fence >= acknowledged && !s.durable.fence:
		return "an acknowledged fence is not durable"
	case s.rewritten:
		return "a signed entry of the log was lost"
	case s.stale:
		return "a step uses a token that was made before its tool changed"
	}
	if broken := s.brokenAhead(); broken != "" {
		return broken
	}
	for i, g := range s.steps {
		now, onDisk := s.visible().grants[i], s.durable.grants[i]
		switch {
		case s.fence >= acknowledged && s.owed&(1<<i) != 0 && onDisk.phase < issued:
			return "what was ordered before a fence is not durable with it"
		case g.request && g.shared && !s.durable.tokens.has(g.token):
			return "a mint is under way with a token that the ledger does not know"
		case g.told && onDisk.phase != closed:
			return "an agent was answered CLOSED, and a crash leaves the grant open"
		case !g.alive:
			continue
		case onDisk.phase < handle: // as a crash would leave it
			return "a secret is alive that the ledger does not know"
		case onDisk.phase == closed || now.phase == closed:
			return "a secret is alive whose grant is CLOSED"
		case onDisk.end < g.end || now.end < g.end:
			return "a secret outlives the latest end in the ledger"
		case g.held && g.at == done && now.phase == handle && !g.ending:
			return "a client has a secret that is not recorded, and nothing ends it"
		}
	}
	return ""
}

// owners counts the steps that have the token that was made ahead, as a ledger has it.
func (s *state) owners(l ledger) (n int) {
	for i, g := range s.steps {
		if g.ahead && l.grants[i].phase >= handle {
			n++
		}
	}
	return n
}

// brokenAhead is broken for the token that was made ahead.
func (s *state) brokenAhead() string {
	seen, a := s.visible(), s.ahead
	switch {
	case s.owners(seen) > 1:
		return "two steps have one token"
	case a.works && a.known && !s.durable.ahead && s.owners(s.durable) == 0:
		return "a token that was made ahead works, and the ledger has forgotten it"
	case s.fence == settled && a.works && (seen.ahead || a.at == offered):
		return "a revocation is CLOSED, and a token that was made ahead can mint"
	case a.at == orphaned && seen.ahead:
		return "a token that was made ahead is recorded, and nothing ends it"
	case a.at == offered && !seen.ahead && s.owners(seen) == 0:
		return "a token that was made ahead is offered without a record"
	}
	return ""
}
