package engine

import (
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Shrink returns the delegation that Delegate makes of a request below path, and whether Delegate accepts the request.
func Shrink(path []broker.Delegation, r broker.DelegateRequest, now time.Time) (child broker.Delegation, accepted bool) {
	scope, err := broker.NewScope(r.Rights)
	if err != nil {
		return broker.Delegation{}, false
	}
	child = childOf(path[len(path)-1], r, scope, now)
	return child, refuseWider("delegate", path, child, r.TTL) == nil
}
