package soak

import (
	"context"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestRun checks the number of steps, revocations and samples of a soak, and which errors end it.
func TestRun(t *testing.T) {
	bad := errors.New("broken")
	for _, row := range []struct {
		name            string
		step            func(i int) error
		revoke, read    error
		samples         int
		fails           string
		least, mostStep int
	}{
		{name: "an hour", samples: 60, least: 35_000, mostStep: 36_001},
		{name: "one step in two thousand fails", samples: 60, least: 35_000, mostStep: 36_001,
			step: func(i int) error {
				if i%2000 == 7 {
					return bad
				}
				return nil
			}},
		{name: "one step in a hundred fails", samples: 60, fails: "the first failed with: broken", least: 35_000, mostStep: 36_001,
			step: func(i int) error {
				if i%100 == 7 {
					return bad
				}
				return nil
			}},
		{name: "no step is taken", samples: 60, fails: "no step was taken", step: func(int) error { return bad }},
		{name: "a revocation fails", revoke: bad, fails: "broken"},
		{name: "a sample fails", read: bad, fails: "broken"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				samples, err := Run(t.Context(), Config{For: time.Hour + time.Second, Every: time.Minute, Rate: 10,
					Step: func(_ context.Context, i int) error {
						if row.step != nil {
							return row.step(i)
						}
						return nil
					},
					Revoke: func(context.Context) error { return row.revoke },
					Read:   func(context.Context) (Sample, error) { return Sample{Goroutines: 1}, row.read }})
				if row.fails == "" && err != nil || row.fails != "" && (err == nil || !strings.Contains(err.Error(), row.fails)) {
					t.Errorf("Run = %v, want an error with %q", err, row.fails)
				}
				if len(samples) != row.samples {
					t.Errorf("%d samples, want %d", len(samples), row.samples)
				}
				if n := len(samples); n > 0 && row.mostStep > 0 && (samples[n-1].Steps < row.least || samples[n-1].Steps > row.mostStep) {
					t.Errorf("%d steps at the last sample, want %d to %d", samples[n-1].Steps, row.least, row.mostStep)
				}
			})
		})
	}
}

// TestEnds checks which samples are compared.
func TestEnds(t *testing.T) {
	var hour []Sample
	for i := range 59 {
		hour = append(hour, Sample{At: time.Duration(i+1) * time.Minute, Goroutines: float64(i + 1)})
	}
	early, late := Ends(hour, Lines[0].Of)
	if want := []float64{7, 8, 9, 10, 11}; len(early) != 5 || early[0] != want[0] || early[4] != want[4] {
		t.Errorf("early = %v, want %v", early, want)
	}
	if len(late) != 5 || late[0] != 55 || late[4] != 59 {
		t.Errorf("late = %v, want 55 to 59", late)
	}
	if early, late := Ends(hour[:9], Lines[0].Of); early != nil || late != nil {
		t.Errorf("nine samples: %v and %v are compared, want none", early, late)
	}
}

// TestChart checks that the chart is well-formed, and has a line for each figure.
func TestChart(t *testing.T) {
	text := Chart([]Sample{{At: time.Minute, Goroutines: 10}, {At: 2 * time.Minute, Goroutines: 12, Heap: 1e6}})
	d := xml.NewDecoder(strings.NewReader(text))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the chart is no XML: %v\n%s", err, text)
		}
	}
	if n := strings.Count(text, "<polyline"); n != len(Lines) {
		t.Errorf("%d lines, want %d", n, len(Lines))
	}
}
