package engine

import (
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/requests"
)

// Shrink returns the delegation that Delegate makes of a request below path, and whether Delegate accepts the request.
func Shrink(path []broker.Delegation, r broker.DelegateRequest, now time.Time) (child broker.Delegation, accepted bool) {
	scope, err := broker.NewScope(r.Rights)
	if err != nil {
		return broker.Delegation{}, false
	}
	child = requests.ChildOf(path[len(path)-1], r, scope, now)
	return child, requests.RefuseWider("delegate", path, child, r.TTL) == nil
}
