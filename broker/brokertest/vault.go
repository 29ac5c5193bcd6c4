package brokertest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Vault is a token tree and its leases in memory. It behaves like the real one where the procedures depend on it. A
// token ends with its parent, a lease ends with its token, and a minted secret outlives a lost answer. It mints into
// a [Target]. It is safe for concurrent use.
type Vault struct {
	Target *Target

	mu     sync.Mutex // guards the fields below
	fails  func(point string) error
	n      int
	tokens map[string]*token
	held   map[broker.DelegationID]string
	leases map[string]lease
}

type lease struct {
	accessor string
	issued   time.Time
	stuck    bool // irrevocable
}

type token struct {
	parent string
	dead   bool
	grant  broker.GrantID
	lease  string

	created time.Time // the time of its grant, which is close to that of its lease
}

// NewVault returns a Vault that mints into target.
func NewVault(target *Target) *Vault {
	return &Vault{Target: target, tokens: map[string]*token{}, held: map[broker.DelegationID]string{}, leases: map[string]lease{}}
}

// Restarted returns the same Vault as a new broker process finds it: without tokens in memory.
func (v *Vault) Restarted() *Vault {
	v.mu.Lock()
	defer v.mu.Unlock()
	return &Vault{Target: v.Target, n: v.n + 1_000_000, tokens: maps.Clone(v.tokens),
		held: map[broker.DelegationID]string{}, leases: maps.Clone(v.leases)}
}

// Copy returns the same Vault and target as they are now, apart from these, as a new broker process finds them.
func (v *Vault) Copy() *Vault {
	v.mu.Lock()
	defer v.mu.Unlock()
	next := &Vault{Target: v.Target.copy(), n: v.n + 1_000_000, tokens: map[string]*token{},
		held: map[broker.DelegationID]string{}, leases: maps.Clone(v.leases)}
	for accessor, t := range v.tokens {
		same := *t
		next.tokens[accessor] = &same
	}
	return next
}

// LeaseIDs returns the ids of the live leases.
func (v *Vault) LeaseIDs() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Sorted(maps.Keys(v.leases))
}

// Steps counts the live tokens of steps.
func (v *Vault) Steps() (n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, t := range v.tokens {
		if t.grant != "" && !t.dead {
			n++
		}
	}
	return n
}

// Last returns the accessor of the step's token that was made last.
func (v *Vault) Last() (accessor string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for n := v.n; n > 0 && accessor == ""; n-- {
		if name := fmt.Sprintf("accessor-%d", n); v.tokens[name] != nil && v.tokens[name].grant != "" {
			accessor = name
		}
	}
	return accessor
}

// Alive reports whether a token is alive.
func (v *Vault) Alive(accessor string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	t := v.tokens[accessor]
	return t != nil && !t.dead
}

// Fail sets a function that is called before and after each call that creates or ends something ("child", "child
// done", …). If it returns an error, the call fails at that point. Nil removes the function.
func (v *Vault) Fail(f func(point string) error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fails = f
}

func (v *Vault) fault(point string) error {
	v.mu.Lock()
	f := v.fails
	v.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(point)
}

// Holds implements [broker.TokenTree].
func (v *Vault) HasToken(id broker.DelegationID) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	t := v.tokens[v.held[id]]
	return t != nil && !t.dead
}

// Branch implements [broker.TokenTree].
func (v *Vault) CreateDelegationToken(_ context.Context, d broker.Delegation, _ []string) (broker.Handle, error) {
	if err := v.fault("branch"); err != nil {
		return broker.Handle{}, err
	}
	v.mu.Lock()
	parent := ""
	if d.Parent != "" {
		if parent = v.held[d.Parent]; parent == "" || v.tokens[parent].dead {
			v.mu.Unlock()
			return broker.Handle{}, broker.ErrNoParent
		}
	}
	h := v.makeLocked(token{parent: parent}, d.Expires)
	v.mu.Unlock()
	return h, v.fault("branch done")
}

func (v *Vault) makeLocked(t token, expires time.Time) broker.Handle {
	v.n++
	accessor := fmt.Sprintf("accessor-%d", v.n)
	v.tokens[accessor] = &t
	return broker.Handle{Accessor: accessor, Expires: expires}
}

// Keep implements [broker.TokenTree].
func (v *Vault) Activate(id broker.DelegationID, h broker.Handle) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.held[id] = h.Accessor
}

// Child implements [broker.Minter].
func (v *Vault) CreateStepToken(_ context.Context, g broker.Grant, _, _ string) (broker.Handle, error) {
	if err := v.fault("child"); err != nil {
		return broker.Handle{}, err
	}
	v.mu.Lock()
	parent := v.held[g.Delegation]
	if parent == "" || v.tokens[parent].dead {
		v.mu.Unlock()
		return broker.Handle{}, fmt.Errorf("the delegation's token is gone: %w", broker.ErrNotMinted)
	}
	h := v.makeLocked(token{parent: parent, grant: g.ID, created: g.Created}, g.Expires)
	v.mu.Unlock()
	return h, v.fault("child done")
}

