package e2e_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine"
)

// faults wraps the engine's ports. Each act of the engine passes two points, one before and one after it, such as
// "before mint #1" and "after commit of intent #2".
type faults struct {
	// reach is called on the goroutine of the act and is the fault. If it returns an error, a commit or an act of a
	// target fails: at the point before it without having happened, at the point after it although it happened.
	// Vault's acts fail by Vault's answers: see proxy.
	reach func(point string) error

	mu   sync.Mutex // guards seen
	seen map[string]int
}

func newFaults(reach func(point string) error) *faults {
	return &faults{reach: reach, seen: map[string]int{}}
}

// install wraps the engine's ports with the faults.
func (f *faults) install(c *engine.Config) {
	c.Ledger, c.Vault = faultyLedger{c.Ledger, f}, faultyVault{c.Vault, f}
	c.Backends = maps.Clone(c.Backends) // the original map also answers which interfaces a backend implements
	for name, b := range c.Backends {
		if t, ok := b.(target); ok {
			c.Backends[name] = faultyTarget{t, f}
		}
	}
}

func (f *faults) at(place string) error {
	f.mu.Lock()
	f.seen[place]++
	point := fmt.Sprintf("%s #%d", place, f.seen[place])
	f.mu.Unlock()
	return f.reach(point)
}

// around is used as `defer f.around("mint")()`, for acts that cannot fail at a point.
func (f *faults) around(act string) (after func()) {
	_ = f.at("before " + act)
	return func() { _ = f.at("after " + act) }
}

// try is around for an act that can fail at its points.
func (f *faults) try(act string, do func() error) error {
	if err := f.at("before " + act); err != nil {
		return err
	}
	err := do()
	if late := f.at("after " + act); late != nil {
		return late
	}
	return err
}

type faultyLedger struct {
	broker.Ledger
	*faults
}

func (l faultyLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	return l.write(f, func(f func(broker.Tx) error) error { return l.Ledger.Update(ctx, f) })
}

func (l faultyLedger) Order(ctx context.Context, f func(broker.Tx) error, done func(error)) error {
	return l.write(f, func(f func(broker.Tx) error) error { return l.Ledger.Order(ctx, f, done) })
}

func (l faultyLedger) write(f func(broker.Tx) error, write func(func(broker.Tx) error) error) error {
	var what string
	var refused error // permanent: a ledger may run f again
	err := write(func(tx broker.Tx) error {
		noting := &notingTx{Tx: tx}
		if err := f(noting); err != nil {
			return err
		}
		if what = ""; len(noting.ops) > 0 && refused == nil { // otherwise it changes nothing
			what = "commit of " + strings.Join(slices.Compact(noting.ops), "+")
			refused = l.at("before " + what)
		}
		return refused
	})
	if err == nil && what != "" {
		err = l.at("after " + what)
	}
	return err
}

// notingTx records the audit entries of a transaction: they name the commit.
type notingTx struct {
	broker.Tx
	ops []string
}

func (t *notingTx) Append(e broker.Entry) (broker.Revision, error) {
	t.ops = append(t.ops, string(e.Op))
	return t.Tx.Append(e)
}

type faultyVault struct {
	broker.Vault
	*faults
}

func (v faultyVault) CreateDelegationToken(ctx context.Context, d broker.Delegation, policies []string) (broker.Handle, error) {
	defer v.around("branch")()
	return v.Vault.CreateDelegationToken(ctx, d, policies)
}

func (v faultyVault) CreateStepToken(ctx context.Context, g broker.Grant, displayName, policy string) (broker.Handle, error) {
	defer v.around("child")()
	return v.Vault.CreateStepToken(ctx, g, displayName, policy)
}

func (v faultyVault) Mint(ctx context.Context, h broker.Handle, m broker.Mint) (broker.Lease, broker.Secret, error) {
	defer v.around("mint")()
	return v.Vault.Mint(ctx, h, m)
}

func (v faultyVault) Kill(ctx context.Context, accessor string) error {
	defer v.around("kill")()
	return v.Vault.Kill(ctx, accessor)
}

func (v faultyVault) LeasesGone(ctx context.Context, leases []string) ([]bool, error) {
	defer v.around("gone")()
	return v.Vault.LeasesGone(ctx, leases)
}

// Leases implements [broker.LeaseLister].
func (v faultyVault) Leases(ctx context.Context, tools []broker.Tool) ([]string, error) {
	return v.Vault.(broker.LeaseLister).Leases(ctx, tools)
}

// LookUpLeases implements [broker.LeaseLister].
func (v faultyVault) LookUpLeases(ctx context.Context, ids []string) ([]broker.FoundLease, error) {
	return v.Vault.(broker.LeaseLister).LookUpLeases(ctx, ids)
}

// Irrevocable implements [broker.IrrevocableLister].
func (v faultyVault) Irrevocable(ctx context.Context) ([]string, error) {
	return v.Vault.(broker.IrrevocableLister).Irrevocable(ctx)
}

// target is a backend with every optional interface, such as PostgreSQL's.
type target interface {
	broker.Backend
	broker.Severer
	broker.Prover
	broker.Finder
	broker.Remover
}

type faultyTarget struct {
	target
	*faults
}

func (b faultyTarget) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (m broker.Mint, name string, err error) {
	err = b.try("prepare", func() (err error) { m, name, err = b.target.Prepare(ctx, t, g); return err })
	return m, name, err
}

func (b faultyTarget) Sever(ctx context.Context, grants []broker.Grant) error {
	return b.try("sever", func() error { return b.target.Sever(ctx, grants) })
}

func (b faultyTarget) Prove(ctx context.Context, grants []broker.Grant) (found []broker.Evidence, err error) {
	err = b.try("prove", func() (err error) { found, err = b.target.Prove(ctx, grants); return err })
	return found, err
}
