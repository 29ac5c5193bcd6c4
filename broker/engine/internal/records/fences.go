package records

import (
	"fmt"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// noGrant is the subject of a delegation alone.
var noGrant selector.Subject

// Covers reports whether the rule covers the delegation, or the subject if that has a grant.
func (r Rule) Covers(l Lineage, subject selector.Subject) bool {
	return r.parsed.Covers(r.Fence, l.place(subject))
}

// Rules returns the rules in force.
func (t *Tx) Rules() (rules []Rule, err error) {
	if !t.rulesRead {
		if t.rules, err = t.cache.rules.read(t); err != nil {
			return nil, err
		}
		t.rulesRead = true
	}
	return t.rules, nil
}

// AddRule writes a rule, by its fence's revocation.
func (t *Tx) AddRule(r Rule) error {
	t.rulesRead = false
	return save(t, keyRule(r.Fence.Revocation), r)
}

// SpentRules returns the final rules of which every covered chain has expired.
func (t *Tx) SpentRules(now time.Time) (spent []broker.RevocationID, err error) {
	rules, err := t.Rules()
	for _, r := range rules {
		if !r.Fence.Frozen && now.Sub(r.Fence.At) > broker.MaxChainTTL {
			spent = append(spent, r.Fence.Revocation)
		}
	}
	return spent, err
}

// DropRule deletes a revocation's rule.
func (t *Tx) DropRule(id broker.RevocationID) error {
	t.rulesRead = false
	return t.drop(keyRule(id))
}

// RuleLike returns the mark of the rule in force with this selector and of this kind; nil: there is none.
func (t *Tx) RuleLike(s string, freeze bool) (*broker.Fence, error) {
	rules, err := t.Rules()
	for i := range rules {
		if rules[i].Selector == s && rules[i].Fence.Frozen == freeze {
			return &rules[i].Fence, err
		}
	}
	return nil, err
}

// FenceOver returns the fence that covers a delegation or the subject: one on a node, or a rule that covers a node or
// the subject. A final fence comes before a freeze; nil: there is none.
func (t *Tx) FenceOver(l Lineage, subject selector.Subject) (found *broker.Fence, err error) {
	rules, err := t.Rules()
	if err != nil {
		return nil, err
	}
	for i := range l.Nodes {
		found = stronger(found, l.Nodes[i].Fence)
	}
	for i := range rules {
		if rules[i].Covers(l, subject) {
			found = stronger(found, &rules[i].Fence)
		}
	}
	return found, nil
}

func stronger(a, b *broker.Fence) *broker.Fence {
	if a == nil || b != nil && a.Frozen && !b.Frozen {
		return b
	}
	return a
}

// FinalFences returns every final fence over a delegation: those on the lineage's nodes, and the rules that cover one.
func (t *Tx) FinalFences(l Lineage) (fences []broker.Fence, err error) {
	for _, d := range l.Nodes {
		if d.Fence != nil && !d.Fence.Frozen {
			fences = append(fences, *d.Fence)
		}
	}
	rules, err := t.Rules()
	for _, r := range rules {
		if !r.Fence.Frozen && r.Covers(l, noGrant) {
			fences = append(fences, r.Fence)
		}
	}
	return fences, err
}

// StillOpen reports whether no node is revoked or past its end. A freeze may be lifted, so it does not count.
func (t *Tx) StillOpen(l Lineage, now time.Time) (bool, error) {
	fences, err := t.FinalFences(l)
	return err == nil && len(fences) == 0 && !l.Expired(now), err
}

// CheckUsable refuses a lineage with a fence over it or with an expired node. The subject is the step to take under it.
// For a further delegation the subject's Grant is empty.
//
// Errors: Revoked, Expired.
func (t *Tx) CheckUsable(op string, l Lineage, subject selector.Subject, now time.Time) error {
	f, err := t.FenceOver(l, subject)
	if err != nil {
		return err
	}
	if f != nil {
		return Fenced(op, f)
	}
	if end, expired := l.expired(now); expired {
		return broker.Errorf(broker.Expired, op, "the delegation ended at %s", end.UTC().Format(time.RFC3339)).
			With(broker.CodeExpired)
	}
	return nil
}

// ruleCache keeps parsed rules. Every transaction reads the list of rules from the ledger.
type ruleCache struct {
	mu     sync.Mutex // guards parsed
	parsed map[string]Rule
}

// maxParsed bounds the parsed rules. At the bound all of them are dropped.
const maxParsed = 1024

func (c *ruleCache) read(t *Tx) (rules []Rule, err error) {
	scanErr := t.tx.Scan(prefixRule, "", func(key string, raw []byte) bool {
		var r Rule
		if r, err = c.parse(key, raw); err == nil {
			rules = append(rules, r)
		}
		return err == nil
	})
	if err == nil {
		err = scanErr
	}
	return rules, err
}

func (c *ruleCache) parse(key string, raw []byte) (r Rule, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.parsed[string(raw)]; ok {
		return r, nil
	}
	if err := decode(key, raw, &r); err != nil {
		return Rule{}, err
	}
	if r.parsed, err = selector.ParseRecorded(r.Selector); err != nil {
		return Rule{}, fmt.Errorf("rule %q: %w", key, err)
	}
	if len(c.parsed) > maxParsed || c.parsed == nil {
		c.parsed = map[string]Rule{}
	}
	c.parsed[string(raw)] = r
	return r, nil
}
