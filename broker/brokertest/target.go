package brokertest

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Target is a backend in memory. It has one login for each grant and refuses severed ones. It is safe for concurrent
// use.
type Target struct {
	mu     sync.Mutex // guards the fields below
	fails  func(point string) error
	n      int
	logins map[broker.GrantID]string // password of each login that works
	ended  map[broker.GrantID]string // of each that worked before

	watchers []chan struct{}
	final    bool // its proofs are final
}

// ProveFinally makes the target's proofs final from now on.
func (t *Target) ProveFinally() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.final = true
}

// NewTarget returns an empty Target.
func NewTarget() *Target {
	return &Target{logins: map[broker.GrantID]string{}, ended: map[broker.GrantID]string{}}
}

// copy returns the same target as it is now, apart from this one, and without watchers.
func (t *Target) copy() *Target {
	t.mu.Lock()
	defer t.mu.Unlock()
	return &Target{n: t.n, logins: maps.Clone(t.logins), ended: maps.Clone(t.ended), final: t.final}
}

// Forget makes all logins work again that have ended, as a failover to a server that missed their end.
func (t *Target) Forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.Copy(t.logins, t.ended)
	clear(t.ended)
}

// Replace notifies the broker that another server has taken this one's place.
func (t *Target) Replace() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range t.watchers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

// Replaced implements [broker.Watcher].
func (t *Target) Replaced() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := make(chan struct{}, 1)
	t.watchers = append(t.watchers, w)
	return w
}

func (t *Target) endLocked(id broker.GrantID) {
	if password, ok := t.logins[id]; ok {
		t.ended[id] = password
		delete(t.logins, id)
	}
}

// Fail sets a function that is called at the start of "prepare", "sever" and "prove". If it returns an error, the
// call fails with that error. Nil removes the function.
func (t *Target) Fail(f func(point string) error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fails = f
}

func (t *Target) fault(point string) error {
	t.mu.Lock()
	f := t.fails
	t.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(point)
}

func (t *Target) create(id broker.GrantID) (password string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.n++
	t.logins[id] = fmt.Sprintf("marker-%d", t.n)
	return t.logins[id]
}

func (t *Target) drop(id broker.GrantID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.endLocked(id)
}

// Login reports whether a secret works, in the form in which an agent received it.
func (t *Target) Login(secret []byte) bool {
	var s struct{ Grant, Password string }
	if json.Unmarshal(secret, &s) != nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.logins[broker.GrantID(s.Grant)]
	return ok && p == s.Password
}

// Alive returns the grants with a working login.
func (t *Target) Alive() (ids []broker.GrantID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id := range t.logins {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Load implements [broker.Backend].
func (t *Target) Load(broker.Tool) error { return nil }

// Prepare implements [broker.Backend].
func (t *Target) Prepare(_ context.Context, _ broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	if err := t.fault("prepare"); err != nil {
		return broker.Mint{}, "", err
	}
	return broker.Mint{Path: Path("target/creds"), Leased: true, TTL: broker.MaxTTL,
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			secret, err := json.Marshal(map[string]any{"grant": g.ID, "password": answer["password"]})
			password, _ := answer["password"].(string)
			return broker.Finished{Secret: broker.NewSecret(secret), Ref: "login-" + string(g.ID), Digests: []broker.ValueDigest{broker.DigestValue(password)}}, err
		}}, string(g.ID), nil
}

// Sever implements [broker.Severer].
func (t *Target) Sever(_ context.Context, grants []broker.Grant) error {
	if err := t.fault("sever"); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, g := range grants {
		t.endLocked(g.ID)
	}
	return nil
}

// Prove implements [broker.Prover].
func (t *Target) Prove(_ context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	if err := t.fault("prove"); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	found := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		found[i] = broker.Evidence{Check: "target: try the login", Outcome: broker.OutcomeDead, Answer: "refused", Final: t.final}
		if _, alive := t.logins[g.ID]; alive {
			found[i].Outcome, found[i].Answer, found[i].Final = broker.OutcomeAlive, "accepted", false
		}
	}
	return found, nil
}

// Find implements [broker.Finder].
func (t *Target) Find(context.Context) ([]broker.GrantID, error) { return t.Alive(), nil }

// Plant creates a login that the broker does not know.
func (t *Target) Plant(id broker.GrantID) { t.create(id) }
