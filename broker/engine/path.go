package engine

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// path is a delegation and its ancestors, root first, with their chain.
type path struct {
	chain broker.Chain
	nodes []broker.Delegation
}

func (p path) leaf() broker.Delegation { return p.nodes[len(p.nodes)-1] }
func (p path) root() broker.Delegation { return p.nodes[0] }

// readPath walks from a delegation to its root. A delegation that is not there is NotFound in
// the words that one of somebody else's is, too.
func (b *Engine) readPath(tx broker.Tx, op string, id broker.DelegationID) (path, error) {
	var p path
	for next := id; next != ""; {
		d, ok, err := b.nodes.load(tx, keyDelegation(next))
		if err != nil {
			return path{}, err
		}
		if !ok {
			return path{}, unknownDelegation(op)
		}
		if len(p.nodes) > broker.MaxDepth {
			return path{}, fmt.Errorf("delegation %s is deeper than %d", id, broker.MaxDepth)
		}
		p.nodes = append([]broker.Delegation{d}, p.nodes...)
		next = d.Parent
	}
	c, ok, err := b.chains.load(tx, keyChain(p.leaf().Chain))
	if err == nil && !ok {
		err = fmt.Errorf("delegation %s is of no chain", id)
	}
	p.chain = c
	return p, err
}

// recordCache keeps decoded records beside the bytes they were decoded from. The ledger is
// read every time; only decoding again what has not changed is spared. What it gives is shared
// and must not be changed in place.
type recordCache[T any] struct {
	mu   sync.RWMutex // guards kept
	kept map[string]keptRecord[T]
}

type keptRecord[T any] struct {
	raw []byte
	rec T
}

const maxKept = 1 << 16

func (c *recordCache[T]) load(tx broker.Tx, key string) (rec T, ok bool, err error) {
	raw, err := tx.Get(key)
	if err != nil || raw == nil {
		return rec, false, err
	}
	c.mu.RLock()
	k, known := c.kept[key]
	c.mu.RUnlock()
	if known && bytes.Equal(k.raw, raw) {
		return k.rec, true, nil
	}
	if err := json.Unmarshal(raw, &rec); err != nil {
		return rec, false, fmt.Errorf("reading record %q: %w", key, err)
	}
	c.keep(key, keptRecord[T]{bytes.Clone(raw), rec})
	return rec, true, nil
}

// save writes the record and keeps it. When the transaction comes to nothing, what the ledger has
// is not what was kept, and the next load decodes.
func (c *recordCache[T]) save(tx broker.Tx, key string, rec T) error {
	raw, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encoding record %q: %w", key, err)
	}
	c.keep(key, keptRecord[T]{raw, rec})
	return tx.Put(key, raw)
}

func (c *recordCache[T]) keep(key string, k keptRecord[T]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kept == nil || len(c.kept) >= maxKept {
		c.kept = map[string]keptRecord[T]{}
	}
	c.kept[key] = k
}

func unknownDelegation(op string) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "no such delegation, or it is not yours").With(broker.CodeDelegationUnknown)
}

// usable refuses a path on which anything is fenced or past its time. subject is what is to
// happen under it; its Grant is empty for a further delegation.
func (b *Engine) usable(tx broker.Tx, op string, p path, subject selector.Subject, now time.Time) error {
	f, err := b.fenceOver(tx, p, subject)
	if err != nil {
		return err
	}
	if f != nil {
		return fencedError(op, f)
	}
	for _, d := range p.nodes {
		if !now.Before(d.Expires) {
			return broker.Errorf(broker.Expired, op, "the delegation ended at %s", d.Expires.UTC().Format(time.RFC3339)).With(broker.CodeExpired)
		}
	}
	return nil
}

func fencedError(op string, f *broker.Fence) *broker.Error {
	e := broker.Errorf(broker.Revoked, op, "revoked at %s; nothing more is handed out", f.At.UTC().Format(time.RFC3339)).With(broker.CodeFenced)
	if f.Frozen {
		e = broker.Errorf(broker.Revoked, op, "frozen at %s; nothing is handed out until it is lifted", f.At.UTC().Format(time.RFC3339)).
			With(broker.CodeFrozen).Lacks("an operator can lift the freeze")
	}
	e.Revocation = f.Revocation
	return e
}

