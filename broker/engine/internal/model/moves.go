package model

// moves calls visit with each move that the state allows, and the state after it.
func (m Machine) moves(s state, visit func(move, state)) {
	for i := range m.Grants {
		m.issue(s, i, visit)
		m.vault(s, i, visit)
		m.end(s, i, visit)
	}
	m.delegate(s, visit)
	m.ahead(s, visit)
	m.change(s, visit)
	m.revoke(s, visit)
	m.disk(s, visit)
	m.time(s, visit)
}

// issue is steps 2 to 7 of one issue.
func (m Machine) issue(s state, i int, visit func(move, state)) {
	seen, g := s.visible(), s.steps[i]
	if g.at == idle && i > 0 && s.steps[i-1].at == idle {
		return // issues are alike: the first begins first
	}
	to := func(what string, next at, writes ...record) {
		if len(writes) > 0 && !s.canWrite() {
			return
		}
		t := s
		t.steps[i].at = next
		for _, w := range writes {
			t.order(write{grant: uint8(i), to: w, drops: g.at == taking})
		}
		if next == recording {
			t.steps[i].begun = s.now
			if m.Shared {
				t.steps[i].shared, t.steps[i].token = true, s.made-1
			}
		}
		visit(move{what, i}, t)
	}
	withHandle := record{handle, s.now + mintTimeout + mintBound, s.now + mintTimeout + mintBound + life}
	if m.Fault == ShortEnd {
		withHandle.end = s.now + life
	}
	known := m.Known
	if m.Shared {
		known = s.holding == inUse
	}
	switch {
	case g.at == idle && m.Ahead:
		m.take(s, i, visit)
	case g.at == taking && (seen.fence || s.stopped):
		t := s
		t.steps[i].at, t.ahead.at = refused, ending
		visit(move{"refused, and its token is to end", i}, t)
	case g.at == taking && m.Fault == HandleLeft:
		to("INTENT is ordered, without a handle", recording, record{phase: intent})
	case g.at == taking:
		to("INTENT and HANDLE are ordered, and the token's record is dropped", recording, withHandle)
	case g.at == idle && !seen.fence && known:
		to("INTENT and HANDLE are ordered", recording, withHandle)
	case g.at == idle && !seen.fence:
		to("INTENT is ordered", intending, record{phase: intent})
	case g.at == intending && s.durable.grants[i].phase == intent:
		to("INTENT is durable", intended)
	case g.at == intended && seen.fence:
		to("refused as fenced", refused)
	case g.at == intended && (known || !m.Shared):
		to("HANDLE is ordered", recording, withHandle)
	case g.at == recording && s.now > g.begun+mintTimeout:
		to("refused: recording took too long", refused)
	case g.at == recording && (s.durable.grants[i].phase == handle || m.Fault == EarlyMint || m.Fault == HandleLeft):
		t := s
		t.steps[i].at, t.steps[i].request = sent, true
		visit(move{"the mint is sent", i}, t)
	case g.at == sent && s.now > g.begun+mintTimeout:
		to("the mint's answer did not come", refused)
	case g.at == answered && (seen.fence || seen.grants[i].phase == closed || s.stopped):
		to("refused as fenced", refused)
	case g.at == answered && m.Fault == IssuedPasses:
		to("no fence is found", checked)
	case (g.at == answered || g.at == checked) && s.canWrite():
		t := s
		t.order(write{grant: uint8(i), to: record{issued, seen.grants[i].mintBy, g.end}})
		t.steps[i].at, t.steps[i].held = done, true
		t.late = t.late || s.fence >= acknowledged
		visit(move{"ISSUED is ordered, and the secret handed over", i}, t)
	}
}

// vault carries a mint out, or not. The worst case counts: it does so also after the token was killed.
func (m Machine) vault(s state, i int, visit func(move, state)) {
	if !s.steps[i].request {
		return
	}
	t := s
	g := &t.steps[i]
	g.request, g.alive, g.end = false, true, s.now+life
	lost := t
	if g.at == sent {
		g.at, lost.steps[i].at = answered, refused
		visit(move{"Vault mints, and its answer is lost", i}, lost)
	}
	visit(move{"Vault mints", i}, t)
	t = s
	t.steps[i].request = false
	if s.steps[i].at == sent {
		t.steps[i].at = refused
	}
	visit(move{"Vault refuses the mint", i}, t)
}

