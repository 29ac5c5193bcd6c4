package drill

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// Result is what was measured, in milliseconds since the step that broke policy was asked for.
type Result struct {
	Secrets      int       `json:"secrets"`
	Logins       int       `json:"logins"`       // of these, in PostgreSQL
	Certificates int       `json:"certificates"` // of these, of Vault's PKI
	Agents       int       `json:"agents"`
	FencedMS     float64   `json:"fenced_ms"`   // nothing more was handed out: the refusal was there
	HeardMS      []float64 `json:"heard_ms"`    // each agent's SDK had ended its steps
	DeadMS       []float64 `json:"dead_ms"`     // each secret was of no use at its backend, as an outside probe saw it
	ClosedMS     float64   `json:"closed_ms"`   // the broker had evidence for all and said so
	Closure      string    `json:"closure"`     // what it said last
	ProvenDead   int       `json:"proven_dead"` // for how many
	Unheard      int       `json:"unheard"`     // agents that were never told
	Alive        int       `json:"alive"`       // secrets that their backends took when all was over
}

func sorted(ms []float64) []float64 { slices.Sort(ms); return ms }

// verdict is an error unless everything died and the broker said so.
func (r Result) verdict() error {
	switch {
	case r.Alive > 0 || len(r.DeadMS) < r.Secrets:
		return fmt.Errorf("%d of %d secrets are alive", max(r.Alive, r.Secrets-len(r.DeadMS)), r.Secrets)
	case r.Closure != "CLOSED" || r.ProvenDead != r.Secrets:
		return fmt.Errorf("every secret is dead, and the broker says %s with %d of %d", r.Closure, r.ProvenDead, r.Secrets)
	case r.Unheard > 0:
		return fmt.Errorf("%d of %d agents did not hear of it", r.Unheard, r.Agents)
	}
	return nil
}

// print writes the table for people.
func (r Result) print(out io.Writer) error {
	fmt.Fprintf(out, "%d live secrets (%d logins, %d certificates) of %d agents, when one of them broke policy\n\n", r.Secrets, r.Logins, r.Certificates, r.Agents)
	t := tabwriter.NewWriter(out, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "milliseconds since\tfirst\tmedian\tlast\tcount\t\n")
	row := func(name string, ms []float64) {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t\n", name, at(ms, 0), at(ms, 50), at(ms, 100), len(ms))
	}
	row("fenced: nothing more is handed out", []float64{r.FencedMS})
	row("heard: an agent's steps were ended", r.HeardMS)
	row("dead: of no use at its backend", r.DeadMS)
	row(strings.ToLower(r.Closure)+": the broker's evidence is complete", []float64{r.ClosedMS})
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "\nAlive: %d of %d. Closure: %s, with evidence for %d.\n", r.Alive, r.Secrets, r.Closure, r.ProvenDead)
	return err
}

// at is a percentile, by the nearest rank, in a few digits.
func at(ms []float64, percent int) string {
	if len(ms) == 0 {
		return "never"
	}
	return fmt.Sprintf("%.1f", ms[max(0, (len(ms)*percent+99)/100-1)])
}

// write stores the chart and the figures; an empty name is none.
func (r Result) write(svg, figures string) error {
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	for path, text := range map[string][]byte{svg: r.chart(), figures: append(raw, '\n')} {
		if path == "" {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
