package records

import (
	"time"

	"github.com/pawlsec/pawl/broker"
)

// UnknownDelegation refuses a delegation that does not exist, in the same words as one of another holder.
func UnknownDelegation(op string) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "no such delegation, or it is not yours").With(broker.CodeDelegationUnknown)
}

// UnknownGrant refuses a grant that does not exist, in the same words as one of another caller.
func UnknownGrant(op string) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "no such grant, or it is not yours").With(broker.CodeGrantUnknown)
}

// UnknownChain refuses a chain that does not exist.
func UnknownChain(op string, id broker.ChainID) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "there is no chain %s", id)
}

// UnknownRevocation refuses a revocation that does not exist.
func UnknownRevocation(op string) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "there is no such revocation").With(broker.CodeRevocationUnknown)
}

// Fenced refuses what is under a fence.
func Fenced(op string, f *broker.Fence) *broker.Error {
	e := broker.Errorf(broker.Revoked, op, "revoked at %s; nothing more is handed out", f.At.UTC().Format(time.RFC3339)).With(broker.CodeFenced)
	if f.Frozen {
		e = broker.Errorf(broker.Revoked, op, "frozen at %s; nothing is handed out until it is lifted", f.At.UTC().Format(time.RFC3339)).
			With(broker.CodeFrozen).Lacks("an operator can lift the freeze")
	}
	e.Revocation = f.Revocation
	return e
}
