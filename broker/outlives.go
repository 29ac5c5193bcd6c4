package broker

import (
	"fmt"
	"time"
)

// MaxOutlives bounds the setting outlives of a tool, and so the time for which a grant stays open after its end.
const MaxOutlives = 24 * time.Hour

// Outlives reads the setting outlives of a tool: everything that an agent can obtain with the tool's secret, such as
// sessions, leases and other tokens, has ended this long after the secret's own end. Without the setting it is zero,
// and a backend that shows the secret dead calls it dead.
func (t Tool) Outlives() (time.Duration, error) {
	text, set := t.Settings["outlives"]
	if !set {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > MaxOutlives {
		return 0, fmt.Errorf("must be a duration of at most %v, such as 10m", MaxOutlives)
	}
	return d, nil
}

// WithObtained returns evidence about the grant's secret that also counts everything obtained with it. Until
// Lease.Outlives a dead secret is unknown. A backend uses it where only the secret was checked.
func (g Grant) WithObtained(e Evidence) Evidence {
	if e.Outcome != OutcomeDead || !e.At.Before(g.Lease.Outlives) {
		return e
	}
	e.Outcome, e.Listed = OutcomeUnknown, false
	e.Answer += "; by the tool's setting outlives, sessions and credentials obtained with it may work until " +
		g.Lease.Outlives.UTC().Format(time.RFC3339)
	return e
}
