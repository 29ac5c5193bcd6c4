package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/draw"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/engine/internal/requests"
	"github.com/pawlsec/pawl/broker/selector"
)

// Plant draws a canary value, records its digest, and returns the canary with the value. The value is no
// [broker.Secret]: it opens nothing. But a thief who knows the canary avoids it, so the broker returns the value only
// here.
//
// Errors: Malformed, Unauthenticated, NotFound (no such chain), Unavailable.
func (e *Engine) Plant(ctx context.Context, o broker.Operator, r broker.PlantRequest,
) (c broker.Canary, value string, err error) {
	const op = "plant"
	if err := o.Check(op); err != nil {
		return broker.Canary{}, "", err
	}
	if err := requests.CheckText(op, "note", r.Note, 0, broker.MaxTask); err != nil {
		return broker.Canary{}, "", err
	}
	switch r.Like {
	case "", broker.CanaryVaultToken:
		value, err = draw.VaultToken(e.cfg.Random)
	case broker.CanaryGitHubToken:
		value, err = draw.GitHubToken(e.cfg.Random)
	default:
		return broker.Canary{}, "", broker.Errorf(broker.Malformed, op, "a canary is like %s or %s",
			broker.CanaryVaultToken, broker.CanaryGitHubToken)
	}
	if err != nil {
		return broker.Canary{}, "", err
	}
	id, err := e.newID("cn")
	if err != nil {
		return broker.Canary{}, "", err
	}
	c = broker.Canary{ID: broker.CanaryID(id), Chain: r.Chain, Note: r.Note, By: o.Name, Planted: e.cfg.Now()}
	err = e.update(ctx, op, func(tx *records.Tx) error {
		if r.Chain != "" {
			if _, known, err := tx.Chain(r.Chain); err != nil || !known {
				return orNotFound(err, records.UnknownChain(op, r.Chain))
			}
		}
		if _, err := tx.Enter(broker.Entry{At: c.Planted, Actor: o.Name, Op: broker.OpPlant, Chain: c.Chain,
			Detail: canaryDetail(c)}); err != nil {
			return err
		}
		return tx.PutCanary(broker.DigestValue(value), c)
	})
	if err != nil {
		return broker.Canary{}, "", err
	}
	return c, value, nil
}

func canaryDetail(c broker.Canary) string {
	if c.Note == "" {
		return "canary " + string(c.ID)
	}
	return "canary " + string(c.ID) + ", " + c.Note
}

// Canaries lists the planted canaries, the newest first, in pages as [Engine.Chains].
//
// Errors: Unavailable.
func (e *Engine) Canaries(ctx context.Context, p broker.Page) (list []broker.Canary, next string, err error) {
	err = e.view(ctx, "canaries", func(tx *records.Tx) (err error) {
		list, next, err = tx.Canaries(p)
		return err
	})
	return list, next, err
}

// Pull removes a canary. From then on its value is an unknown value like any other.
//
// Errors: Unauthenticated, NotFound with CodeCanaryUnknown, Unavailable.
func (e *Engine) Pull(ctx context.Context, o broker.Operator, id broker.CanaryID) (c broker.Canary, err error) {
	const op = "pull"
	if err := o.Check(op); err != nil {
		return broker.Canary{}, err
	}
	err = e.update(ctx, op, func(tx *records.Tx) error {
		var at broker.ValueDigest
		c = broker.Canary{}
		if err := tx.EachCanary(func(value broker.ValueDigest, found broker.Canary) {
			if found.ID == id {
				at, c = value, found
			}
		}); err != nil {
			return err
		}
		if at == "" {
			return broker.Errorf(broker.NotFound, op, "there is no such canary").With(broker.CodeCanaryUnknown)
		}
		if _, err := tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: o.Name, Op: broker.OpPull, Chain: c.Chain,
			Detail: canaryDetail(c)}); err != nil {
			return err
		}
		return tx.DropCanary(at)
	})
	if err != nil {
		return broker.Canary{}, err
	}
	return c, nil
}

// Present takes a value that a workload presented as a token and that is none of the broker's. A canary's value is a
// violation in the chain in which the canary was planted. Recording it and its consequence run in the background, and
// are retried while the ledger is down. So neither an answer nor its timing reveals a canary.
func (e *Engine) Present(ctx context.Context, c broker.Caller, value string) {
	digest := broker.DigestValue(value)
	planted := false
	err := e.view(ctx, "present", func(tx *records.Tx) (err error) {
		_, planted, err = tx.Canary(digest)
		return err
	})
	if err == nil && !planted {
		return
	}
	if !e.touching.Begin(digest) {
		return // it is being recorded, or too many are
	}
	e.background(func() {
		defer e.touching.End(digest)
		retry := backoff.Exponential{First: 50 * time.Millisecond, Most: 10 * time.Second}
		for {
			ctx, cancel := detached(e.ctx, 30*time.Second) // an engine that stops still records it
			_, _, err := e.touch(ctx, c.ID.String(), digest)
			cancel()
			if err == nil {
				return
			}
			e.cfg.Alarm("recording that a canary was touched", err)
			if retry.Wait(e.ctx) != nil {
				return
			}
		}
	})
}

