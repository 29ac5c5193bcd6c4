// Package requests checks what agents and operators ask for, before the ledger is read: the limits of a request, and
// that a delegation is narrower than its parent.
package requests

import (
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// CheckText refuses text that is too long, is not UTF-8, or could forge a line of a log or terminal.
func CheckText(op, name, s string, least, most int) error {
	if len(s) < least || len(s) > most {
		return broker.Errorf(broker.Malformed, op, "%s must be %d to %d bytes", name, least, most)
	}
	if !broker.PlainText(s) {
		return broker.Errorf(broker.Malformed, op, "%s has a control character or is not valid UTF-8", name)
	}
	return nil
}

// CheckHeartbeat refuses a heartbeat that is shorter or longer than one may be. Zero is none.
func CheckHeartbeat(op string, d time.Duration) error {
	if d != 0 && (d < broker.MinHeartbeat || d > broker.MaxChainTTL) {
		return broker.Errorf(broker.Malformed, op, "the heartbeat must be %s to %s, or none",
			broker.MinHeartbeat, broker.MaxChainTTL)
	}
	return nil
}

// CheckOpen validates a request to open a chain and returns its scope.
func CheckOpen(op string, r broker.OpenRequest) (broker.Scope, error) {
	if err := CheckText(op, "task", r.Task, 1, broker.MaxTask); err != nil {
		return nil, err
	}
	if len(r.Labels) > broker.MaxLabels {
		return nil, broker.Errorf(broker.Malformed, op, "at most %d labels", broker.MaxLabels)
	}
	for name, value := range r.Labels {
		if err := args.CheckName(name); err != nil {
			return nil, broker.Errorf(broker.Malformed, op,
				"label names are lower-case letters, digits and underscores, at most 64")
		}
		if err := CheckText(op, "the value of label "+name, value, 0, broker.MaxLabel); err != nil {
			return nil, err
		}
	}
	if err := CheckHeartbeat(op, r.Heartbeat); err != nil {
		return nil, err
	}
	return CheckShare(op, r.Rights, r.Budget, r.Depth, r.TTL)
}

// CheckShare validates the fields that OpenRequest and DelegateRequest share.
func CheckShare(op string, rights []broker.Right, budget broker.Budget, depth int, ttl time.Duration,
) (broker.Scope, error) {
	scope, err := broker.NewScope(rights)
	if err != nil {
		return nil, broker.Errorf(broker.Malformed, op, "%v", err)
	}
	if err := budget.Check(); err != nil {
		return nil, broker.Errorf(broker.Malformed, op, "%v", err)
	}
	if depth < 0 || depth > broker.MaxDepth {
		return nil, broker.Errorf(broker.Malformed, op, "depth must be 0 to %d", broker.MaxDepth)
	}
	if ttl < 0 || ttl > broker.MaxChainTTL {
		return nil, broker.Errorf(broker.Malformed, op, "the lifetime must be at most %s", broker.MaxChainTTL)
	}
	return scope, nil
}
