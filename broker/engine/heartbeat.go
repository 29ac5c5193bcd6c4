package engine

import (
	"context"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

func checkHeartbeat(op string, d time.Duration) error {
	if d != 0 && (d < broker.MinHeartbeat || d > broker.MaxChainTTL) {
		return broker.Errorf(broker.Malformed, op, "the heartbeat must be %s to %s, or none", broker.MinHeartbeat, broker.MaxChainTTL)
	}
	return nil
}

// missedHeartbeat records the violation and applies its consequence. recorded is false when the ledger failed, and it must be
// tried again.
func (e *Engine) missedHeartbeat(ctx context.Context, id broker.DelegationID) (recorded bool) {
	err := e.applyMissedHeartbeat(ctx, id)
	if err != nil && e.ctx.Err() == nil {
		e.cfg.Alarm("recording a lost heartbeat", err)
	}
	return err == nil
}

// lostHeartbeat is the breach of a missed heartbeat. Of an expired or revoked delegation none is expected. No step is the breach, so
// revoke-step ends everything under the delegation, as for a report that names no grant.
func (e *Engine) applyMissedHeartbeat(ctx context.Context, id broker.DelegationID) error {
	const op = "heartbeat"
	now := e.cfg.Now()
	var l records.Lineage
	var open bool
	err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		if l, err = tx.Lineage(op, id); err == nil {
			open, err = tx.StillOpen(l, now)
		}
		return err
	})
	if err != nil || !open {
		return err
	}
	holder := l.Leaf().Holder
	d := e.cfg.Policy().Decide(violationQuestion(broker.Caller{ID: holder}, l, broker.ViolationHeartbeat, broker.Tool{}, now))
	_, err = e.applyConsequence(ctx, breach{op: op, code: broker.ViolationHeartbeat, actor: holder.String(), lineage: l, decision: d, freeze: holder, now: now})
	return err
}

// watched gives the delegations that the watchdog watches from a start on: roots, and delegations that were passed on and
// used. Expired and revoked ones leave the list.
func withHeartbeat(tx *records.Tx, now time.Time) (list []broker.Delegation, err error) {
	err = tx.EachHeartbeat(func(id broker.DelegationID) error {
		l, err := tx.Lineage("resume", id)
		if err != nil {
			return err
		}
		open, err := tx.StillOpen(l, now)
		if err != nil {
			return err
		}
		if !open {
			return tx.DropHeartbeat(id)
		}
		if d := l.Leaf(); d.Parent == "" || len(d.Tokens) > 0 {
			list = append(list, d)
		}
		return nil
	})
	return list, err
}