// end is the reaper: it kills a secret that must end, and closes the grant of a dead one.
func (m Machine) end(s state, i int, visit func(move, state)) {
	seen, g := s.visible(), s.steps[i]
	r := seen.grants[i]
	if g.closing && !g.told && r.phase == closed && (s.durable.grants[i].phase == closed || m.Fault == EarlyClosed) {
		t := s
		t.steps[i].told = true
		visit(move{"its agent is answered CLOSED", i}, t)
	}
	if r.phase == none || r.phase == closed {
		return
	}
	abandoned := r.phase != issued && !g.at.issuing()
	if m.Closes && g.held && g.at == done && r.phase == issued && !g.closing {
		t := s
		t.steps[i].closing = true
		visit(move{"its agent closes it", i}, t)
	}
	if !seen.fence && !g.ending && !g.closing && !abandoned && s.now <= r.end {
		return
	}
	if m.Fault == KillsShared && r.phase == handle && !g.at.issuing() && s.works != 0 {
		t := s
		t.works = 0
		visit(move{"the delegation's token is killed", i}, t)
	}
	works := g.ahead && s.ahead.works
	if m.Leased && (g.alive || works) && r.phase != intent {
		t := s
		t.steps[i].alive = false
		t.ahead.works = s.ahead.works && !works
		visit(move{"its token is killed", i}, t)
	}
	if g.closing && !m.Leased && g.alive {
		t := s
		t.steps[i].alive = false
		visit(move{"its target is told that it has ended", i}, t)
	}
	dead := s.now > r.end // of a secret without a lease; nothing else shows it
	if m.Leased || g.closing {
		dead = !g.alive && !works
	}
	switch {
	case g.at.issuing() || !s.canWrite():
		return
	case r.phase == intent: // nothing was minted
	case r.phase == handle && s.now <= r.mintBy && m.Fault != EarlyClose:
		return
	case r.phase == handle && m.Fault == CloseAtDeadline:
	case !dead:
		return
	}
	t := s
	t.order(write{grant: uint8(i), to: record{closed, r.mintBy, r.end}})
	t.steps[i].ending = false
	visit(move{"CLOSED is ordered", i}, t)
}

// delegate makes a token of the delegation, records it, and puts it into use.
func (m Machine) delegate(s state, visit func(move, state)) {
	t := s
	switch {
	case !m.Shared:
	case s.holding == without && s.made < maxTokens && s.canWrite() && !s.visible().fence:
		t.holding, t.works = naming, s.works|1<<s.made
		t.order(write{tokens: 1 << s.made})
		t.made++
		visit(move{"the delegation's token is made and ordered", -1}, t)
	case s.holding == naming && (s.durable.tokens.has(s.made-1) || m.Fault == EarlyUse):
		t.holding = inUse
		visit(move{"the delegation's token is put into use", -1}, t)
	}
}

// take gives a step the token that was made ahead for it. Steps without one are in the other configurations.
func (m Machine) take(s state, i int, visit func(move, state)) {
	if s.ahead.at != offered || s.changed && m.Fault != TakenLate {
		return
	}
	s.steps[i].at, s.steps[i].ahead, s.stale = taking, true, s.changed
	if m.Fault != TakenTwice {
		s.ahead.at = taken
	}
	visit(move{"the token that was made ahead is taken", i}, s)
}

// ahead makes a token ahead, records it, and ends it when nobody takes it.
func (m Machine) ahead(s state, visit func(move, state)) {
	recorded := s.visible().ahead
	to := func(what string, next ahead, writes ...write) {
		t := s
		t.ahead = next
		for _, w := range writes {
			t.order(w)
		}
		visit(move{what, -1}, t)
	}
	a := func(at keeping, works bool) ahead { return ahead{at, works, s.ahead.known} }
	switch at, works := s.ahead.at, s.ahead.works; {
	case !m.Ahead:
	case at == unmade && !s.visible().fence:
		to("a token is made ahead", a(unnamed, true))
	case at == unnamed && (s.visible().fence || s.stopped):
		to("its record is refused", a(ending, true))
	case at == unnamed && s.canWrite():
		to("its record is ordered", a(offered, true), write{ahead: true})
	case at == offered:
		to("nobody takes it, or its tool has changed", a(ending, works))
	case at == ending && works:
		to("it is killed", a(ending, false))
		if m.Fault == DropsFirst && recorded && s.canWrite() {
			to("its record is dropped", a(ending, true), write{drops: true})
		}
	case at == ending && !recorded:
		to("it is over", a(over, false))
	case at == ending && s.canWrite():
		to("its record is dropped", a(over, false), write{drops: true})
	}
}

// change is that of a tool, by policy.
func (m Machine) change(s state, visit func(move, state)) {
	if at := s.ahead.at; !s.changed && (at == unnamed || at == offered) {
		s.changed = true
		visit(move{"the tool changes", -1}, s)
	}
}

