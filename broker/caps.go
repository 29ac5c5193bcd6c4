package broker

import (
	"slices"
	"time"
)

// Caps limit the request to open a chain. The zero Caps limit nothing.
type Caps struct {
	Steps    int           `json:"steps,omitempty"`    // steps of the chain in all; zero: no cap
	Depth    *int          `json:"depth,omitempty"`    // how many times it may be passed on; nil: no cap
	TTL      time.Duration `json:"ttl,omitempty"`      // its lifetime; zero: no cap
	Labels   []string      `json:"labels"`             // the only labels that the request may name; nil: any
	Required []string      `json:"required,omitempty"` // labels that the request or its envelope must have
}

// Tighten makes c the tightest of both in each respect.
func (c *Caps) Tighten(o Caps) {
	if o.Steps > 0 && (c.Steps == 0 || o.Steps < c.Steps) {
		c.Steps = o.Steps
	}
	if o.Depth != nil && (c.Depth == nil || *o.Depth < *c.Depth) {
		c.Depth = o.Depth
	}
	if o.TTL > 0 && (c.TTL == 0 || o.TTL < c.TTL) {
		c.TTL = o.TTL
	}
	if o.Labels != nil {
		allowed := slices.Clone(o.Labels)
		if c.Labels != nil {
			allowed = slices.DeleteFunc(allowed, func(name string) bool { return !slices.Contains(c.Labels, name) })
		}
		c.Labels = allowed
	}
	for _, name := range o.Required {
		if i, known := slices.BinarySearch(c.Required, name); !known {
			c.Required = slices.Insert(slices.Clone(c.Required), i, name)
		}
	}
}
