package closing

import (
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// verdict judges one grant by what was found of it. Dead takes an answer from every part that
// could know better: Vault has ended the token, knows the lease no more, no mint can still be
// under way, and the target, where it can be asked, refuses the secret.
type verdict struct {
	g       broker.Grant
	killed  killAnswer      // of revoking the step's token
	gone    goneAnswer      // of the lease
	found   broker.Evidence // of the target; zero when it cannot be asked
	probed  bool            // the target can be asked
	minting bool            // an issue of this process is at work
	givenUp bool            // Vault has given up revoking the lease
	now     time.Time
}

// answerGivenUp is the evidence of a lease that Vault lists as irrevocable.
const answerGivenUp = "still there, and Vault has given up revoking it: it is tried again, and needs a person"

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
	evidence := []broker.Evidence{v.token(), v.lease()}
	if v.probed {
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
	e := broker.Evidence{At: v.killed.at, Check: "vault: revoke the step's token", Outcome: broker.OutcomeDead, Answer: "revoked, or gone before"}
	if v.killed.err != nil {
		e.At, e.Outcome, e.Answer = v.now, broker.OutcomeUnknown, "Vault did not confirm"
	}
	return e
}

func (v verdict) lease() broker.Evidence {
	e := broker.Evidence{At: v.now, Check: "vault: look the lease up", Outcome: broker.OutcomeDead, Answer: "gone"}
	switch {
	case v.gone.asked && !v.gone.answered:
		e.Outcome, e.Answer = broker.OutcomeUnknown, "Vault did not answer"
	case v.gone.asked && !v.gone.gone:
		// Vault still lists it: what the target says decides whether it works, but it is not over.
		if e.Outcome, e.Answer = broker.OutcomeUnknown, "still there"; v.givenUp {
			e.Answer = answerGivenUp
		}
	case v.gone.asked:
	case v.g.State == broker.StateHandle && (v.minting || v.now.Before(v.g.Settles)):
		e.Check, e.Outcome, e.Answer = "ledger", broker.OutcomeUnknown, "a mint may still be on its way until "+v.g.Settles.UTC().Format(time.RFC3339)
	case v.g.State == broker.StateHandle:
		e.Check, e.Answer = "ledger", "no mint can be on its way any more"
	case v.probed:
		e.Check, e.Answer = "ledger", "this engine gives no lease; the target decides"
	case v.now.Before(v.g.LatestEnd()):
		e.Check, e.Outcome, e.Answer = "ledger", broker.OutcomeAlive, "it has no lease and ends by itself at "+v.g.LatestEnd().UTC().Format(time.RFC3339)
	default:
		e.Check, e.Answer = "ledger", "past its own end"
	}
	return e
}
