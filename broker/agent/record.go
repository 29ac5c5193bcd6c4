package agent

import (
	"time"

	"github.com/pawlsec/pawl/broker/api"
)

// Info is the broker's record of a delegation, as its holder sees it.
type Info struct {
	ID        DelegationID
	Chain     ChainID
	Parent    DelegationID // empty: this is the root of the chain
	Holder    string       // the SPIFFE ID that may use it
	Rights    []Right
	Budget    Budget
	Depth     int // how many more times it may be passed on
	Created   time.Time
	Expires   time.Time
	Fence     *Fence        // on this delegation itself; nil: none
	Heartbeat time.Duration // interval within which the holder must send a request; zero: none
}

// Fence is the mark after which the broker delivers no secret under a delegation.
type Fence struct {
	At         time.Time
	Revocation RevocationID
	Frozen     bool // it may be lifted; otherwise it is final
}

// Grant is the broker's record of a step, as its caller sees it.
type Grant struct {
	ID         GrantID
	Chain      ChainID
	Delegation DelegationID
	Tool       string
	Narrowing  string // where the narrowing of the secret is enforced: "native", "proxy" or "none"
	State      string // "INTENT", "HANDLE", "ISSUED" or "CLOSED"
	Created    time.Time
	Expires    time.Time // the secret does not work after it
	Bundle     string    // digest of the policy bundle that decided
	Policies   []string  // ids of the policies that decided
	Ending     string    // "closed", "expired", "revoked" or "failed"; empty: it has not ended
	Ended      time.Time
	Outcome    string    // "dead", "alive" or "static"; empty: not proven dead or alive
	ArgsDigest string    // SHA-256 of the arguments in their canonical form, in hex; empty: an older record
	Sealed     string    // thumbprint (RFC 7638) of the key that the secret is sealed to; empty: not sealed
	Collector  string    // the SPIFFE ID that may collect a sealed secret
	Collected  time.Time // zero: not collected
}

func infoOf(w api.Delegation) (Info, error) {
	var err error
	i := Info{
		ID:     answerID(w.ID, ParseDelegationID, &err),
		Chain:  answerID(w.Chain, ParseChainID, &err),
		Holder: w.Holder, Rights: rightsOf(w.Rights), Budget: w.Budget, Depth: w.Depth,
		Created: w.Created, Expires: w.Expires,
		Heartbeat: time.Duration(w.HeartbeatSeconds) * time.Second,
	}
	if w.Parent != "" {
		i.Parent = answerID(w.Parent, ParseDelegationID, &err)
	}
	if f := w.Fence; f != nil {
		i.Fence = &Fence{At: f.At, Revocation: answerID(f.Revocation, ParseRevocationID, &err), Frozen: f.Frozen}
	}
	return i, err
}

func grantOf(w api.Grant) (Grant, error) {
	var err error
	g := Grant{
		ID:         answerID(w.ID, ParseGrantID, &err),
		Chain:      answerID(w.Chain, ParseChainID, &err),
		Delegation: answerID(w.Delegation, ParseDelegationID, &err),
		Tool:       w.Tool, Narrowing: w.Narrowing, State: w.State, Created: w.Created, Expires: w.Expires,
		Bundle: w.Bundle, Policies: w.Policies, Ending: w.Ending, Ended: w.Ended, Outcome: w.Outcome,
		ArgsDigest: w.ArgsDigest, Sealed: w.Sealed, Collector: w.Collector, Collected: w.Collected,
	}
	return g, err
}
