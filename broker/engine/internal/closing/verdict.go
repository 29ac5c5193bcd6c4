package closing

import (
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// verdict decides the outcome of one grant. Dead needs all of these answers: Vault has revoked the step's token, if it
// had one, and no longer knows the lease, and no mint can be in flight. If the target can be probed, it must refuse the
// secret too. Where the target alone shows it dead for good, Vault is not asked about the lease, and may remove it
// later.
type verdict struct {
	g       broker.Grant
	killed  killAnswer      // to the revocation of the step's token
	gone    goneAnswer      // about the lease
	found   broker.Evidence // of the target; zero when it cannot be probed
	probed  bool            // the target can be probed
	minting bool            // an issue of this process works on the grant
	givenUp bool            // Vault has given up revoking the lease
	now     time.Time
}

// killAnswer is Vault's answer to the revocation of a step's token.
type killAnswer struct {
	at  time.Time // of the confirmation
	err error
}

// goneAnswer is Vault's answer about a lease.
type goneAnswer struct{ asked, answered, gone bool }

// answerGivenUp is the evidence for a lease that Vault lists as irrevocable. Ledgers hold the text: it must not change.
const answerGivenUp = "still there, and Vault has given up revoking it: it is tried again, and needs a person"

// answerLeftover is the evidence about a lease that Vault removes after its grant was closed. Ledgers hold the text: it
// must not change.
const answerLeftover = "Vault removes the lease by itself; the target decides"

// isLeftover reports whether a grant was closed while Vault had still to remove its lease.
func isLeftover(g *broker.Grant) bool {
	return g.State == broker.StateClosed &&
		slices.ContainsFunc(g.Evidence, func(e broker.Evidence) bool { return e.Answer == answerLeftover })
}

func givenUp(evidence []broker.Evidence) bool {
	return slices.ContainsFunc(evidence, func(e broker.Evidence) bool { return e.Answer == answerGivenUp })
}

func (v verdict) outcome() (broker.Outcome, []broker.Evidence) {
	if v.g.State == broker.StateIntent {
		if v.minting {
			return broker.OutcomeUnknown, nil
		}
		return broker.OutcomeDead, []broker.Evidence{{At: v.now, Check: "ledger", Outcome: broker.OutcomeDead,
			Answer: "no token was recorded for it, so nothing was minted"}}
	}
	var evidence []broker.Evidence
	if v.g.DelegationToken.Accessor == "" { // otherwise no token ends with the grant
		evidence = append(evidence, v.token())
	}
	evidence = append(evidence, v.lease())
	// A secret that only a rotation ends was not read for this grant when nothing was made.
	if v.probed && (!v.g.NothingMade || v.found.Outcome != broker.OutcomeStatic) {
		evidence = append(evidence, v.found)
	}
	outcome := broker.OutcomeDead
	for _, e := range evidence {
		switch {
		case e.Outcome == broker.OutcomeStatic:
			return broker.OutcomeStatic, evidence
		case e.Outcome == broker.OutcomeAlive:
			outcome = broker.OutcomeAlive
		case e.Outcome == broker.OutcomeUnknown && outcome == broker.OutcomeDead:
			outcome = broker.OutcomeUnknown
		}
	}
	return outcome, evidence
}

func (v verdict) token() broker.Evidence {
	e := broker.Evidence{At: v.killed.at, Check: "vault: revoke the step's token", Outcome: broker.OutcomeDead,
		Answer: "revoked, or gone before"}
	if v.killed.err != nil {
		e.At, e.Outcome, e.Answer = v.now, broker.OutcomeUnknown, "Vault did not confirm"
	}
	return e
}

func (v verdict) lease() broker.Evidence {
	text := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	e := broker.Evidence{At: v.now, Check: "vault: look the lease up", Outcome: broker.OutcomeDead, Answer: "gone"}
	switch {
	case v.gone.asked && !v.gone.answered:
		e.Outcome, e.Answer = broker.OutcomeUnknown, "Vault did not answer"
	case v.gone.asked && !v.gone.gone:
		// Vault still lists the lease. The target decides whether the secret works, but the grant is not closed.
		if e.Outcome, e.Answer = broker.OutcomeUnknown, "still there"; v.givenUp {
			e.Answer = answerGivenUp
		}
	case v.gone.asked:
	case v.g.Lease.ID != "":
		e.Check, e.Answer = "ledger", answerLeftover
	case v.g.NothingMade:
		e.Check, e.Answer = "vault: answer to the mint", "refused, so nothing was made"
	case v.g.State == broker.StateHandle && (v.minting || v.now.Before(v.g.MintDeadline)):
		e.Check, e.Outcome = "ledger", broker.OutcomeUnknown
		e.Answer = "a mint may still be on its way until " + text(v.g.MintDeadline)
	case v.g.State == broker.StateHandle && v.probed:
		e.Check, e.Answer = "ledger", "no mint can be on its way any more"
	case v.g.State == broker.StateHandle && v.now.Before(v.g.LatestEnd()): // a secret may have been handed over
		e.Check, e.Outcome = "ledger", broker.OutcomeUnknown
		e.Answer = "what it made is not recorded, and ends by itself at " + text(v.g.LatestEnd())
	case v.probed:
		e.Check, e.Answer = "ledger", "this engine gives no lease; the target decides"
	case v.now.Before(v.g.LatestEnd()):
		e.Check, e.Outcome = "ledger", broker.OutcomeAlive
		e.Answer = "it has no lease and ends by itself at " + text(v.g.LatestEnd())
	default:
		e.Check, e.Answer = "ledger", "past its own end"
	}
	return e
}
