package engine_test

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

const (
	downtime   = time.Second      // between the death of the old process and the start of the new one
	reconciled = 20 * time.Second // enough to end every grant that must end
)

// revive makes a world on a copy of a dead broker's ledger. Vault and the targets have the leases, logins and tokens
// that they had when it died.
func revive(t *testing.T, d *oldData, dead string) *oldWorld {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ledger.db")
	copyFile(t, dead, path)
	w := newOldWorld(t, oldWorldConfig{path: path, start: d.Died.Add(downtime), survived: true,
		vault: func(w *oldWorld, v signingVault) broker.Vault { return survivingVault{v, w, d} }})
	for id := range d.Outside.Leases {
		w.vault.Plant(id, d.Died.Add(-time.Minute))
	}
	for _, id := range d.Outside.Logins {
		w.target.Plant(broker.GrantID(id))
	}
	for _, id := range d.Outside.Signed {
		w.signer.sign(broker.GrantID(id))
	}
	return w
}

// survivingVault knows the tokens that the dead process made by their accessors in the ledger. Killing one ends the
// leases and logins of the grants below it.
type survivingVault struct {
	signingVault
	w *oldWorld
	d *oldData
}

func (v survivingVault) Kill(ctx context.Context, accessor string) error {
	for _, id := range v.below(accessor) {
		for lease, grant := range v.d.Outside.Leases {
			if grant == id {
				if err := v.Revoke(ctx, lease); err != nil {
					return err
				}
				if err := v.w.target.Sever(ctx, []broker.Grant{{ID: broker.GrantID(grant)}}); err != nil {
					return err
				}
			}
		}
	}
	return v.signingVault.Kill(ctx, accessor)
}

// below returns the grants with the accessor's token, or with a token below it.
func (v survivingVault) below(accessor string) (ids []string) {
	own := func(h oldHandle) bool { return h.Accessor == accessor }
	for _, c := range v.d.Answers.Chains {
		under := map[string]bool{}
		for _, d := range c.Delegations { // ancestors before descendants
			under[d.ID] = under[d.Parent] || slices.ContainsFunc(d.Tokens, own)
		}
		for _, g := range c.Grants {
			if under[g.Delegation] || own(g.Token) {
				ids = append(ids, g.ID)
			}
		}
	}
	return ids
}

// after returns the state that [oldAfter] describes.
func (w *oldWorld) after(d *oldData) oldAfter {
	w.t.Helper()
	a := oldAfter{Grants: map[string]string{}, Revocations: map[string]string{}, Steps: map[string]string{},
		History: map[string]map[string]oldPast{}}
	var chains []broker.ChainView
	for _, c := range d.Answers.Chains {
		v, err := w.Chain(ctx, broker.ChainID(c.ID))
		w.must(err)
		chains = append(chains, v)
		for _, g := range v.Grants {
			a.Grants[string(g.ID)] = strings.TrimSpace(fmt.Sprintf("%s %s %s", g.State, g.Ending, g.Outcome))
		}
	}
	revocations, err := w.Revocations(ctx)
	w.must(err)
	for _, rv := range revocations {
		a.Revocations[string(rv.ID)] = fmt.Sprintf(
			"%s: %d dead, %d alive, %d unknown of %d; %d static, %d tokens, settled %v",
			rv.Closure, rv.Dead, rv.Alive, rv.Unknown, rv.Grants, rv.Static, rv.Tokens, !rv.Settled.IsZero())
	}
	for _, c := range chains {
		id := string(c.Chain.ID)
		// Descendants first: an ancestor's budget that is spent would hide theirs.
		for _, node := range slices.Backward(c.Delegations) {
			answer := w.nextStep(node)
			if q := w.policy.asked(); a.History[id] == nil && q.Chain.ID == c.Chain.ID {
				a.History[id] = map[string]oldPast{}
				for tool, p := range q.History {
					a.History[id][string(tool)] = oldPast{p.Count, p.First.UTC(), p.Last.UTC()}
				}
			}
			if node.Parent != "" {
				answer += ", " + w.nextStep(node)
			}
			a.Steps[string(node.ID)] = answer
		}
	}
	return a
}

// nextStep takes a step with the first tool that a delegation may use. It returns "issued" or the refusal.
func (w *oldWorld) nextStep(d broker.Delegation) string {
	w.t.Helper()
	i := slices.IndexFunc(d.Scope, func(r broker.Right) bool { return r.Use })
	values := map[string]args.Value{}
	for name := range d.Scope[i].Args {
		if values[name] = everyConstraint[name].value; name == "table" {
			values[name] = args.String("orders")
		}
	}
	r := step(d, d.Scope[i].Tool)
	r.Args = argsOf(values)
	if _, err := w.Issue(ctx, holderOf(d), r); err != nil {
		return codeOf(err)
	}
	return "issued"
}

// delegation reads a delegation of the old ledger.
func (w *oldWorld) delegation(d *oldData, id string) (found broker.Delegation) {
	w.t.Helper()
	for _, c := range d.Answers.Chains {
		if slices.ContainsFunc(c.Delegations, func(d oldDelegation) bool { return d.ID == id }) {
			v, err := w.Chain(ctx, broker.ChainID(c.ID))
			w.must(err)
			return v.Delegations[slices.IndexFunc(v.Delegations,
				func(d broker.Delegation) bool { return string(d.ID) == id })]
		}
	}
	w.t.Fatalf("there is no delegation %s", id)
	return found
}

// silent resumes the broker, and sends no heartbeat for two hours. It returns the delegations that missed one, in
// order.
func (w *oldWorld) silent(d *oldData) []string {
	w.t.Helper()
	w.must(w.Resume(ctx))
	pass(2*time.Hour + time.Second)
	missed := map[string]bool{}
	for _, e := range w.entries(d.Log.Head) {
		if e.Code == broker.Code(broker.ViolationHeartbeat) {
			missed[string(e.Delegation)] = true
		}
	}
	return slices.Sorted(maps.Keys(missed))
}
