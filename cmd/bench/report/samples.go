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

// Welch returns the t statistic of the difference of two means.
func Welch(a, b Samples) float64 {
	mean := func(s Samples) (mean, variance float64) {
		for _, x := range s {
			mean += x / float64(len(s))
		}
		for _, x := range s {
			variance += (x - mean) * (x - mean) / float64(len(s)-1)
		}
		return mean, variance
	}
	m1, v1 := mean(a)
	m2, v2 := mean(b)
	return (m1 - m2) / math.Sqrt(v1/float64(len(a))+v2/float64(len(b)))
}
