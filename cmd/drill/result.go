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

// Result has the measurements. Times are in milliseconds since the request for the step that broke policy.
type Result struct {
	Secrets      int       `json:"secrets"`
	Logins       int       `json:"logins"`       // of the secrets, in PostgreSQL
	Certificates int       `json:"certificates"` // of the secrets, from Vault's PKI
	Agents       int       `json:"agents"`
	FencedMS     float64   `json:"fenced_ms"`   // when the refusal arrived: no secret is handed out from then on
	NotifiedMS   []float64 `json:"heard_ms"`    // when each agent's SDK had cancelled its steps
	DeadMS       []float64 `json:"dead_ms"`     // when each secret was refused by its backend, by an external probe
	ClosedMS     float64   `json:"closed_ms"`   // when the broker reported evidence for all secrets
	Closure      string    `json:"closure"`     // the broker's last closure
	ProvenDead   int       `json:"proven_dead"` // secrets that the broker has proven dead
	Unnotified   int       `json:"unheard"`     // agents that were not notified
	Alive        int       `json:"alive"`       // secrets that their backends accepted at the end
}

func sorted(ms []float64) []float64 { slices.Sort(ms); return ms }

// verdict returns an error unless every secret is dead, the broker has proven it, and every agent was notified.
func (r Result) verdict() error {
	switch {
	case r.Alive > 0 || len(r.DeadMS) < r.Secrets:
		return fmt.Errorf("%d of %d secrets are alive", max(r.Alive, r.Secrets-len(r.DeadMS)), r.Secrets)
	case r.Closure != "CLOSED" || r.ProvenDead != r.Secrets:
		return fmt.Errorf("every secret is dead, but the broker reports %s with %d of %d proven dead",
			r.Closure, r.ProvenDead, r.Secrets)
	case r.Unnotified > 0:
		return fmt.Errorf("%d of %d agents were not notified", r.Unnotified, r.Agents)
	}
	return nil
}

// print writes the table.
func (r Result) print(out io.Writer) error {
	fmt.Fprintf(out, "%d live secrets (%d logins, %d certificates) of %d agents when one agent broke policy\n\n",
		r.Secrets, r.Logins, r.Certificates, r.Agents)
	t := tabwriter.NewWriter(out, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "milliseconds since\tfirst\tmedian\tlast\tcount\t\n")
	row := func(name string, ms []float64) {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t\n", name, at(ms, 0), at(ms, 50), at(ms, 100), len(ms))
	}
	row("fenced: no secret is handed out", []float64{r.FencedMS})
	row("notified: an agent's steps were cancelled", r.NotifiedMS)
	row("dead: refused by its backend", r.DeadMS)
	row(strings.ToLower(r.Closure)+": the broker's evidence is complete", []float64{r.ClosedMS})
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "\nAlive: %d of %d. Closure: %s, with evidence for %d.\n",
		r.Alive, r.Secrets, r.Closure, r.ProvenDead)
	return err
}

// at formats a percentile, by the nearest rank, with one decimal.
func at(ms []float64, percent int) string {
	if len(ms) == 0 {
		return "never"
	}
	return fmt.Sprintf("%.1f", ms[max(0, (len(ms)*percent+99)/100-1)])
}

// write writes the chart and the figures to files; an empty name writes none.
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
