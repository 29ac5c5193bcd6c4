package report

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// bar is one bar of the chart.
type bar struct {
	label, text string
	value       float64
	ours        bool
}

// panel is a group of bars on one logarithmic scale.
type panel struct {
	title string
	bars  []bar
}

// Chart draws the table's rows about the time to death, issuing and fencing. It is one SVG without scripts or
// embedded fonts, legible on light and dark pages.
func (r *Report) Chart() string {
	panels := []panel{r.deadPanel(), r.throughputPanel(), r.fencePanel()}
	const width, left, high = 860, 330, 22
	var body strings.Builder
	y := 14
	for _, p := range panels {
		if len(p.bars) == 0 {
			continue
		}
		y += 30
		fmt.Fprintf(&body, `<text x="16" y="%d" class="t">%s</text>`+"\n", y, html.EscapeString(p.title))
		y += 12
		least, most := p.bounds()
		for _, b := range p.bars {
			length := 4.0
			if most > least && b.value > 0 {
				length = 4 + (math.Log(b.value)-math.Log(least))/(math.Log(most)-math.Log(least))*(width-left-130)
			}
			class := "b"
			if b.ours {
				class = "a"
			}
			fmt.Fprintf(&body, `<text x="%d" y="%d" class="l">%s</text><rect x="%d" y="%d" width="%.1f" height="14" rx="2" class="%s"/><text x="%.1f" y="%d" class="v">%s</text>`+"\n",
				left-10, y+12, html.EscapeString(b.label), left, y, length, class, float64(left)+length+6, y+12, html.EscapeString(b.text))
			y += high
		}
	}
	y += 20
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="Pawl beside Vault: time until dead, issues a second, time to fence">
<style>
svg { background: #fff } text { font: 13px system-ui, sans-serif; fill: #1b1f24 }
.t { font-weight: 600; font-size: 14px } .l { text-anchor: end } .v { fill: #57606a } .a { fill: #0b6e4f } .b { fill: #b0b7c3 }
@media (prefers-color-scheme: dark) { svg { background: #0d1117 } text { fill: #e6edf3 } .v { fill: #9aa4af } .a { fill: #3fb98d } .b { fill: #4b5563 } }
</style>
%s</svg>
`, width, y, body.String())
}

// bounds gives the ends of the scale. The lower end is below the shortest bar, so that the bar is visible.
func (p panel) bounds() (least, most float64) {
	least = math.Inf(1)
	for _, b := range p.bars {
		if b.value > 0 {
			least, most = min(least, b.value), max(most, b.value)
		}
	}
	return least / 2, most
}

func (r *Report) row(name string) (Row, bool) { return find(r.rows, name) }

func (r *Report) deadPanel() panel {
	p := panel{title: "1,000 PostgreSQL credentials: seconds from the command until every one is dead (shorter is better, logarithmic)"}
	if w, ok := r.row("dead.postgres.1000.seconds"); ok {
		p.bars = append(p.bars, bar{"Pawl", Figure(w.Ours) + " s", w.Ours, true})
	}
	for _, w := range r.rows {
		if !strings.HasPrefix(w.Name, "dead.postgres.1000.vs_") || w.Against == "" || w.Theirs == nil || w.Ratio == nil {
			continue
		}
		p.bars = append(p.bars, bar{strings.ToUpper(w.Against[:1]) + w.Against[1:], fmt.Sprintf("%s s, ×%s", Figure(*w.Theirs), Figure(*w.Ratio)), *w.Theirs, false})
	}
	return p
}

func (r *Report) throughputPanel() panel {
	p := panel{title: "Secrets a second, 16 clients: through Pawl and directly from Vault (longer is better, logarithmic)"}
	for _, tool := range []string{"kv", "jwt", "pki", "ssh", "postgres"} {
		if w, ok := r.row("issue." + tool + ".c16.throughput"); ok && w.Theirs != nil {
			p.bars = append(p.bars, bar{tool + ", through Pawl", Figure(w.Ours), w.Ours, true},
				bar{tool + ", directly", Figure(*w.Theirs), *w.Theirs, false})
		}
	}
	return p
}

func (r *Report) fencePanel() panel {
	p := panel{title: "Milliseconds to fence, p99 (shorter is better, logarithmic)"}
	for _, n := range []string{"10", "100", "1000", "10000", "100000"} {
		if w, ok := r.row("fence." + n + ".p99_ms"); ok {
			p.bars = append(p.bars, bar{"chain of " + n + " live grants", Figure(w.Ours) + " ms", w.Ours, true})
		}
	}
	if w, ok := r.row("fence.vault_down.p99_ms"); ok {
		p.bars = append(p.bars, bar{"over the socket, Vault down", Figure(w.Ours) + " ms", w.Ours, true})
		if w.Theirs != nil {
			p.bars = append(p.bars, bar{"over the socket, Vault up", Figure(*w.Theirs) + " ms", *w.Theirs, true})
		}
	}
	return p
}
