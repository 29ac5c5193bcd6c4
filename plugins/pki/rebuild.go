package pki

import (
	"context"
	"sync"
	"time"
)

// rebuilds limits how often an engine's lists are rebuilt. The cost of a rebuild grows with the lists, and Vault
// revokes nothing meanwhile. Safe for concurrent use.
type rebuilds struct {
	vault Reader
	now   func() time.Time

	mu    sync.Mutex         // guards state; never held over the network
	state map[string]rebuilt // by mount
}

// rebuilt is the state of one engine.
type rebuilt struct {
	running bool
	until   time.Time // no other rebuild before
}

// request asks Vault to rebuild the engine's lists, and waits for that. Rebuilds take a third of Vault's time at most,
// regardless of the number of proofs: a certificate revoked during one rebuild waits for the next. If none was made,
// request returns the reason.
func (r *rebuilds) request(ctx context.Context, mount string) (done bool, why string) {
	began := r.now()
	r.mu.Lock()
	last := r.state[mount]
	if last.running || began.Before(last.until) {
		r.mu.Unlock()
		return false, ", and a rebuild of the list was requested a moment ago"
	}
	r.state[mount] = rebuilt{running: true}
	r.mu.Unlock()
	_, err := fetch(ctx, r.vault, 1<<20, mount, "crl", "rotate")
	ended := r.now()
	r.mu.Lock()
	r.state[mount] = rebuilt{until: ended.Add(2 * ended.Sub(began))}
	r.mu.Unlock()
	if err != nil {
		return false, ", and Vault does not rebuild the list on request"
	}
	return true, ""
}