// revoke is an operator's fence over all grants.
func (m Machine) revoke(s state, visit func(move, state)) {
	switch {
	case s.fence == unasked && s.canWrite():
		t := s
		for i, g := range s.steps {
			if g.held && s.visible().grants[i].phase == issued {
				t.owed |= 1 << i
			}
		}
		t.order(write{fence: true})
		t.fence = asked
		visit(move{"the fence is ordered", -1}, t)
	case s.fence == asked && (s.durable.fence || m.Fault == EarlyAnswer):
		t := s
		t.fence = acknowledged
		visit(move{"the fence is acknowledged", -1}, t)
	case s.fence == acknowledged && (m.Shared || m.Ahead):
		m.settle(s, visit)
	}
}

// settle kills the delegation's tokens that the ledger knows, and those that were made ahead, and then calls the revocation
// CLOSED.
func (m Machine) settle(s state, visit func(move, state)) {
	t, seen := s, s.visible()
	if s.ahead.works && seen.ahead && m.Fault != LeavesAhead {
		if t.ahead.works = false; s.ahead.at == offered {
			t.ahead.at = ending
		}
		visit(move{"the token that was made ahead is killed", -1}, t)
		return
	}
	if left := s.works & seen.tokens; left != 0 {
		t.works &^= left
		visit(move{"the delegation's tokens are killed", -1}, t)
		if m.Fault != LeavesToken {
			return
		}
	}
	for _, g := range seen.grants {
		if g.phase != none && g.phase != closed {
			return
		}
	}
	t = s
	t.fence = settled
	visit(move{"the revocation is CLOSED", -1}, t)
}

// disk makes writes durable, fails, or loses them with the process.
func (m Machine) disk(s state, visit func(move, state)) {
	t := s
	for range s.n {
		t.take(0)
		visit(move{"writes become durable, the oldest first", -1}, t)
	}
	if m.Fault == Reordered {
		for i := uint8(1); i < s.n; i++ {
			t = s
			t.take(i)
			visit(move{"a later write becomes durable alone", -1}, t)
		}
	}
	if m.Fault == SignsOrdered && s.signed < s.n {
		t = s
		t.signed = s.n
		visit(move{"a checkpoint is signed", -1}, t)
	}
	if int(s.crashes) < m.Crashes {
		visit(move{"crash; what was not durable is lost; resume", -1}, m.crashed(s))
	}
	if int(s.failures) < m.Failures && s.n > 0 {
		t = m.failed(s)
		t.drop()
		visit(move{"a write fails, and nothing of it is left", -1}, t)
		t = m.failed(s)
		for range s.n {
			t.take(0)
		}
		t.stopped = true
		visit(move{"a write fails, although it is on the disk", -1}, t)
	}
}

// crashed is the state of the next process, which has resumed. It ends each grant that is not ISSUED, and each token that
// was made ahead.
func (m Machine) crashed(s state) state {
	s.drop()
	switch {
	case s.ahead.at == unmade:
	case s.durable.ahead && m.Fault != ForgetsAhead:
		s.ahead.at = ending
	default:
		s.ahead.at = orphaned
	}
	for i := range s.steps {
		if s.steps[i].at != idle {
			s.steps[i].at = gone
		}
		s.steps[i].ending = false
		if g := &s.steps[i]; g.closing && s.durable.grants[i].phase != closed { // the target asks the next process
			g.closing, g.alive = false, g.alive || g.shared && s.now <= g.end
		}
	}
	if s.fence == asked { // without an answer the operator asks again
		s.fence, s.owed = unasked, 0
	}
	s.stopped, s.holding = false, without
	s.works &= s.durable.tokens // no process has the others, which end by themselves
	s.crashes++
	return s
}

// failed is how the process takes the failure of everything that is not durable. The log is as before.
func (m Machine) failed(s state) state {
	for _, w := range s.log[:s.n] {
		g := &s.steps[w.grant]
		switch {
		case w.fence && s.fence == asked:
			s.fence, s.owed = unasked, 0
		case w.fence:
		case w.tokens != 0 && s.holding == naming: // it is killed, and never used
			s.holding = without
			s.works &^= w.tokens
		case w.tokens != 0:
		case w.ahead && s.ahead.at == offered && m.Fault != KeepsUnrecorded:
			s.ahead.at = ending
		case w.drops && s.ahead.at == over:
			s.ahead.at = ending // its record may be there still
		case w.to.phase == none:
		case w.drops && g.at == recording:
			g.at, s.ahead.at = refused, ending
		case g.at == intending || g.at == recording:
			g.at = refused
		case g.at == done && w.to.phase == issued && m.Fault != FailureIgnored:
			g.ending = true
		}
	}
	s.failures++
	return s
}

// time passes. Secrets reach their end, and Vault works on no request for ever.
func (m Machine) time(s state, visit func(move, state)) {
	if s.now >= lastTick {
		return
	}
	s.now++
	for i := range s.steps {
		g := &s.steps[i]
		g.alive = g.alive && g.end >= s.now
		g.request = g.request && s.now <= g.begun+mintTimeout+mintBound
	}
	visit(move{"time passes", -1}, s)
}
