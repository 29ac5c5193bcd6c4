package broker

import (
	"context"
	"sync"
)

// hub tells watchers to look again. It carries no data and never blocks whoever woke it.
type hub struct {
	mu    sync.Mutex // guards chains
	chans map[ChainID]*topic
}

// topic is one chain's watchers, who share a channel that is closed when they must look again.
type topic struct {
	changed  chan struct{}
	watchers int
}

// watch gives a channel that is closed at the next change of the chain, or of any chain when
// the id is empty. cancel must be called.
func (h *hub) watch(id ChainID) (changed <-chan struct{}, cancel func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.chans == nil {
		h.chans = map[ChainID]*topic{}
	}
	t, ok := h.chans[id]
	if !ok {
		t = &topic{changed: make(chan struct{})}
		h.chans[id] = t
	}
	t.watchers++
	var once sync.Once
	return t.changed, func() {
		once.Do(func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if t.watchers--; t.watchers == 0 && h.chans[id] == t {
				delete(h.chans, id)
			}
		})
	}
}

// wake has the watchers of the chains look again; an empty id stands for a rule, which may be
// about any.
func (h *hub) wake(chains []ChainID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range chains {
		if id == "" {
			for id := range h.chans {
				h.fire(id)
			}
			return
		}
		h.fire(id)
		h.fire("")
	}
}

// fire closes the topic's channel; who watches on takes a new one.
func (h *hub) fire(id ChainID) {
	if t, ok := h.chans[id]; ok {
		close(t.changed)
		delete(h.chans, id)
	}
}

// Watch gives a channel that is closed when something about the chain has changed, so that the
// watcher looks again and then watches anew. cancel must be called.
func (b *Broker) Watch(id ChainID) (changed <-chan struct{}, cancel func()) { return b.hub.watch(id) }

// Standing tells the holder of a delegation how it stands: fenced or not, and which of the
// holder's own steps must stop.
//
// Errors: Unauthenticated, NotFound, Unavailable.
func (b *Broker) Standing(ctx context.Context, c Caller, id DelegationID) (s Standing, err error) {
	const op = "standing"
	if err := c.authentic(op, b.cfg.Now()); err != nil {
		return Standing{}, err
	}
	err = b.view(ctx, op, func(tx Tx) error {
		p, err := b.readPath(tx, op, id)
		if err != nil {
			return err
		}
		if p.leaf().Holder != c.ID {
			return unknownDelegation(op)
		}
		s = Standing{Delegation: p.leaf()}
		if s.Fence, err = b.fenceOver(tx, p, Subject{}); err != nil {
			return err
		}
		if err := tx.Scan(keyCut(id, ""), "", func(key string, _ []byte) bool {
			s.Ended = append(s.Ended, GrantID(key[len(key)-idLength:]))
			return true
		}); err != nil {
			return err
		}
		return eachLive(tx, p.chain.ID, func(g Grant) error {
			if g.Delegation != id {
				return nil
			}
			f, err := b.fenceOver(tx, p, p.subject(g))
			if f = harder(g.Fence, f); err == nil && f != nil && !f.Frozen {
				s.Ended = append(s.Ended, g.ID)
			}
			return err
		})
	})
	return s, err
}

// Active reports whether a grant's secret is good as far as the ledger knows: handed out, not
// ended, not fenced and not past its time. It is what introspection of a secret answers from; a
// freeze does not end what was handed out.
//
// Errors: Unavailable. A grant that does not exist is not active.
func (b *Broker) Active(ctx context.Context, id GrantID) (active bool, err error) {
	err = b.view(ctx, "introspect", func(tx Tx) error {
		active = false
		g, ok, err := load[Grant](tx, keyGrant(id))
		if err != nil || !ok || g.State != StateIssued {
			return err
		}
		ends, err := b.mustEnd(tx, &g, b.cfg.Now())
		active = err == nil && !ends
		return err
	})
	return active, err
}

// eachLive calls f with each grant of the chain, or of all chains when it is empty, that is
// not over.
func eachLive(tx Tx, chain ChainID, f func(Grant) error) error { return eachLiveAs(tx, chain, f) }

// eachLiveAs is eachLive that decodes only what T asks for.
func eachLiveAs[T any](tx Tx, chain ChainID, f func(T) error) error {
	prefix := "l/"
	if chain != "" {
		prefix += string(chain) + "/"
	}
	var ids []GrantID
	if err := tx.Scan(prefix, "", func(key string, _ []byte) bool {
		ids = append(ids, GrantID(key[len(key)-idLength:]))
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
func eachMember(tx Tx, chain ChainID, f func(DelegationID) error) error {
	prefix := "m/"
	if chain != "" {
		prefix += string(chain) + "/"
	}
	var ids []DelegationID
	if err := tx.Scan(prefix, "", func(key string, _ []byte) bool {
		ids = append(ids, DelegationID(key[len(key)-idLength:]))
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
