package records

import (
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// UnknownDelegation refuses a delegation that does not exist, with the same text as one of another holder.
func UnknownDelegation(op string) *broker.Error {
	return broker.Errorf(broker.NotFound, op, "no such delegation, or it is not yours").With(broker.CodeDelegationUnknown)
}

// UnknownGrant refuses a grant that does not exist, with the same text as one of another caller.
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

// OverCap refuses a request to open a chain that goes beyond the caps of policy.
func OverCap(op string, beyond []broker.Excess) *broker.Error {
	var missing, remedies []string
	for _, x := range beyond {
		missing, remedies = append(missing, x.What), append(remedies, x.Remedy)
	}
	return broker.Errorf(broker.Denied, op, "the request goes beyond the caps of policy: %s", strings.Join(missing, ", ")).
		With(broker.CodeChainOverCap).Lacks("ask for "+strings.Join(remedies, ", "), missing...)
}

// Fenced refuses a request under a fence.
func Fenced(op string, f *broker.Fence) *broker.Error {
	at := f.At.UTC().Format(time.RFC3339)
	refusal := broker.Errorf(broker.Revoked, op, "revoked at %s; nothing more is handed out", at).With(broker.CodeFenced)
	if f.Frozen {
		refusal = broker.Errorf(broker.Revoked, op, "frozen at %s; nothing is handed out until the freeze is lifted", at).
			With(broker.CodeFrozen).Lacks("ask two operators to lift the freeze")
	}
	refusal.Revocation = f.Revocation
	return refusal
}
