package engine

import (
	"context"
	"slices"
	"sync"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// hub tells watchers to look again. It carries no data and never blocks whoever woke it.
type hub struct {
	mu     sync.Mutex // guards topics
	topics map[topicName]*topic
}

// topicName is what a watcher waits for: any change of a chain, or only that a fence over it was
// set or lifted. The empty chain stands for all.
type topicName struct {
	chain  broker.ChainID
	fences bool
}

// topic is the watchers of one name, who share a channel that is closed when they must look again.
type topic struct {
	changed  chan struct{}
	watchers int
}

// watch gives a channel that is closed at the next change. cancel must be called.
func (h *hub) watch(name topicName) (changed <-chan struct{}, cancel func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.topics == nil {
		h.topics = map[topicName]*topic{}
	}
	t, ok := h.topics[name]
	if !ok {
		t = &topic{changed: make(chan struct{})}
		h.topics[name] = t
	}
	t.watchers++
	var once sync.Once
	return t.changed, func() {
		once.Do(func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if t.watchers--; t.watchers == 0 && h.topics[name] == t {
				delete(h.topics, name)
			}
		})
	}
}

// wake has those look again whom one of the names is about. An entry of no chain is a rule's, which
// may be about any.
func (h *hub) wake(names []topicName) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range names {
		if n.chain == "" {
			for name := range h.topics {
				if n.fences || !name.fences {
					h.fire(name)
				}
			}
			continue
		}
		h.fire(topicName{chain: n.chain})
		h.fire(topicName{})
		if n.fences {
			h.fire(n)
		}
	}
}

// fire closes the topic's channel; who watches on takes a new one.
func (h *hub) fire(name topicName) {
	if t, ok := h.topics[name]; ok {
		close(t.changed)
		delete(h.topics, name)
	}
}

// Watch gives a channel that is closed when something about the chain has changed, or about any
// when the id is empty, so that the watcher looks again and then watches anew. cancel must be called.
func (b *Engine) Watch(id broker.ChainID) (changed <-chan struct{}, cancel func()) {
	return b.hub.watch(topicName{chain: id})
}

// WatchFences is [Broker.Watch] for whoever asks only for [Broker.Standing]: the channel is closed
// when a fence that may be over the chain was set or lifted, and not by each step of a busy chain.
func (b *Engine) WatchFences(id broker.ChainID) (changed <-chan struct{}, cancel func()) {
	return b.hub.watch(topicName{id, true})
}

// Standing tells the holder of a delegation how it stands: fenced or not, and which of the
// holder's own steps must stop.
//
// Errors: Unauthenticated, NotFound, Unavailable.
func (b *Engine) Standing(ctx context.Context, c broker.Caller, id broker.DelegationID) (s broker.Standing, err error) {
	if s, err = b.Look(ctx, c, id); err == nil {
		b.watchdog.heard(s.Delegation, b.cfg.Now())
	}
	return s, err
}

// Look is [Broker.Standing] on the broker's own account, for a stream that is open: the holder was
// not heard by it.
func (b *Engine) Look(ctx context.Context, c broker.Caller, id broker.DelegationID) (s broker.Standing, err error) {
	const op = "standing"
	if err := c.Check(op, b.cfg.Now()); err != nil {
		return broker.Standing{}, err
	}
	err = b.view(ctx, op, func(tx broker.Tx) error {
		p, err := b.readPath(tx, op, id)
		if err != nil {
			return err
		}
		if p.leaf().Holder != c.ID {
			return unknownDelegation(op)
		}
		s = broker.Standing{Delegation: p.leaf()}
		if s.Fence, err = b.fenceOver(tx, p, selector.Subject{}); err != nil {
			return err
		}
		if s.Fence != nil && !s.Fence.Frozen {
			return nil
		}
		return b.eachCut(tx, p, func(g broker.GrantID) { s.Ended = append(s.Ended, g) })
	})
	return s, err
}