// fenceOver gives the fence that covers the path or subject: on a node, or a rule that matches
// a node or the subject. A final fence is given before a freeze.
func (b *Engine) fenceOver(tx broker.Tx, p path, subject selector.Subject) (*broker.Fence, error) {
	return b.sight(tx).fenceOver(p, subject)
}

// sight keeps what one transaction has read of paths and rules, for whoever looks at many grants in it: a
// thousand of one delegation have one path. The transaction must not change delegations or rules.
type sight struct {
	b     *Engine
	tx    broker.Tx
	paths map[broker.DelegationID]path
	rules []queryFence
	ruled bool // rules were read
}

func (b *Engine) sight(tx broker.Tx) *sight { return &sight{b: b, tx: tx} }

// path is [Broker.readPath].
func (s *sight) path(op string, id broker.DelegationID) (path, error) {
	if p, ok := s.paths[id]; ok {
		return p, nil
	}
	p, err := s.b.readPath(s.tx, op, id)
	if err != nil {
		return path{}, err
	}
	if s.paths == nil {
		s.paths = map[broker.DelegationID]path{}
	}
	s.paths[id] = p
	return p, nil
}

// fenceOver is [Broker.fenceOver].
func (s *sight) fenceOver(p path, subject selector.Subject) (found *broker.Fence, err error) {
	if !s.ruled {
		if s.rules, err = s.b.rules.read(s.tx); err != nil {
			return nil, err
		}
		s.ruled = true
	}
	for i := range p.nodes {
		found = harder(found, p.nodes[i].Fence)
	}
	for _, r := range s.rules {
		if r.covers(p, subject) {
			found = harder(found, &r.Fence)
		}
	}
	return found, nil
}

func harder(a, b *broker.Fence) *broker.Fence {
	if a == nil || b != nil && a.Frozen && !b.Frozen {
		return b
	}
	return a
}

// queryFence is a rule: a fence over whatever its selector matches. A final rule is about the chains that
// were open when it was written; a freeze is about later ones as well, until it is lifted.
type queryFence struct {
	Fence    broker.Fence `json:"fence"`
	Selector string       `json:"selector"`
	selector selector.Selector
}

func (r queryFence) covers(p path, subject selector.Subject) bool {
	if !r.Fence.Frozen && p.chain.Opened.After(r.Fence.At) {
		return false
	}
	for i, d := range p.nodes {
		if r.selector.Matches(selector.Subject{Chain: p.chain, Path: p.nodes[:i+1], At: d.Created}) {
			return true
		}
	}
	return subject.Grant != "" && r.selector.Matches(subject)
}

// ruleCache keeps parsed rules; which rules there are is read in every transaction.
type ruleCache struct {
	mu     sync.Mutex // guards parsed
	parsed map[string]queryFence
}

func (c *ruleCache) read(tx broker.Tx) (rules []queryFence, err error) {
	scanErr := tx.Scan("f/", "", func(key string, raw []byte) bool {
		var r queryFence
		if r, err = c.parse(tx, key, raw); err == nil {
			rules = append(rules, r)
		}
		return err == nil
	})
	if err == nil {
		err = scanErr
	}
	return rules, err
}

func (c *ruleCache) parse(tx broker.Tx, key string, raw []byte) (queryFence, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.parsed[string(raw)]; ok {
		return r, nil
	}
	r, _, err := load[queryFence](tx, key)
	if err != nil {
		return queryFence{}, err
	}
	if r.selector, err = selector.Parse(r.Selector); err != nil {
		return queryFence{}, fmt.Errorf("rule %q: %w", key, err)
	}
	if len(c.parsed) > 1024 || c.parsed == nil {
		c.parsed = map[string]queryFence{}
	}
	c.parsed[string(raw)] = r
	return r, nil
}

// subject is a grant under p as selectors see it.
func (p path) subject(g broker.Grant) selector.Subject {
	return selector.Subject{Chain: p.chain, Path: p.nodes, Grant: g.ID, Tool: g.Tool, Args: g.Args,
		Vault: g.Path, Bundle: g.Bundle, Leaked: g.Lease.Digests, At: g.Created}
}
