package engine

import (
	"context"
	"encoding/base64"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
	"github.com/pawlsec/pawl/broker/selector"
)

// Plant draws a value, keeps its digest and gives both. The value is no [Secret], since it opens nothing; but
// whoever knows that it is a canary can step around it, and it is given this once.
//
// Errors: Malformed, Unauthenticated, NotFound (no such chain), Unavailable.
func (e *Engine) Plant(ctx context.Context, o broker.Operator, r broker.PlantRequest) (c broker.Canary, value string, err error) {
	const op = "plant"
	if err := o.Check(op); err != nil {
		return broker.Canary{}, "", err
	}
	if err := checkText(op, "note", r.Note, 0, broker.MaxTask); err != nil {
		return broker.Canary{}, "", err
	}
	switch r.Like {
	case "", broker.GuiseVault:
		value, err = drawVaultToken(e.cfg.Random)
	case broker.GuiseGitHub:
		value, err = drawGitHubToken(e.cfg.Random)
	default:
		return broker.Canary{}, "", broker.Errorf(broker.Malformed, op, "a canary is like %s or %s", broker.GuiseVault, broker.GuiseGitHub)
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
		if _, err := tx.Enter(broker.Entry{At: c.Planted, Actor: o.Name, Op: broker.OpPlant, Chain: c.Chain, Detail: canaryDetail(c)}); err != nil {
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

// Canaries lists what is planted, the latest first.
//
// Errors: Unavailable.
func (e *Engine) Canaries(ctx context.Context) (list []broker.Canary, err error) {
	err = e.view(ctx, "canaries", func(tx *records.Tx) error {
		list = nil
		return tx.EachCanary(func(_ broker.ValueDigest, c broker.Canary) { list = append(list, c) })
	})
	slices.SortFunc(list, func(a, b broker.Canary) int { return strings.Compare(string(b.ID), string(a.ID)) }) // ids begin with the time
	return list, err
}

// Pull takes a canary away: from then on its value is like any that nobody knows.
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
		if _, err := tx.Enter(broker.Entry{At: e.cfg.Now(), Actor: o.Name, Op: broker.OpPull, Chain: c.Chain, Detail: canaryDetail(c)}); err != nil {
			return err
		}
		return tx.DropCanary(at)
	})
	if err != nil {
		return broker.Canary{}, err
	}
	return c, nil
}

// Present is told of a value that a workload presented as somebody's token and that is none. When it is a
// canary's, that is a violation of the chain in which it was planted. What follows does so in the background, also
// when the ledger has to be waited for: from no answer, and from none's time, can anybody tell that it was one.
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
		return // it is being recorded
	}
	e.background(func() {
		defer e.touching.End(digest)
		retry := backoff.Exponential{First: 50 * time.Millisecond, Most: 10 * time.Second}
		for {
			ctx, cancel := detached(e.ctx, 30*time.Second) // a broker that stops still records it
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

// maxTouches bounds what waits for the ledger: while it cannot be read, any value may be a canary's.
const maxTouches = 1024

// touch records that a canary was presented and carries out what policy says; the zero Canary: the value is not a
// canary's. Who presented it is not who broke anything: a service that asks about a token, or an operator. So it
// is the chain's opener whom freeze-caller freezes, and of a chain no single step is the breach.
func (e *Engine) touch(ctx context.Context, by string, digest broker.ValueDigest) (canary broker.Canary, rv broker.Revocation, err error) {
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
		d = e.cfg.Policy().Decide(violationQuestion(broker.Caller{ID: opener}, l, broker.ViolationCanary, broker.Tool{}, now))
	}
	pulled := false
	rv, err = e.applyConsequence(ctx, breach{op: op, code: broker.ViolationCanary, actor: by, lineage: l, decision: d, freeze: opener, now: now,
		detail: "canary " + string(canary.ID) + ", " + d.Consequence.String(),
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
	e.cfg.Alarm("canary", broker.Errorf(broker.Internal, op, "%s was presented by %s: %s", canaryPlace(canary), by, d.Consequence))
	return canary, rv, nil
}

func canaryPlace(c broker.Canary) string {
	if c.Chain == "" {
		return fmt.Sprintf("canary %s, of no chain,", c.ID)
	}
	return fmt.Sprintf("canary %s of chain %s", c.ID, c.Chain)
}

// touchedBy is touch for an operator who looks for the grant of a leaked value; known says that it is a canary's, so
// that there is none.
func (e *Engine) touchLeaked(ctx context.Context, o broker.Operator, s selector.Selector) (rv broker.Revocation, known bool, err error) {
	digest, ok := s.LeakedValue()
	if !ok {
		return broker.Revocation{}, false, nil
	}
	canary, rv, err := e.touch(ctx, o.Name, digest)
	if canary.ID == "" {
		return broker.Revocation{}, false, nil // an error shows again where the fence is set
	}
	if err == nil && rv.ID == "" {
		err = broker.Errorf(broker.NotFound, "revoke", "the value is that of %s; it is on record as touched, and nothing is revoked", canaryPlace(canary)).
			With(broker.CodeCanaryValue).Lacks("find out who had it, and revoke that; pawl canary list shows where it was planted", "selector")
	}
	return rv, true, err
}

// canaryOf refuses a plan for a leaked value that is a canary's, and says so.
func refuseCanaryPlan(tx *records.Tx, s selector.Selector) error {
	digest, ok := s.LeakedValue()
	if !ok {
		return nil
	}
	canary, planted, err := tx.Canary(digest)
	if err != nil || !planted {
		return err
	}
	return broker.Errorf(broker.NotFound, "plan", "the value is that of %s, and was handed out by no grant", canaryPlace(canary)).
		With(broker.CodeCanaryValue).Lacks("revoking it has it recorded as touched, and what policy says of a canary follows", "selector")
}

// drawVaultToken draws what looks like a Vault service token: "hvs." and 92 characters.
func drawVaultToken(random io.Reader) (string, error) {
	var raw [66]byte
	if _, err := io.ReadFull(random, raw[:]); err != nil {
		return "", fmt.Errorf("drawing a canary: %w", err)
	}
	return "hvs.CAES" + base64.RawURLEncoding.EncodeToString(raw[:]), nil
}

const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// drawGitHubToken draws what looks like a personal access token: "ghp_", 30 characters and six that are their
// CRC-32, by which scanners tell such a token from any text.
func drawGitHubToken(random io.Reader) (string, error) {
	drawn := make([]byte, 0, 30)
	var one [1]byte
	for len(drawn) < cap(drawn) {
		if _, err := io.ReadFull(random, one[:]); err != nil {
			return "", fmt.Errorf("drawing a canary: %w", err)
		}
		if n := int(one[0]); n < 4*len(base62) { // the rest would make some characters likelier
			drawn = append(drawn, base62[n%len(base62)])
		}
	}
	var check [6]byte
	sum := crc32.ChecksumIEEE(drawn)
	for i := len(check) - 1; i >= 0; i-- {
		check[i] = base62[sum%62]
		sum /= 62
	}
	return "ghp_" + string(drawn) + string(check[:]), nil
}
