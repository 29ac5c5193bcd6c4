// Package ahead makes the tokens of steps before their steps. An agent that takes one step after the other with a tool
// whose steps have tokens of their own then waits for one request to Vault, and not for two.
//
// A token that is made ahead can mint nothing: a step that takes it first records it as its HANDLE. Its own record lets
// fences and the next process find it until then. Its value is in the memory of [broker.Vault] alone.
package ahead

import (
	"cmp"
	"context"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// Wait is how long a token waits for its step. It lives that much longer than the step before.
const Wait = records.MostAhead

// The most tokens that wait, in all and of one caller, and the most tools of delegations whose last step is kept.
const (
	mostTokens = 1000
	mostOfOne  = 100
	mostSeen   = 10_000
)

// Config configures a [Book]. All fields are required.
type Config struct {
	Vault broker.Vault
	Now   func() time.Time
	Alarm func(op string, err error) // must not block
	NewID func(prefix string) (string, error)

	Update func(ctx context.Context, op string, f func(*records.Tx) error) error
	// Order is Update that does not wait for the disk. lost is called when the write fails later. It must not block.
	Order func(ctx context.Context, op string, f func(*records.Tx) error, lost func(error)) error

	Limits Limits
	Busy   func() bool // no token is made ahead, for example while steps wait for their turn

	Context     context.Context // the lifetime of background work
	Background  func(func())    // runs f in a goroutine that the owner waits for
	CallTimeout time.Duration   // of one call to Vault
}

// Limits says when Vault limits the rate of revocations.
type Limits interface {
	Limit(error)
	Limited() (again time.Time, err error)
}

// key is for what a token waits: at most one for each delegation and tool.
type key struct {
	delegation broker.DelegationID
	tool       broker.ToolName
}

// Token is one that is made ahead. Book.mu guards its fields until it is made. After that they do not change, but for
// those of its end.
type Token struct {
	Grant  broker.Grant // as of its record: with its id, the token, and the digest of the bundle of its tool
	suffix string       // of its display name, after the grant's id

	made     chan struct{} // closed when it is made, or cannot be
	usable   bool          // it was made, and nothing has ended it
	recorded bool          // its record was ordered
	claimed  bool          // a step has it, or waits for it
	dropped  bool          // it is to end
	killed   bool          // Vault has confirmed its end
}

// last is the latest step with a tool.
type last struct {
	at     time.Time
	suffix string
	bundle string
}

// Book has the tokens that wait, and ends those that nobody takes. It is safe for concurrent use.
type Book struct {
	cfg Config

	mu      sync.Mutex // guards the fields below, and see Token
	waiting map[key]*Token
	callers map[spiffeid.ID]int // tokens that wait
	seen    map[key]last
	ending  map[broker.GrantID]*Token
}

// New makes a Book. Nothing that is to end does so before [Book.Run].
func New(cfg Config) *Book {
	return &Book{cfg: cfg, waiting: map[key]*Token{}, callers: map[spiffeid.ID]int{}, seen: map[key]last{},
		ending: map[broker.GrantID]*Token{}}
}

// Fits reports whether a token that outlives the step may mint m for it: the secret must end with the step by itself. A
// secret that only the end of its token ends in time needs one that was made for the step.
func Fits(m broker.Mint, g broker.Grant) bool {
	life := (g.Expires.Sub(g.Created) + time.Second - 1).Truncate(time.Second)
	return m.Shared == nil && (m.TTL > 0 && m.TTL <= life+time.Second || m.TTL == 0 && m.NoLease)
}

// Named reports whether the token has the display name that the step's token must have. The backend may put into it what
// depends on the step's arguments.
func (t *Token) Named(displayName string) bool { return displayName == string(t.Grant.ID)+t.suffix }

// DropRecord drops the record of the token, in the transaction that records it as a HANDLE.
func (t *Token) DropRecord(tx *records.Tx) error { return tx.DropAhead(t.Grant) }

// Take returns the token that was made ahead for a step like g, with whose id the step goes on. Nil: there is none. It
// waits for one that is being made. The caller records it as the step's HANDLE, or calls [Book.Drop].
func (b *Book) Take(ctx context.Context, g broker.Grant) *Token {
	k := key{g.Delegation, g.Tool}
	b.mu.Lock()
	t := b.waiting[k]
	if t == nil || !b.fitsLocked(t, g) {
		b.mu.Unlock()
		return nil
	}
	t.claimed = true
	b.leaveLocked(k, t)
	b.mu.Unlock()
	select {
	case <-t.made:
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !t.usable {
		b.dropLocked(t)
		return nil
	}
	return t
}

// fitsLocked reports whether a token fits a step. It ends one that will fit no later step either.
func (b *Book) fitsLocked(t *Token, g broker.Grant) bool {
	same := t.Grant.Bundle == g.Bundle && t.Grant.Backend == g.Backend && t.Grant.Caller == g.Caller
	if !same || t.Grant.Expires.Before(g.Expires) || b.cfg.Now().Sub(t.Grant.Created) > Wait {
		b.dropLocked(t)
		return false
	}
	return !t.Grant.Expires.After(g.Expires.Add(2 * Wait))
}

// leaveLocked takes a token out of those that wait.
func (b *Book) leaveLocked(k key, t *Token) {
	if b.waiting[k] != t {
		return
	}
	delete(b.waiting, k)
	if b.callers[t.Grant.Caller]--; b.callers[t.Grant.Caller] == 0 {
		delete(b.callers, t.Grant.Caller)
	}
}

// Drop ends a token that is not used, within seconds. Its grant's id is never given out again.
func (b *Book) Drop(t *Token) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dropLocked(t)
}

// DropUnder ends the tokens that wait below a token of the delegation that has been replaced.
func (b *Book) DropUnder(d broker.DelegationID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for k, t := range b.waiting {
		if k.delegation == d {
			b.dropLocked(t)
		}
	}
}

// Recorded ends tokens of which only the record is known. killed says that Vault has confirmed their end.
func (b *Book) Recorded(killed bool, list ...broker.Grant) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, g := range list {
		t := b.waiting[key{g.Delegation, g.Tool}]
		if t == nil || t.Grant.ID != g.ID {
			t = &Token{Grant: g, recorded: true}
		}
		t.killed = t.killed || killed
		b.dropLocked(t)
	}
}

