package engine

import (
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Shrink returns the delegation that Delegate makes of a request, and whether Delegate accepts the request.
func Shrink(d broker.Delegation, r broker.DelegateRequest, now time.Time) (child broker.Delegation, accepted bool) {
	scope, err := broker.NewScope(r.Rights)
	if err != nil {
		return broker.Delegation{}, false
	}
	child = childOf(d, r, scope, now)
	return child, refuseWider("delegate", d, child, r.TTL) == nil
}
