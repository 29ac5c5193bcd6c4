package engine

import "time"
import "github.com/pawlsec/pawl/broker"

// Shrink is what Delegate makes of a request under a delegation, and whether it refuses that.
func Shrink(d broker.Delegation, r broker.DelegateRequest, now time.Time) (broker.Delegation, bool) {
	scope, err := broker.NewScope(r.Rights)
	if err != nil {
		return broker.Delegation{}, false
	}
	child := childOf(d, r, scope, now)
	return child, refuseWider("delegate", d, child, r.TTL) == nil
}