func (b *Book) dropLocked(t *Token) {
	b.leaveLocked(key{t.Grant.Delegation, t.Grant.Tool}, t)
	t.dropped, t.usable = true, false
	if t.Grant.Token.Accessor == "" { // it is being made, or was never made
		return
	}
	b.ending[t.Grant.ID] = t
}

// Next notes a step whose token is recorded, and makes the token of the next one in the background. It does so from the
// second step on that follows another one like it within [Wait].
func (b *Book) Next(g broker.Grant, t broker.Tool, m broker.Mint, displayName string) {
	suffix, named := strings.CutPrefix(displayName, string(g.ID))
	if !named || !Fits(m, g) {
		return
	}
	now, k := b.cfg.Now(), key{g.Delegation, g.Tool}
	b.mu.Lock()
	before, seen := b.seen[k]
	if !seen && len(b.seen) >= mostSeen {
		b.mu.Unlock()
		return
	}
	b.seen[k] = last{now, suffix, g.Bundle}
	alike := seen && before.suffix == suffix && before.bundle == g.Bundle && now.Sub(before.at) <= Wait
	full := b.waiting[k] != nil || len(b.waiting) >= mostTokens || b.callers[g.Caller] >= mostOfOne
	b.mu.Unlock()
	if !alike || full || b.cfg.Busy() {
		return
	}
	id, err := b.cfg.NewID("gr")
	if err != nil {
		return // a step that needs an id says so
	}
	life := (g.Expires.Sub(g.Created) + time.Second - 1).Truncate(time.Second)
	a := &Token{suffix: suffix, made: make(chan struct{}), Grant: broker.Grant{ID: broker.GrantID(id), Chain: g.Chain,
		Delegation: g.Delegation, Caller: g.Caller, Tool: g.Tool, Backend: g.Backend, Path: g.Path, Bundle: g.Bundle,
		Created: now, Expires: now.Add(life + Wait)}}
	b.mu.Lock()
	if b.waiting[k] != nil {
		b.mu.Unlock()
		return
	}
	b.waiting[k] = a
	b.callers[g.Caller]++
	b.mu.Unlock()
	b.cfg.Background(func() { b.make(a, t.Policy) })
}

// make makes a token and records it. When Vault does not make it, the step makes its own. A crash in between leaves a
// token that nobody has, without a lease. It ends by itself.
func (b *Book) make(t *Token, policy string) {
	defer close(t.made)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.cfg.Context), b.cfg.CallTimeout)
	defer cancel()
	b.mu.Lock()
	g := t.Grant
	b.mu.Unlock()
	token, err := b.cfg.Vault.CreateStepToken(ctx, g, string(g.ID)+t.suffix, policy)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		b.leaveLocked(key{g.Delegation, g.Tool}, t)
		return
	}
	t.Grant.Token = token
	if t.dropped || b.cfg.Context.Err() != nil {
		b.dropLocked(t)
		return
	}
	if t.claimed { // its step records it
		t.usable = true
		return
	}
	g = t.Grant
	b.mu.Unlock()
	err = b.record(ctx, g, func(err error) { b.lost(t, err) })
	b.mu.Lock()
	if t.recorded = true; err != nil || t.dropped {
		b.dropLocked(t)
		return
	}
	t.usable = true
}

