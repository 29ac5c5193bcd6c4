package broker

import (
	"cmp"
	"fmt"
	"maps"
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

// Excess is one respect in which a request to open goes beyond the caps.
type Excess struct {
	What   string // "budget:steps", "depth", "ttl" or "label:team"
	Remedy string // the request to make instead, such as "at most 50 steps"
}

// Apply gives the fields of r that are zero the value of their cap, where zero means no limit or a default. A depth of
// zero is the least, and stays. It also returns each respect in which r goes beyond the caps. Signed are the labels of
// r's envelope.
func (c Caps) Apply(r OpenRequest, signed map[string]string) (OpenRequest, []Excess) {
	var beyond []Excess
	over := func(is bool, what, remedy string, args ...any) {
		if is {
			beyond = append(beyond, Excess{what, fmt.Sprintf(remedy, args...)})
		}
	}
	if c.Steps > 0 {
		over(r.Budget.Steps > c.Steps, "budget:steps", "at most %d steps", c.Steps)
		r.Budget.Steps = cmp.Or(r.Budget.Steps, c.Steps)
	}
	if c.Depth != nil {
		over(r.Depth > *c.Depth, "depth", "a depth of at most %d", *c.Depth)
	}
	if c.TTL > 0 {
		over(r.TTL > c.TTL, "ttl", "a lifetime of at most %s", c.TTL)
		r.TTL = cmp.Or(r.TTL, min(c.TTL, DefaultChainTTL))
	}
	if c.Labels != nil {
		for _, name := range slices.Sorted(maps.Keys(r.Labels)) {
			over(!slices.Contains(c.Labels, name), "label:"+name, "no label %q", name)
		}
	}
	for _, name := range c.Required {
		_, asked := r.Labels[name]
		_, stated := signed[name]
		over(!asked && !stated, "label:"+name, "the label %q", name)
	}
	return r, beyond
}