// eachCut calls f with each grant directly under the path's leaf that was fenced by itself or by a
// rule. Of a grant's own fence there is a mark; only for rules must the live grants be looked at, so
// that the agents of a chain with thousands of them hear of a fence at once.
func (b *Engine) eachCut(tx broker.Tx, p path, f func(broker.GrantID)) error {
	leaf := p.leaf().ID
	marked := map[broker.GrantID]bool{}
	if err := tx.Scan(keyCut(leaf, ""), "", func(key string, _ []byte) bool {
		id := broker.GrantID(key[len(key)-broker.IDLength:])
		marked[id] = true
		f(id)
		return true
	}); err != nil {
		return err
	}
	seen := b.sight(tx)
	if _, err := seen.fenceOver(p, selector.Subject{}); err != nil || !slices.ContainsFunc(seen.rules, func(r queryFence) bool { return !r.Fence.Frozen }) {
		return err
	}
	return eachLive(tx, p.chain.ID, func(g broker.Grant) error {
		if g.Delegation != leaf || marked[g.ID] {
			return nil
		}
		over, err := seen.fenceOver(p, p.subject(g))
		if err == nil && over != nil && !over.Frozen {
			f(g.ID)
		}
		return err
	})
}

// Active reports whether a grant's secret is good as far as the ledger knows: handed out, not
// ended, not fenced and not past its time. It is what introspection of a secret answers from; a
// freeze does not end what was handed out.
//
// Errors: Unavailable. A grant that does not exist is not active.
func (b *Engine) Active(ctx context.Context, id broker.GrantID) (active bool, err error) {
	err = b.view(ctx, "introspect", func(tx broker.Tx) error {
		active = false
		g, ok, err := load[broker.Grant](tx, keyGrant(id))
		if err != nil || !ok || g.State != broker.StateIssued {
			return err
		}
		ends, err := mustEnd(b.sight(tx), &g, b.cfg.Now())
		active = err == nil && !ends
		return err
	})
	return active, err
}

// eachLive calls f with each grant of the chain, or of all chains when it is empty, that is
// not over.
func eachLive(tx broker.Tx, chain broker.ChainID, f func(broker.Grant) error) error {
	return eachLiveAs(tx, chain, f)
}

// eachLiveAs is eachLive that decodes only what T asks for.
func eachLiveAs[T any](tx broker.Tx, chain broker.ChainID, f func(T) error) error {
	return eachListed(tx, "l/", chain, f)
}

// eachStatic calls f with each grant of the chain, or of all chains when it is empty, that is over
// while its secret works on.
func eachStatic(tx broker.Tx, chain broker.ChainID, f func(broker.Grant) error) error {
	return eachListed(tx, "w/", chain, f)
}

func eachListed[T any](tx broker.Tx, prefix string, chain broker.ChainID, f func(T) error) error {
	if chain != "" {
		prefix += string(chain) + "/"
	}
	var ids []broker.GrantID
	if err := tx.Scan(prefix, "", func(key string, _ []byte) bool {
		ids = append(ids, broker.GrantID(key[len(key)-broker.IDLength:]))
		return true
	}); err != nil {
		return err
	}
	for _, id := range ids {
		g, ok, err := load[T](tx, keyGrant(id))
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if err := f(g); err != nil {
			return err
		}
	}
	return nil
}

// eachMember calls f with each delegation of the chain, or of all chains when it is empty.
func eachMember(tx broker.Tx, chain broker.ChainID, f func(broker.DelegationID) error) error {
	prefix := "m/"
	if chain != "" {
		prefix += string(chain) + "/"
	}
	return eachMemberAfter(tx, prefix, "", f)
}

// eachMemberAfter calls f with each delegation whose membership has a key with the prefix and after the one given.
func eachMemberAfter(tx broker.Tx, prefix, after string, f func(broker.DelegationID) error) error {
	var ids []broker.DelegationID
	if err := tx.Scan(prefix, after, func(key string, _ []byte) bool {
		ids = append(ids, broker.DelegationID(key[len(key)-broker.IDLength:]))
		return true
	}); err != nil {
		return err
	}
	for _, id := range ids {
		if err := f(id); err != nil {
			return err
		}
	}
	return nil
}
