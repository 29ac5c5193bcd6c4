package broker

import (
	"encoding/json"
	"fmt"
)

// Constraint limits one argument. The zero Constraint allows nothing.
type Constraint struct {
	oneOf []string
}

// Allows reports whether v is inside the constraint.
func (c Constraint) Allows(v Value) bool {
	s, ok := v.Text()
	for _, o := range c.oneOf {
		if ok && o == s {
			return true
		}
	}
	return false
}

// Covers reports whether every value that d allows is allowed by c.
func (c Constraint) Covers(d Constraint) bool {
	for _, s := range d.oneOf {
		if !c.Allows(String(s)) {
			return false
		}
	}
	return true
}

// ParseConstraint reads the wire form.
func ParseConstraint(raw []byte) (c Constraint, err error) { return c, c.UnmarshalJSON(raw) }

// MarshalJSON writes the wire form.
func (c Constraint) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]any{"one_of": c.oneOf})
}

// UnmarshalJSON is [ParseConstraint].
func (c *Constraint) UnmarshalJSON(raw []byte) error {
	var w struct {
		OneOf []string `json:"one_of"`
	}
	if err := json.Unmarshal(raw, &w); err != nil {
		return fmt.Errorf("constraint: %w", err)
	}
	c.oneOf = w.OneOf
	return nil
}
