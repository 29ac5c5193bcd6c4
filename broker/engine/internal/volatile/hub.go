// Package volatile has the state that the engine keeps in memory only: watchers, heartbeats, sealed secrets and small
// caches. Each type states the consequence of a restart.
package volatile

import (
	"sync"

	"github.com/pawlsec/pawl/broker"
)

// Hub wakes watchers, so that they read again. It carries no data and never blocks. A restart ends all watches.
type Hub struct {
	mu     sync.Mutex // guards topics
	topics map[Topic]*watchers
}

// Topic is the subject of a watch: every change of a chain, or only its fences.
type Topic struct {
	Chain  broker.ChainID // empty: all chains
	Fences bool           // only fences that are set or lifted
}

// TopicTx collects the topics of a transaction's entries.
type TopicTx struct {
	broker.Tx
	Topics []Topic
}

// Append appends the entry to the transaction.
func (t *TopicTx) Append(entry broker.Entry) (broker.Revision, error) {
	fences := entry.Op == broker.OpFence || entry.Op == broker.OpFreeze || entry.Op == broker.OpUnfreeze
	t.Topics = append(t.Topics, Topic{Chain: entry.Chain, Fences: fences})
	return t.Tx.Append(entry)
}

// watchers of one topic share a channel, which is closed when they must read again.
type watchers struct {
	changed chan struct{}
	count   int
}

// Watch returns a channel that is closed at the next change. The caller must call cancel.
func (h *Hub) Watch(name Topic) (changed <-chan struct{}, cancel func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.topics == nil {
		h.topics = map[Topic]*watchers{}
	}
	t, ok := h.topics[name]
	if !ok {
		t = &watchers{changed: make(chan struct{})}
		h.topics[name] = t
	}
	t.count++
	var once sync.Once
	return t.changed, func() {
		once.Do(func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if t.count--; t.count == 0 && h.topics[name] == t {
				delete(h.topics, name)
			}
		})
	}
}

// Wake wakes the watchers of topics. A topic without a chain is that of a rule, which may cover any chain.
func (h *Hub) Wake(names []Topic) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range names {
		if n.Chain == "" {
			for name := range h.topics {
				if n.Fences || !name.Fences {
					h.notify(name)
				}
			}
			continue
		}
		h.notify(Topic{Chain: n.Chain})
		h.notify(Topic{})
		if n.Fences {
			h.notify(n)
		}
	}
}

// notify closes the topic's channel. The next Watch makes a new one.
func (h *Hub) notify(name Topic) {
	if t, ok := h.topics[name]; ok {
		close(t.changed)
		delete(h.topics, name)
	}
}
