package drill

import (
	"bytes"
	"fmt"
	"math"
	"slices"
)

// The chart's size, and the plot inside it, in pixels.
const (
	width, height = 760, 400
	left, right   = 70, 730
	top, bottom   = 70, 340
)

// chart draws the number of secrets that still work over time, and marks the fence, the last notification, the
// last death and the closure. It contains only figures and fixed words.
func (r Result) chart() []byte {
	end := niceEnd(max(r.ClosedMS, last(r.DeadMS), last(r.NotifiedMS), r.FencedMS, 1))
	x := func(ms float64) float64 { return left + ms/end*(right-left) }
	y := func(n int) float64 { return bottom - float64(n)/float64(max(1, r.Secrets))*(bottom-top) }
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" `+
		`font-family="sans-serif" font-size="13" role="img">`+"\n", width, height)
	fmt.Fprintf(&b, `<title>%d secrets after a violation: how many still work</title>`+"\n", r.Secrets)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="%d" y="28" font-size="17" fill="#222">`+
		`Secrets that still work after one of %d agents broke policy</text>`+"\n", left, r.Agents)
	r.axes(&b, end, x, y)
	fmt.Fprintf(&b, `<path d="%s" fill="#c0392b" fill-opacity=".15" stroke="#c0392b" stroke-width="2"/>`+"\n",
		r.curve(end, x, y))
	r.marks(&b, x)
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// axes draws five grid lines in each direction, with their figures.
func (r Result) axes(b *bytes.Buffer, end float64, x func(float64) float64, y func(int) float64) {
	for i := range 5 {
		ms, n := end*float64(i)/4, r.Secrets*i/4
		fmt.Fprintf(b, `<path d="M%.1f %d V%d M%d %.1f H%d" stroke="#ddd"/>`+"\n", x(ms), top, bottom, left, y(n), right)
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle" fill="#555">%g ms</text>`+"\n", x(ms), bottom+20, ms)
		fmt.Fprintf(b, `<text x="%d" y="%.1f" text-anchor="end" fill="#555">%d</text>`+"\n", left-10, y(n)+4, n)
	}
}

// curve steps down once at each death.
func (r Result) curve(end float64, x func(float64) float64, y func(int) float64) string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "M%d %d V%.1f", left, bottom, y(r.Secrets))
	for i, ms := range r.DeadMS {
		fmt.Fprintf(&b, " H%.1f V%.1f", x(ms), y(r.Secrets-i-1))
	}
	if len(r.DeadMS) < r.Secrets {
		fmt.Fprintf(&b, " H%.1f", x(end))
	}
	fmt.Fprintf(&b, " V%d Z", bottom)
	return b.String()
}

// marks draws a dashed line for each moment, and its name and time below the axis.
func (r Result) marks(b *bytes.Buffer, x func(float64) float64) {
	for i, m := range []struct {
		ms           float64
		name, colour string
	}{
		{r.FencedMS, "fenced", "#1f4e8c"},
		{last(r.NotifiedMS), "agents notified", "#1b7a4b"},
		{last(r.DeadMS), "all dead", "#c0392b"},
		{r.ClosedMS, "closure", "#6c3483"},
	} {
		fmt.Fprintf(b, `<path d="M%.1f %d V%d" stroke="%s" stroke-dasharray="4 3"/>`+"\n", x(m.ms), top-8, bottom, m.colour)
		fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s">%s %.1f ms</text>`+"\n",
			left+i*165, bottom+45, m.colour, m.name, m.ms)
	}
}

func last(ms []float64) float64 {
	if len(ms) == 0 {
		return 0
	}
	return slices.Max(ms)
}

// niceEnd rounds up to 1, 2, 4 or 8 times a power of ten, so that quarters of it are round numbers.
func niceEnd(ms float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(ms)))
	for _, n := range []float64{1, 2, 4, 8} {
		if ms <= n*power {
			return n * power
		}
	}
	return 10 * power
}