// DelegationToken implements [broker.Minter].
func (v *Vault) DelegationToken(g broker.Grant, _ string) (broker.Handle, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	parent := v.held[g.Delegation]
	if parent == "" || v.tokens[parent].dead {
		return broker.Handle{}, broker.ErrNoParent
	}
	return broker.Handle{Accessor: parent, Expires: g.Expires.Add(time.Hour)}, nil
}

// Mint implements [broker.Minter].
func (v *Vault) Mint(_ context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	if err := v.fault("mint"); err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	v.mu.Lock()
	t := v.tokens[h.Accessor]
	if t == nil || t.dead {
		v.mu.Unlock()
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("permission denied: %w", broker.ErrNotMinted)
	}
	v.mu.Unlock()
	if m.Shared != nil {
		return v.mintShared(*m.Shared, m)
	}
	password := v.Target.create(t.grant) // the credential exists before the lease is written
	if err := v.fault("mint created"); err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	v.mu.Lock()
	v.n++
	id := fmt.Sprintf("target/creds/%d", v.n)
	t.lease = id
	v.leases[id] = lease{accessor: h.Accessor, issued: t.created}
	v.mu.Unlock()
	if err := v.fault("mint done"); err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	done, err := m.Finish(map[string]any{"password": password}, h.Expires)
	end := h.Expires
	if !m.Expires.IsZero() { // its token outlives it
		end = m.Expires
	}
	return broker.Lease{ID: id, Ref: done.Ref, Expires: end, Digests: done.Digests}, done.Secret, err
}

// mintShared mints without a lease. No end of a token ends the secret.
func (v *Vault) mintShared(s broker.SharedToken, m broker.Mint) (broker.Lease, broker.Secret, error) {
	password := v.Target.create(s.Grant)
	if err := v.fault("mint done"); err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	v.mu.Lock()
	v.n++
	request := fmt.Sprintf("request-%d", v.n)
	v.mu.Unlock()
	done, err := m.Finish(map[string]any{"password": password}, s.Expires)
	return broker.Lease{Ref: done.Ref, Expires: s.Expires, Digests: done.Digests, Request: request}, done.Secret, err
}

// Kill implements [broker.Killer]. As in Vault, everything below the token ends too.
func (v *Vault) Kill(_ context.Context, accessor string) error {
	if err := v.fault("kill"); err != nil {
		return err
	}
	v.mu.Lock()
	v.killLocked(accessor)
	v.mu.Unlock()
	return v.fault("kill done")
}

func (v *Vault) killLocked(accessor string) {
	t := v.tokens[accessor]
	if t == nil || t.dead {
		return
	}
	t.dead = true
	if t.lease != "" && !v.leases[t.lease].stuck {
		delete(v.leases, t.lease)
		v.Target.drop(t.grant)
	}
	for child, c := range v.tokens {
		if c.parent == accessor {
			v.killLocked(child)
		}
	}
}

// Revoke implements [broker.Killer].
func (v *Vault) Revoke(_ context.Context, id string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	l, ok := v.leases[id]
	if l.stuck {
		return fmt.Errorf("lease %s cannot be revoked", id)
	}
	if delete(v.leases, id); ok && v.tokens[l.accessor] != nil {
		v.Target.drop(v.tokens[l.accessor].grant)
	}
	return nil
}

// Leases implements [broker.LeaseLister]. It returns every lease, for any tools.
func (v *Vault) Leases(context.Context, []broker.Tool) (ids []string, err error) {
	if err := v.fault("leases"); err != nil {
		return nil, err
	}
	return v.LeaseIDs(), nil
}

// LookUpLeases implements [broker.LeaseLister].
func (v *Vault) LookUpLeases(_ context.Context, ids []string) (found []broker.FoundLease, err error) {
	if err := v.fault("look up"); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, id := range ids {
		if l, ok := v.leases[id]; ok {
			found = append(found, broker.FoundLease{ID: id, Issued: l.issued})
		}
	}
	return found, nil
}

// Plant creates a lease that the broker does not know.
func (v *Vault) Plant(id string, issued time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.leases[id] = lease{issued: issued}
}

// Stick makes a lease irrevocable, or revocable again. Vault lists an irrevocable lease, and nothing ends it.
func (v *Vault) Stick(id string, is bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	l := v.leases[id]
	l.stuck = is
	v.leases[id] = l
}

// Irrevocable implements [broker.IrrevocableLister].
func (v *Vault) Irrevocable(context.Context) (ids []string, err error) {
	if err := v.fault("irrevocable"); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for id, l := range v.leases {
		if l.stuck {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Gone implements [broker.Killer].
func (v *Vault) LeasesGone(_ context.Context, leases []string) ([]bool, error) {
	if err := v.fault("gone"); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	gone := make([]bool, len(leases))
	for i, l := range leases {
		_, there := v.leases[l]
		gone[i] = !there
	}
	return gone, nil
}
