package report

import (
	"math"
	"slices"
)

// Samples are measurements of one thing.
type Samples []float64

// Quantile gives the smallest sample that a share q of all samples do not exceed; NaN without samples.
func (s Samples) Quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(s))
	at := int(math.Ceil(q*float64(len(sorted)))) - 1
	return sorted[min(max(at, 0), len(sorted)-1)]
}

// Median gives the middle sample, or the mean of the middle two.
func (s Samples) Median() float64 {
	if len(s)%2 == 1 || len(s) == 0 {
		return s.Quantile(0.5)
	}
	sorted := slices.Sorted(slices.Values(s))
	return (sorted[len(s)/2-1] + sorted[len(s)/2]) / 2
}