// maxTouches bounds the values that wait for the ledger. While the ledger cannot be read, any value may be a canary's.
const maxTouches = 1024

// touch records that a canary was presented, and applies the consequence that policy attaches to it. It returns the
// zero Canary for any other value. The presenter is a service that inspects a token, or an operator, and is not the
// violator. So freeze-caller freezes the chain's opener, and the breach is that of the chain, not of one step.
func (e *Engine) touch(ctx context.Context, by string, digest broker.ValueDigest,
) (canary broker.Canary, rv broker.Revocation, err error) {
	const op = "present"
	now := e.cfg.Now()
	var l records.Lineage
	if err := e.view(ctx, op, func(tx *records.Tx) (err error) {
		l = records.Lineage{}
		if canary, _, err = tx.Canary(digest); err != nil || canary.Chain == "" {
			return err
		}
		chain, _, err := tx.Chain(canary.Chain)
		if err == nil {
			l, err = tx.Lineage(op, chain.Root)
		}
		return err
	}); err != nil || canary.ID == "" {
		return broker.Canary{}, broker.Revocation{}, err
	}
	var d broker.Decision
	var opener spiffeid.ID
	if canary.Chain != "" {
		opener = l.Root().Holder
		q := violationQuestion(broker.Caller{ID: opener}, l, broker.ViolationCanary, broker.Tool{}, now)
		d = e.cfg.Policy().Decide(q)
	}
	pulled := false
	rv, err = e.applyConsequence(ctx, breach{op: op, code: broker.ViolationCanary, actor: by, lineage: l, decision: d,
		freeze: opener, now: now, detail: "canary " + string(canary.ID) + ", " + d.Consequence.String(),
		record: func(tx *records.Tx) (stop bool, err error) {
			var planted bool
			canary, planted, err = tx.Canary(digest)
			if pulled = err == nil && !planted; err != nil || pulled {
				return true, err
			}
			canary.Touched, canary.Touches = now, canary.Touches+1
			return false, tx.PutCanary(digest, canary)
		}})
	if err != nil {
		return canary, broker.Revocation{}, err
	}
	if pulled {
		return broker.Canary{}, broker.Revocation{}, nil
	}
	e.cfg.Alarm("canary", broker.Errorf(broker.Internal, op, "%s was presented by %s: %s",
		canaryPlace(canary), by, d.Consequence))
	return canary, rv, nil
}

func canaryPlace(c broker.Canary) string {
	if c.Chain == "" {
		return fmt.Sprintf("canary %s, of no chain,", c.ID)
	}
	return fmt.Sprintf("canary %s of chain %s", c.ID, c.Chain)
}

// touchLeaked is touch for an operator who revokes the grant of a leaked value. isCanary: the value is a canary's, and
// no grant has it.
func (e *Engine) touchLeaked(ctx context.Context, o broker.Operator, s selector.Selector,
) (rv broker.Revocation, isCanary bool, err error) {
	digest, ok := s.LeakedValue()
	if !ok {
		return broker.Revocation{}, false, nil
	}
	canary, rv, err := e.touch(ctx, o.Name, digest)
	if canary.ID == "" {
		return broker.Revocation{}, false, nil // Revoke reports the same ledger error again when it fences
	}
	if err == nil && rv.ID == "" {
		err = broker.Errorf(broker.NotFound, "revoke",
			"the value is that of %s; it is on record as touched, and nothing is revoked", canaryPlace(canary)).
			With(broker.CodeCanaryValue).
			Lacks("pawl canary list shows where it was planted; find the workload that had it, and revoke that", "selector")
	}
	return rv, true, err
}

// refuseCanaryPlan refuses a plan for a leaked value that is a canary's.
func refuseCanaryPlan(tx *records.Tx, s selector.Selector) error {
	digest, ok := s.LeakedValue()
	if !ok {
		return nil
	}
	canary, planted, err := tx.Canary(digest)
	if err != nil || !planted {
		return err
	}
	return broker.Errorf(broker.NotFound, "plan", "the value is that of %s; no grant handed it out", canaryPlace(canary)).
		With(broker.CodeCanaryValue).
		Lacks("a revocation records it as touched, and applies the consequence that policy attaches to a canary", "selector")
}