// record records a token under a lineage that is not fenced.
func (b *Book) record(ctx context.Context, g broker.Grant, lost func(error)) error {
	const op = "token"
	return b.cfg.Order(ctx, op, func(tx *records.Tx) error {
		l, err := tx.Lineage(op, g.Delegation)
		if err != nil {
			return err
		}
		if err := tx.CheckUsable(op, l, l.Subject(g), b.cfg.Now()); err != nil {
			return err
		}
		if err := tx.PutAhead(g); err != nil {
			return err
		}
		_, err = tx.Enter(entry(g, broker.OpToken, b.cfg.Now(), "made ahead"))
		return err
	}, lost)
}

// lost ends a token whose record failed, unless a step has it: that step's HANDLE is the record that counts.
func (b *Book) lost(t *Token, err error) {
	if err == nil || b.cfg.Context.Err() != nil {
		return
	}
	b.cfg.Background(func() { // the ledger's lock is held
		b.mu.Lock()
		defer b.mu.Unlock()
		if !t.claimed {
			b.dropLocked(t)
		}
	})
}

func entry(g broker.Grant, op broker.Op, now time.Time, detail string) broker.Entry {
	return broker.Entry{At: now, Actor: "pawl", Op: op, Chain: g.Chain, Delegation: g.Delegation, Grant: g.ID, Tool: g.Tool,
		Detail: detail}
}

// Run ends the tokens that nobody takes, until the context of the configuration ends. The next process ends the others.
func (b *Book) Run() {
	tick := time.NewTicker(Wait / 3)
	defer tick.Stop()
	for {
		b.dropIdle()
		b.end()
		select {
		case <-b.cfg.Context.Done():
			return
		case <-tick.C:
		}
	}
}

// dropIdle ends the tokens that have waited too long, and forgets the steps before them.
func (b *Book) dropIdle() {
	now := b.cfg.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, t := range b.waiting {
		if now.Sub(t.Grant.Created) > Wait {
			b.dropLocked(t)
		}
	}
	for k, s := range b.seen {
		if now.Sub(s.at) > Wait {
			delete(b.seen, k)
		}
	}
}

// end kills the tokens that are to end, and drops the records of the dead ones in one transaction. What fails is tried
// again with the next tick.
func (b *Book) end() {
	b.mu.Lock()
	list := make([]Token, 0, len(b.ending))
	for _, t := range b.ending {
		list = append(list, *t)
	}
	b.mu.Unlock()
	var failed error
	var dead []Token
	for _, t := range list {
		_, limited := b.cfg.Limits.Limited()
		if failed = cmp.Or(failed, limited); failed == nil && !t.killed {
			failed = b.kill(t.Grant)
			t.killed = failed == nil
		}
		if t.killed {
			dead = append(dead, t)
		}
	}
	if len(dead) > 0 {
		failed = cmp.Or(failed, b.forget(dead))
	}
	if failed != nil && b.cfg.Context.Err() == nil {
		b.cfg.Alarm("ending tokens that were made ahead", failed)
	}
}

func (b *Book) kill(g broker.Grant) error {
	ctx, cancel := context.WithTimeout(b.cfg.Context, b.cfg.CallTimeout)
	defer cancel()
	err := b.cfg.Vault.Kill(ctx, g.Token.Accessor)
	b.cfg.Limits.Limit(err)
	b.mu.Lock()
	defer b.mu.Unlock()
	if t := b.ending[g.ID]; t != nil && err == nil {
		t.killed = true
	}
	return err
}

// forget drops the records of dead tokens.
func (b *Book) forget(dead []Token) error {
	now := b.cfg.Now()
	err := b.cfg.Update(b.cfg.Context, "token", func(tx *records.Tx) error {
		for _, t := range dead {
			if !t.recorded {
				continue
			}
			if err := tx.DropAhead(t.Grant); err != nil {
				return err
			}
			if _, err := tx.Enter(entry(t.Grant, broker.OpEnd, now, "a token that was made ahead was not used")); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, t := range dead {
		if now := b.ending[t.Grant.ID]; now != nil && now.recorded == t.recorded {
			delete(b.ending, t.Grant.ID)
		}
	}
	return nil
}
