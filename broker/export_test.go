package broker

import "time"

// Shrink is what Delegate makes of a request under a delegation, and whether it refuses that.
func (d Delegation) Shrink(r DelegateRequest, now time.Time) (Delegation, bool) {
	scope, err := NewScope(r.Rights)
	if err != nil {
		return Delegation{}, false
	}
	child := d.child(r, scope, now)
	return child, d.refuse("delegate", child, r.TTL) == nil
}
