package records

import (
	"bytes"
	"cmp"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Grant reads a grant.
func (t *Tx) Grant(id broker.GrantID) (broker.Grant, bool, error) {
	return load[broker.Grant](t, keyGrant(id))
}

// PutGrant overwrites an existing grant.
func (t *Tx) PutGrant(g broker.Grant) error {
	e, err := EncodeGrant(g)
	if err != nil {
		return err
	}
	return t.PutEncoded(e)
}

// EncodedGrant is a grant in its encoded form. An issue encodes it before its transaction, since all other transactions
// wait for that one.
type EncodedGrant struct {
	Grant  broker.Grant
	raw    []byte
	listed []byte // in the list of live grants; nil: it is closed
}

// EncodeGrant encodes a grant.
func EncodeGrant(g broker.Grant) (e EncodedGrant, err error) {
	e.Grant = g
	if e.raw, err = encode(keyGrant(g.ID), g); err == nil && g.State != broker.StateClosed {
		e.listed, err = encode(keyLive(g.Chain, g.ID), scheduledOf(&g))
	}
	return e, err
}

// PutEncoded writes an encoded grant, and lists one that is not closed as live.
func (t *Tx) PutEncoded(e EncodedGrant) error {
	if err := t.tx.Put(keyGrant(e.Grant.ID), e.raw); err != nil || e.listed == nil {
		return err
	}
	return t.tx.Put(keyLive(e.Grant.Chain, e.Grant.ID), e.listed)
}

// AddEncoded writes a new grant.
func (t *Tx) AddEncoded(e EncodedGrant) error {
	if err := t.PutEncoded(e); err != nil {
		return err
	}
	return t.indexID(e.Grant.Chain)
}

// RereadGrant reads the grant of e again. It decodes the grant only when its bytes have changed.
func (t *Tx) RereadGrant(e EncodedGrant) (g broker.Grant, unchanged, ok bool, err error) {
	raw, err := t.tx.Get(keyGrant(e.Grant.ID))
	if err != nil || raw == nil {
		return broker.Grant{}, false, false, err
	}
	if bytes.Equal(raw, e.raw) {
		return e.Grant, true, true, nil
	}
	err = decode(keyGrant(e.Grant.ID), raw, &g)
	return g, false, err == nil, err
}

// Finish makes a grant CLOSED at the time of the entry, which it appends, and counts the grant in ended for each delegation
// of its lineage. For an INTENT nothing was made.
// The caller takes a grant for which nothing was made off the steps, with CountStep.
func (t *Tx) Finish(g *broker.Grant, entry broker.Entry, ended map[broker.DelegationID]int) error {
	l, err := t.Lineage("close", g.Delegation)
	if err != nil {
		return err
	}
	for _, d := range l.Nodes {
		ended[d.ID]++
	}
	g.NothingMade = g.NothingMade || g.State == broker.StateIntent
	g.State, g.Ended = broker.StateClosed, entry.At
	if err := t.PutGrant(*g); err != nil {
		return err
	}
	if err := t.drop(keyLive(g.Chain, g.ID)); err != nil {
		return err
	}
	if err := t.mark(keyPast(g.Chain, g.ID)); err != nil {
		return err
	}
	if g.Ending == broker.EndingRevoked {
		if err := t.MarkFenced(*g); err != nil {
			return err
		}
	}
	if g.Outcome == broker.OutcomeStatic { // its secret still works: a later revocation counts it too
		if err := t.mark(keyStatic(g.Chain, g.ID)); err != nil {
			return err
		}
	}
	_, err = t.Enter(entry)
	return err
}

// GrantEntry returns the audit entry of a grant that is ending.
func GrantEntry(g *broker.Grant, op broker.Op, now time.Time) broker.Entry {
	return broker.Entry{At: now, Actor: "pawl", Op: op, Chain: g.Chain, Delegation: g.Delegation, Grant: g.ID,
		Tool: g.Tool, Detail: string(g.Ending) + ", " + g.Outcome.String()}
}

// MarkFenced lists a grant as fenced, so that its holder's agent finds it without a scan of the live grants.
func (t *Tx) MarkFenced(g broker.Grant) error { return t.mark(keyFenced(g.Delegation, g.ID)) }

// eachMarkedFenced calls f with each grant of the delegation that is listed so.
func (t *Tx) eachMarkedFenced(d broker.DelegationID, f func(broker.GrantID) error) error {
	list, err := ids[broker.GrantID](t, keyFenced(d, ""), "")
	return each(list, err, f)
}

// EachLive calls f with each grant of the chains that is not closed. An empty chain stands for all chains.
func (t *Tx) EachLive(chains []broker.ChainID, f func(broker.Grant) error) error {
	return eachGrant(t, prefixLive, chains, f)
}

// EachStatic calls f with each closed grant of the chains with a static secret that still works. An empty chain stands
// for all chains.
func (t *Tx) EachStatic(chains []broker.ChainID, f func(broker.Grant) error) error {
	return eachGrant(t, prefixStatic, chains, f)
}

// EachPast calls f with each closed grant of the chains.
func (t *Tx) EachPast(chains []broker.ChainID, f func(broker.Grant) error) error {
	return eachGrant(t, prefixPast, chains, f)
}

// ToolOf returns the part of a grant's tool that the grant records.
func ToolOf(g broker.Grant) broker.Tool {
	return broker.Tool{Name: g.Tool, Backend: g.Backend, Path: g.Path}
}

// FormerTools returns the tools of live grants that a policy does not declare with the same path.
func (t *Tx) FormerTools(policy broker.Policy) (tools []broker.Tool, err error) {
	type origin struct {
		backend string
		path    broker.VaultPath
	}
	seen := map[origin]bool{}
	tools = []broker.Tool{} // never nil
	err = t.EachLive(Everywhere, func(g broker.Grant) error {
		key := origin{g.Backend, g.Path}
		if g.Path.IsZero() || seen[key] {
			return nil
		}
		seen[key] = true
		if tool, known := policy.Tool(g.Tool); !known || tool.Backend != g.Backend || tool.Path != g.Path {
			tools = append(tools, ToolOf(g))
		}
		return nil
	})
	return tools, err
}

// EachLiveID calls f with the id of each grant of the chains that is not closed. An empty chain stands for all chains.
func (t *Tx) EachLiveID(chains []broker.ChainID, f func(broker.GrantID) error) error {
	return eachGrantID(t, prefixLive, chains, f)
}

func eachGrantID(t *Tx, prefix string, chains []broker.ChainID, f func(broker.GrantID) error) error {
	return each(chains, nil, func(chain broker.ChainID) error {
		list, err := ids[broker.GrantID](t, inChain(prefix, chain), "")
		return each(list, err, f)
	})
}

func eachGrant[T any](t *Tx, prefix string, chains []broker.ChainID, f func(T) error) error {
	return eachGrantID(t, prefix, chains, func(id broker.GrantID) error {
		g, ok, err := load[T](t, keyGrant(id))
		if err != nil || !ok {
			return err
		}
		return f(g)
	})
}

// MostAhead is by how much a grant's id may be older than the grant: the id is drawn with a token that is made ahead.
const MostAhead = 15 * time.Second

// RecentGrants returns the grants of a backend that were created after a time, closed ones included. The time is exact
// to some milliseconds.
func (t *Tx) RecentGrants(backend string, after time.Time) (list []broker.Grant, err error) {
	first := keyGrant(broker.GrantID("gr" + broker.IDTime(after.Add(-MostAhead))))
	after = after.Add(-8 * time.Millisecond) // as exact as the times of ids
	scanErr := t.tx.Scan(prefixGrant, first, func(key string, raw []byte) bool {
		var g broker.Grant
		if err = decode(key, raw, &g); err == nil && g.Backend == backend && g.Created.After(after) {
			list = append(list, g)
		}
		return err == nil
	})
	return list, cmp.Or(err, scanErr)
}

// GrantOfKey reads the grant of an idempotency key.
func (t *Tx) GrantOfKey(d broker.DelegationID, digest [32]byte) (id broker.GrantID, ok bool, err error) {
	raw, err := t.tx.Get(keyIdempotency(d, digest))
	return broker.GrantID(raw), raw != nil, err
}

// PutKey records the grant of an idempotency key.
func (t *Tx) PutKey(d broker.DelegationID, digest [32]byte, id broker.GrantID) error {
	return t.tx.Put(keyIdempotency(d, digest), []byte(id))
}

// LiveOrStatic reports whether a grant is not closed, or is closed while its static secret still works.
func (t *Tx) LiveOrStatic(c broker.ChainID, id broker.GrantID) (live, static bool, err error) {
	if live, err = t.has(keyLive(c, id)); err != nil || live {
		return live, false, err
	}
	static, err = t.has(keyStatic(c, id))
	return false, static, err
}

// OwnGrant reads the caller's grant into g. A grant of another caller gets the same refusal as one that does not exist.
func (t *Tx) OwnGrant(op string, c broker.Caller, id broker.GrantID, g *broker.Grant) error {
	found, ok, err := t.Grant(id)
	if err != nil {
		return err
	}
	if !ok || found.Caller != c.ID {
		return UnknownGrant(op)
	}
	*g = found
	return nil
}
