package attest

// LimitReplay makes the memory of used tokens hold n.
func (a *Attestor) LimitReplay(n int) { a.replay = newReplayed(n) }
