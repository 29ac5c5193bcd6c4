package engine

import (
	"context"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// missedHeartbeat records the violation of a missed heartbeat and applies its consequence. recorded is false when the
// ledger failed and the watchdog must retry.
func (e *Engine) missedHeartbeat(ctx context.Context, id broker.DelegationID) (recorded bool) {
	err := e.applyMissedHeartbeat(ctx, id)
	if err != nil && e.ctx.Err() == nil {
		e.cfg.Alarm("recording a missed heartbeat", err)
	}
	return err == nil
}

// applyMissedHeartbeat does the work of missedHeartbeat. An expired or revoked delegation owes no heartbeat. No single
// step is at fault, so revoke-step fences the delegation, as for a report that names no grant.
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
	q := violationQuestion(broker.Caller{ID: holder}, l, broker.ViolationHeartbeat, broker.Tool{}, now)
	_, err = e.applyConsequence(ctx, breach{op: op, code: broker.ViolationHeartbeat, actor: holder.String(), lineage: l,
		decision: e.cfg.Policy().Decide(q), freeze: holder, now: now})
	return err
}

// withHeartbeat lists the delegations that the watchdog watches from the start: those with a heartbeat that are roots,
// or under which a step was taken. It takes expired and revoked delegations off the ledger's list.
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
