package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// acknowledged is what the ledger keeps of one.
type acknowledged struct {
	At time.Time `json:"at"`
}

func keyHeard(rv broker.RevocationID, d broker.DelegationID) string {
	return "h/" + string(rv) + "/" + string(d)
}

// Heard takes a sign of life of a delegation's holder, and with a revocation's id that the holder
// has heard of it and stopped what it was doing. That is recorded once; a delegation that is
// fenced, or over, takes it all the same, since the fence is what it is about.
//
// Errors: Unauthenticated, NotFound (the delegation is not the caller's, or no such revocation is
// over it), Unavailable; without a revocation also Revoked and Expired, so that a holder who missed
// the push hears of it here.
func (b *Engine) Heard(ctx context.Context, c broker.Caller, id broker.DelegationID, rv broker.RevocationID) error {
	const op = "heard"
	now := b.cfg.Now()
	if err := c.Check(op, now); err != nil {
		return err
	}
	var p path
	var unusable error
	if err := b.view(ctx, op, func(tx broker.Tx) (err error) {
		if p, err = b.readPath(tx, op, id); err == nil {
			if unusable = b.usable(tx, op, p, selector.Subject{}, now); unusable != nil && broker.KindOf(unusable) == broker.Internal {
				err = unusable
			}
		}
		return err
	}); err != nil {
		return err
	}
	if p.leaf().Holder != c.ID {
		return b.violated(ctx, c, p, broker.ViolationHolder, "", unknownDelegation(op))
	}
	if b.watchdog.heard(p.leaf(), now); rv == "" { // heard under a freeze, too: it is there
		return unusable
	}
	return b.update(ctx, op, func(tx broker.Tx) error { return b.acknowledge(tx, c, id, rv, now) })
}

// acknowledge records what was heard: the revocation, and every other final one over the
// delegation, since whoever has stopped for one has stopped for all.
func (b *Engine) acknowledge(tx broker.Tx, c broker.Caller, id broker.DelegationID, rv broker.RevocationID, now time.Time) error {
	p, err := b.readPath(tx, "heard", id)
	if err != nil {
		return err
	}
	over, err := b.finalOver(tx, p)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(over, func(f broker.Fence) bool { return f.Revocation == rv }) {
		return orUnknownRevocation("heard", nil)
	}
	for _, f := range over {
		key := keyHeard(f.Revocation, id)
		if known, err := tx.Get(key); err != nil || known != nil {
			if err != nil {
				return err
			}
			continue
		}
		if err := save(tx, key, acknowledged{At: now}); err != nil {
			return err
		}
		if _, err := enter(tx, broker.Entry{At: now, Actor: c.ID.String(), Op: broker.OpHeard, Chain: p.chain.ID, Delegation: id,
			Revocation: f.Revocation}); err != nil {
			return err
		}
	}
	return nil
}

// finalOver gives every final fence over a path: those on its nodes, and the rules that match one.
func (b *Engine) finalOver(tx broker.Tx, p path) (over []broker.Fence, err error) {
	for _, d := range p.nodes {
		if d.Fence != nil && !d.Fence.Frozen {
			over = append(over, *d.Fence)
		}
	}
	rules, err := b.rules.read(tx)
	for _, r := range rules {
		if !r.Fence.Frozen && r.covers(p, selector.Subject{}) {
			over = append(over, r.Fence)
		}
	}
	return over, err
}

// rolls keeps who was to hear of the latest revocations. The set does not change after the fence,
// and to find it takes a look at every delegation that may be covered.
type rolls struct {
	mu    sync.Mutex // guards calls and order
	calls map[broker.RevocationID][]broker.Acknowledgement
	order []broker.RevocationID // the oldest first
}

const maxRolls = 32

func (r *rolls) get(id broker.RevocationID) ([]broker.Acknowledgement, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	who, ok := r.calls[id]
	return who, ok
}

func (r *rolls) keep(id broker.RevocationID, who []broker.Acknowledgement) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.calls == nil {
		r.calls = map[broker.RevocationID][]broker.Acknowledgement{}
	}
	if _, known := r.calls[id]; !known {
		r.order = append(r.order, id)
	}
	r.calls[id] = who
	if len(r.order) > maxRolls {
		delete(r.calls, r.order[0])
		r.order = r.order[1:]
	}
}

// Acknowledgements tells who was to hear of a revocation and who has said so, by delegation and
// ancestors first. It is empty for a freeze, which stops no step, and for a revocation that covers
// grants and no delegation.
//
// Errors: NotFound with CodeRevocationUnknown, Unavailable.
func (b *Engine) Acknowledgements(ctx context.Context, id broker.RevocationID) (list []broker.Acknowledgement, err error) {
	const op = "revocation"
	err = b.view(ctx, op, func(tx broker.Tx) error {
		rv, ok, err := load[broker.Revocation](tx, keyRevocation(id))
		if err != nil || !ok {
			return orUnknownRevocation(op, err)
		}
		who, known := b.rolls.get(id)
		if !known {
			if who, err = b.roll(tx, rv); err != nil {
				return err
			}
			b.rolls.keep(id, who)
		}
		list = slices.Clone(who)
		return fillHeard(tx, id, list)
	})
	return list, err
}

// roll lists who is to hear of a revocation. It looks at what is in the ledger after the fence, so
// that the fence's own transaction costs the same whatever hangs below.
func (b *Engine) roll(tx broker.Tx, rv broker.Revocation) (who []broker.Acknowledgement, err error) {
	if rv.Freeze || rv.Grant != "" {
		return nil, nil
	}
	covers, err := b.covering(tx, rv)
	if err != nil {
		return nil, err
	}
	var open []broker.Delegation
	err = eachMember(tx, rv.Chain, func(id broker.DelegationID) error {
		p, err := b.readPath(tx, "revocation", id)
		if err != nil || p.leaf().Created.After(rv.Fenced) || !covers(p, selector.Subject{}) || slices.ContainsFunc(p.nodes, func(d broker.Delegation) bool { return !rv.Fenced.Before(d.Expires) }) {
			return err
		}
		before, err := b.finalOver(tx, p)
		if err == nil && !slices.ContainsFunc(before, func(f broker.Fence) bool { return f.Generation < rv.Revision }) {
			open = append(open, p.leaf())
		}
		return err
	})
	rootFirst(open)
	for _, d := range open {
		who = append(who, broker.Acknowledgement{Chain: d.Chain, Delegation: d.ID, Holder: d.Holder})
	}
	return who, err
}

// fillHeard fills in who has acknowledged.
func fillHeard(tx broker.Tx, rv broker.RevocationID, list []broker.Acknowledgement) (err error) {
	heard := map[broker.DelegationID]time.Time{}
	scanErr := tx.Scan(keyHeard(rv, ""), "", func(key string, raw []byte) bool {
		var a acknowledged
		if err = json.Unmarshal(raw, &a); err != nil {
			err = fmt.Errorf("reading record %q: %w", key, err)
		}
		heard[broker.DelegationID(key[len(key)-broker.IDLength:])] = a.At
		return err == nil
	})
	for i := range list {
		list[i].At = heard[list[i].Delegation]
	}
	return cmp.Or(err, scanErr)
}
