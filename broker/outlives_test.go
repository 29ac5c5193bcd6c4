package broker_test

import (
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
)

func TestOutlives(t *testing.T) {
	for text, want := range map[string]time.Duration{"10m": 10 * time.Minute, "24h": 24 * time.Hour,
		"": 0, "0s": 0, "-1m": 0, "25h": 0, "ten": 0} {
		got, err := broker.Tool{Settings: map[string]string{"outlives": text}}.Outlives()
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("Outlives(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
	if got, err := (broker.Tool{}).Outlives(); got != 0 || err != nil {
		t.Errorf("Outlives() without the setting = %v, %v, want 0", got, err)
	}
}

// TestWithObtained checks that only a dead secret becomes unknown, and only until everything obtained with it has ended.
func TestWithObtained(t *testing.T) {
	now := time.Now()
	g := broker.Grant{Lease: broker.Lease{Outlives: now.Add(time.Hour)}}
	for _, row := range []struct {
		grant   broker.Grant
		at      time.Time
		outcome broker.Outcome
		want    broker.Outcome
	}{
		{g, now, broker.OutcomeDead, broker.OutcomeUnknown},
		{g, now.Add(time.Hour), broker.OutcomeDead, broker.OutcomeDead},
		{broker.Grant{}, now, broker.OutcomeDead, broker.OutcomeDead},
		{g, now, broker.OutcomeAlive, broker.OutcomeAlive},
		{g, now, broker.OutcomeStatic, broker.OutcomeStatic},
		{g, now, broker.OutcomeUnknown, broker.OutcomeUnknown},
	} {
		e := broker.Evidence{At: row.at, Outcome: row.outcome, Answer: "x", Listed: row.outcome == broker.OutcomeDead}
		got := row.grant.WithObtained(e)
		changed := row.want != row.outcome
		if got.Outcome != row.want || strings.Contains(got.Answer, "outlives") != changed || changed && got.Listed {
			t.Errorf("WithObtained(%s) at %v = %+v, want %s", row.outcome, row.at.Sub(now), got, row.want)
		}
	}
}
