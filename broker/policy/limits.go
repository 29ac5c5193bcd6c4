package policy

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// parseLimit parses "10 per hour" or "500 per 24h".
func parseLimit(s string) (l broker.Limit, err error) {
	count, window, ok := strings.Cut(s, " per ")
	if !ok {
		return l, fmt.Errorf("%.60q is not like \"10 per hour\" or \"500 per 24h\"", s)
	}
	if l.Steps, err = parseNumber(count, 1, maxCount); err != nil {
		return l, err
	}
	words := map[string]time.Duration{"minute": time.Minute, "hour": time.Hour, "day": 24 * time.Hour, "week": 168 * time.Hour}
	if l.Window, ok = words[window]; ok {
		return l, nil
	}
	l.Window, err = parseWindow(window)
	return l, err
}

// parseWindow parses the time over which steps are counted. Shorter windows than an hour are counted by the minute, and
// longer ones by the hour.
func parseWindow(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	unit := time.Minute
	if d > time.Hour {
		unit = time.Hour
	}
	if err != nil || d <= 0 || d%unit != 0 || d > broker.MaxWindow {
		return 0, fmt.Errorf("%.20q is not whole minutes up to 1h, or whole hours up to %.0fh", s, broker.MaxWindow.Hours())
	}
	return d, nil
}

// parsePer parses "caller" or "caller label:team", and returns the label.
func parsePer(s string) (label string, err error) {
	switch fields := strings.Fields(s); {
	case len(fields) == 1 && fields[0] == "caller":
		return "", nil
	case len(fields) == 2 && fields[0] == "caller":
		name, ok := strings.CutPrefix(fields[1], "label:")
		if ok && args.CheckName(name) == nil {
			return name, nil
		}
	}
	return "", errors.New("must be \"caller\" or \"caller label:NAME\", with a label of the envelope")
}
