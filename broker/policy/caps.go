package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// maxCount is the largest number of steps in an annotation.
const maxCount = 1_000_000_000

// parseCap parses an annotation that caps the chains that a permit opens, into c.
func parseCap(c *broker.Caps, key, value string) (err error) {
	switch key {
	case "max_steps":
		c.Steps, err = parseNumber(value, 1, maxCount)
	case "max_depth":
		var depth int
		depth, err = parseNumber(value, 0, broker.MaxDepth)
		c.Depth = &depth
	case "max_ttl":
		c.TTL, err = parseChainTTL(value)
	case "labels":
		c.Labels, err = parseLabels(value)
	case "requires_labels":
		if c.Required, err = parseLabels(value); err == nil && len(c.Required) == 0 {
			err = errors.New("names no label")
		}
	default:
		return errors.New("unknown annotation")
	}
	return err
}

func parseNumber(s string, least, most int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < least || n > most || s != strconv.Itoa(n) {
		return 0, fmt.Errorf("%.20q is not a whole number from %d to %d", s, least, most)
	}
	return n, nil
}

func parseChainTTL(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 || d > broker.MaxChainTTL || d%time.Second != 0 {
		return 0, fmt.Errorf("%.20q is not a whole number of seconds up to %v, like \"15m\"", s, broker.MaxChainTTL)
	}
	return d, nil
}

// parseLabels parses names of labels. The result is sorted and never nil.
func parseLabels(s string) ([]string, error) {
	names := append([]string{}, strings.Fields(s)...)
	slices.Sort(names)
	for i, name := range names {
		if err := args.CheckName(name); err != nil {
			return nil, fmt.Errorf("%.64q: %w", name, err)
		}
		if i > 0 && names[i-1] == name {
			return nil, fmt.Errorf("%.64q is named twice", name)
		}
	}
	return names, nil
}

// describeCaps formats caps like the annotations: "max_steps: 50, max_depth: 2".
func describeCaps(c broker.Caps) string {
	var parts []string
	if c.Steps > 0 {
		parts = append(parts, fmt.Sprintf("max_steps: %d", c.Steps))
	}
	if c.Depth != nil {
		parts = append(parts, fmt.Sprintf("max_depth: %d", *c.Depth))
	}
	if c.TTL > 0 {
		parts = append(parts, fmt.Sprintf("max_ttl: %v", c.TTL))
	}
	if c.Labels != nil {
		parts = append(parts, "labels: "+strings.Join(c.Labels, " "))
	}
	if len(c.Required) > 0 {
		parts = append(parts, "requires_labels: "+strings.Join(c.Required, " "))
	}
	return strings.Join(parts, ", ")
}
