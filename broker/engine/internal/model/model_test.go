package model_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/engine/internal/model"
)

// alone are the configurations with one issue, crashes and failed writes.
func alone() (list []model.Machine) {
	for _, known := range []bool{true, false} {
		for _, leased := range []bool{true, false} {
			list = append(list, model.Machine{Grants: 1, Crashes: 2, Failures: 2, Known: known, Leased: leased})
		}
	}
	return append(list, model.Machine{Grants: 1, Crashes: 1, Failures: 1, Shared: true})
}

// ahead are the configurations with a token that is made ahead.
func ahead() []model.Machine {
	return []model.Machine{{Grants: 1, Crashes: 1, Failures: 1, Leased: true, Ahead: true},
		{Grants: 2, Leased: true, Ahead: true}}
}

// closed are the configurations whose agents close their steps.
func closed() []model.Machine {
	return []model.Machine{{Grants: 1, Crashes: 1, Failures: 1, Shared: true, Closes: true},
		{Grants: 1, Crashes: 1, Failures: 1, Known: true, Leased: true, Closes: true}}
}

// TestPromisesHold checks the promises in every state of every configuration.
func TestPromisesHold(t *testing.T) {
	for _, m := range append(slices.Concat(alone(), ahead(), closed()),
		model.Machine{Grants: 2, Crashes: 1, Known: true, Leased: true},
		model.Machine{Grants: 2, Crashes: 1, Known: true},
		model.Machine{Grants: 2, Shared: true}) {
		states, broken := m.Check()
		t.Logf("%+v: %d states", m, states)
		if broken != nil {
			t.Errorf("%+v: %v", m, broken)
		}
		if states < 1000 {
			t.Errorf("%+v has %d states, want 1,000 or more: some moves are missing", m, states)
		}
	}
}

// TestFaultsAreFound holds that the search can fail: it finds the broken promise of each fault.
func TestFaultsAreFound(t *testing.T) {
	for name, row := range map[string]struct {
		fault   model.Fault
		promise string
	}{
		"ISSUED passes a fence":              {model.IssuedPasses, "handed out after the fence's acknowledgement"},
		"a fence is acknowledged too early":  {model.EarlyAnswer, "an acknowledged fence is not durable"},
		"a mint is sent too early":           {model.EarlyMint, "that the ledger does not know"},
		"HANDLE's latest end is too early":   {model.ShortEnd, "outlives the latest end"},
		"a HANDLE is closed too early":       {model.EarlyClose, "whose grant is CLOSED"},
		"its life is forgotten":              {model.CloseAtDeadline, "whose grant is CLOSED"},
		"a failed write is ignored":          {model.FailureIgnored, "nothing ends it"},
		"a checkpoint is ahead of the disk":  {model.SignsOrdered, "a signed entry of the log was lost"},
		"the disk changes the order":         {model.Reordered, "is not durable with it"},
		"a token is used before its record":  {model.EarlyUse, "with a token that the ledger does not know"},
		"a step's end kills another's token": {model.KillsShared, "was killed without a fence"},
		"a token outlives its revocation":    {model.LeavesToken, "a token of its delegation can mint"},
		"a token is taken twice":             {model.TakenTwice, "two steps have one token"},
		"a token is taken too late":          {model.TakenLate, "before its tool changed"},
		"a taken token is not recorded":      {model.HandleLeft, "the ledger has forgotten it"},
		"an unused token is forgotten first": {model.DropsFirst, "the ledger has forgotten it"},
		"an unused token outlives all":       {model.LeavesAhead, "a token that was made ahead can mint"},
		"a restart forgets unused tokens":    {model.ForgetsAhead, "nothing ends it"},
		"an unrecorded token is offered":     {model.KeepsUnrecorded, "is offered without a record"},
		"an agent is answered too early":     {model.EarlyClosed, "leaves the grant open"},
	} {
		t.Run(name, func(t *testing.T) {
			found, machines := "", alone()
			switch {
			case row.fault == model.EarlyClosed:
				machines = closed()
			case row.fault >= model.TakenTwice:
				machines = ahead()
			}
			for _, m := range machines {
				m.Fault = row.fault
				if _, broken := m.Check(); broken != nil {
					found = broken.Error()
					if !strings.Contains(broken.Promise, row.promise) {
						t.Errorf("%+v: found %q, want %q", m, broken.Promise, row.promise)
					}
				}
			}
			if found == "" {
				t.Fatalf("no broken promise was found, want %q", row.promise)
			}
			t.Log(found)
		})
	}
}
