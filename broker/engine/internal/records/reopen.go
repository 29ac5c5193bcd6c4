package records

import (
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Reopen makes a closed grant live again, since its secret was found to work: it undoes Finish. The grant keeps its
// ending, so that it is ended again.
func (t *Tx) Reopen(g *broker.Grant, found broker.Evidence) error {
	l, err := t.Lineage("sweep", g.Delegation)
	if err != nil {
		return err
	}
	again := map[broker.DelegationID]int{}
	for _, d := range l.Nodes {
		again[d.ID]-- // one live grant more
	}
	if err := t.GiveBack(again); err != nil {
		return err
	}
	if g.NothingMade {
		if err := t.CountStep(*g, 1); err != nil {
			return err
		}
		g.NothingMade = false
	}
	g.State, g.Ended, g.Outcome, g.Evidence = broker.StateIssued, time.Time{}, found.Outcome, []broker.Evidence{found}
	if g.Lease.Expires.IsZero() {
		g.State = broker.StateHandle
	}
	if err := t.PutGrant(*g); err != nil {
		return err
	}
	if err := t.drop(keyPast(g.Chain, g.ID)); err != nil {
		return err
	}
	if _, err := t.DropLeftover(g.Chain, g.ID); err != nil { // its lease is a part of the proof again
		return err
	}
	return t.indexID(g.Chain)
}

// RevocationsOver returns the final revocations that cover some of the grants, with these.
func (t *Tx) RevocationsOver(grants []broker.Grant) (over map[broker.RevocationID][]broker.Grant, err error) {
	over = map[broker.RevocationID][]broker.Grant{}
	chains := map[broker.ChainID]bool{}
	for _, g := range grants {
		chains[g.Chain] = true
	}
	err = t.EachRevocation(func(rv broker.Revocation) error {
		if rv.Freeze || rv.Chain != "" && !chains[rv.Chain] {
			return nil
		}
		covers, err := Covering(rv)
		if err != nil {
			return err
		}
		return each(grants, nil, t.ifCovered(covers, func(g broker.Grant) { over[rv.ID] = append(over[rv.ID], g) }))
	})
	return over, err
}
