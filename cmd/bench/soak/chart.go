package soak

import (
	"fmt"
	"strings"
)

// Line is one figure of the samples, as the chart shows it.
type Line struct {
	Name string
	Of   func(Sample) float64
}

// Lines are the figures that must not grow.
var Lines = []Line{
	{"goroutines", func(s Sample) float64 { return s.Goroutines }},
	{"files", func(s Sample) float64 { return s.Files }},
	{"heap", func(s Sample) float64 { return s.Heap }},
	{"free_pages", func(s Sample) float64 { return s.Free }},
}

// Chart draws each line over time in a strip of its own, from zero to its largest value. It is one SVG without scripts or
// embedded fonts, legible on light and dark pages.
func Chart(samples []Sample) string {
	const width, left, high, gap = 860, 120, 90, 24
	var body strings.Builder
	for n, line := range Lines {
		top := 20 + n*(high+gap)
		most := 1.0
		for _, s := range samples {
			most = max(most, line.Of(s))
		}
		var points []string
		for _, s := range samples {
			x := left + s.At.Seconds()/samples[len(samples)-1].At.Seconds()*(width-left-20)
			points = append(points, fmt.Sprintf("%.1f,%.1f", x, float64(top)+high*(1-line.Of(s)/most)))
		}
		fmt.Fprintf(&body, `<text x="%d" y="%d" class="l">%s</text><text x="%d" y="%d" class="v">%.4g</text>`+
			`<line x1="%d" x2="%d" y1="%d" y2="%d"/><polyline points="%s"/>`+"\n",
			left-10, top+high/2, line.Name, left-10, top+10, most, left, width-20, top+high, top+high, strings.Join(points, " "))
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="What the broker holds over time">
<style>
svg { background: #fff } text { font: 13px system-ui, sans-serif; fill: #1b1f24; text-anchor: end } .v { fill: #57606a }
line { stroke: #b0b7c3 } polyline { fill: none; stroke: #0b6e4f; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) { svg { background: #0d1117 } text { fill: #e6edf3 } .v { fill: #9aa4af } line { stroke: #4b5563 } polyline { stroke: #3fb98d } }
</style>
%s</svg>
`, width, 20+len(Lines)*(high+gap), body.String())
}
