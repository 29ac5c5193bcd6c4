package args

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// exact allows one value.
type exact struct{ v Value }

func newExact(v Value) (bound, error) {
	if err := v.check(); err != nil {
		return nil, err
	}
	return exact{v}, nil
}

func (r exact) name() string               { return "exact" }
func (r exact) takes() valueKind           { return r.v.kind }
func (r exact) allows(v Value) bool        { return r.v.Equal(v) }
func (r exact) values() ([]Value, bool)    { return []Value{r.v}, true }
func (r exact) covers(bound) bool          { return false } // d is not finite here
func (r exact) appendBody(b []byte) []byte { return r.v.append(b) }
func (r exact) String() string             { return "exactly " + listing([]Value{r.v}) }

// oneOf allows the members of a sorted set of one kind.
type oneOf []Value

// newOneOf returns no bound for the empty set, which is the zero Constraint.
func newOneOf(values []Value) (bound, error) {
	set, err := newSet(values)
	if err != nil || len(set) == 0 {
		return nil, err
	}
	return oneOf(set), nil
}

// newSet sorts scalars of one kind and removes duplicates.
func newSet(values []Value) ([]Value, error) {
	if len(values) > MaxConstraintSet {
		return nil, fmt.Errorf("more than %d members", MaxConstraintSet)
	}
	for _, v := range values {
		if v.kind == listValue || v.kind != values[0].kind {
			return nil, errors.New("members must be all strings, all integers or all booleans")
		}
		if err := v.check(); err != nil {
			return nil, err
		}
	}
	set := slices.SortedFunc(slices.Values(values), func(v, w Value) int {
		return cmp.Or(cmp.Compare(v.s, w.s), cmp.Compare(v.n, w.n))
	})
	return slices.CompactFunc(set, Value.Equal), nil
}

func (r oneOf) name() string               { return "one_of" }
func (r oneOf) takes() valueKind           { return r[0].kind }
func (r oneOf) allows(v Value) bool        { return slices.ContainsFunc(r, v.Equal) }
func (r oneOf) values() ([]Value, bool)    { return r, true }
func (r oneOf) covers(bound) bool          { return false } // d is not finite here
func (r oneOf) appendBody(b []byte) []byte { return appendValues(b, r) }
func (r oneOf) String() string             { return "one of " + listing(r) }

// notOneOf allows the values of its members' kind, except its members.
type notOneOf []Value

func newNotOneOf(values []Value) (bound, error) {
	set, err := newSet(values)
	if err == nil && len(set) == 0 {
		err = errors.New("at least one member is required")
	}
	return notOneOf(set), err
}

func (r notOneOf) name() string     { return "not_one_of" }
func (r notOneOf) takes() valueKind { return r[0].kind }
func (r notOneOf) allows(v Value) bool {
	return v.kind == r[0].kind && !slices.ContainsFunc(r, v.Equal)
}
func (r notOneOf) covers(d bound) bool {
	return d.takes() == r.takes() && !slices.ContainsFunc(r, d.allows)
}
func (r notOneOf) appendBody(b []byte) []byte { return appendValues(b, r) }
func (r notOneOf) String() string             { return "none of " + listing(r) }

// interval allows the integers from min to max. The ends of int64 mean that there is no limit.
type interval struct{ min, max int64 }

func newInterval(min, max int64) (bound, error) {
	if min > max {
		return nil, errors.New("min is greater than max")
	}
	return interval{min, max}, nil
}

func (r interval) name() string     { return "range" }
func (r interval) takes() valueKind { return intValue }
func (r interval) allows(v Value) bool {
	return v.kind == intValue && v.n >= r.min && v.n <= r.max
}
func (r interval) covers(d bound) bool {
	in, ok := d.(interval)
	any := r == interval{math.MinInt64, math.MaxInt64}
	return ok && in.min >= r.min && in.max <= r.max || any && d.takes() == intValue
}

// values lists a short range, so that a set can cover it.
func (r interval) values() (all []Value, ok bool) {
	if uint64(r.max)-uint64(r.min) >= MaxConstraintSet {
		return nil, false
	}
	for n := r.min; ; n++ {
		if all = append(all, Int(n)); n == r.max {
			return all, true
		}
	}
}

func (r interval) appendBody(b []byte) []byte {
	b = append(b, '{')
	if r.min != math.MinInt64 {
		b = strconv.AppendInt(append(b, `"min":`...), r.min, 10)
	}
	if r.max != math.MaxInt64 {
		if r.min != math.MinInt64 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(append(b, `"max":`...), r.max, 10)
	}
	return append(b, '}')
}

func (r interval) String() string {
	switch {
	case r.min == math.MinInt64 && r.max == math.MaxInt64:
		return "any integer"
	case r.min == math.MinInt64:
		return "at most " + strconv.FormatInt(r.max, 10)
	case r.max == math.MaxInt64:
		return "at least " + strconv.FormatInt(r.min, 10)
	}
	return fmt.Sprintf("from %d to %d", r.min, r.max)
}

// prefix allows the strings that begin with it.
type prefix string

func newPrefix(s string) (bound, error) {
	if s == "" {
		return nil, errors.New("an empty prefix would allow everything")
	}
	return prefix(s), String(s).check()
}

func (r prefix) name() string     { return "prefix" }
func (r prefix) takes() valueKind { return stringValue }
func (r prefix) lead() string     { return string(r) }
func (r prefix) allows(v Value) bool {
	return v.kind == stringValue && strings.HasPrefix(v.s, string(r))
}
func (r prefix) covers(d bound) bool {
	l, ok := d.(leading)
	return ok && strings.HasPrefix(l.lead(), string(r))
}
func (r prefix) appendBody(b []byte) []byte { return appendString(b, string(r)) }
func (r prefix) String() string             { return "begins with " + strconv.Quote(string(r)) }

// network allows the addresses and networks inside it, as netip prints them. It refuses IPv4 inside IPv6, and zones:
// callees disagree on their meaning.
type network netip.Prefix

func newNetwork(s string) (bound, error) {
	p, ok := parseNetwork(s)
	if !ok || !strings.Contains(s, "/") {
		return nil, errors.New("must be a network such as 10.0.0.0/8, canonical and without host bits")
	}
	return network(p), nil
}

func parseNetwork(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p, p.Masked().String() == s && !p.Addr().Is4In6()
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.String() != s || a.Is4In6() || a.Zone() != "" {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, a.BitLen()), true
}

func (r network) name() string     { return "cidr" }
func (r network) takes() valueKind { return stringValue }
func (r network) allows(v Value) bool {
	p, ok := parseNetwork(v.s)
	return v.kind == stringValue && ok && r.covers(network(p))
}
func (r network) covers(d bound) bool {
	in, ok := d.(network)
	outer, inner := netip.Prefix(r), netip.Prefix(in)
	return ok && outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}
func (r network) appendBody(b []byte) []byte { return appendString(b, netip.Prefix(r).String()) }
func (r network) String() string             { return "inside " + netip.Prefix(r).String() }

// subset allows the lists of its members, which are sorted, but not the empty list.
type subset []string

func newSubset(members []string) (bound, error) {
	set, err := newSet(stringValues(members))
	if err == nil && len(set) == 0 {
		err = errors.New("at least one member is required")
	}
	if err != nil {
		return nil, err
	}
	s := make(subset, len(set))
	for i, v := range set {
		s[i] = v.s
	}
	return s, nil
}

func (r subset) name() string     { return "subset" }
func (r subset) takes() valueKind { return listValue }
func (r subset) allows(v Value) bool {
	return len(v.list) > 0 && r.has(v.list)
}
func (r subset) covers(d bound) bool {
	in, ok := d.(subset)
	return ok && r.has(in)
}
func (r subset) has(list []string) bool {
	return !slices.ContainsFunc(list, func(s string) bool {
		_, found := slices.BinarySearch(r, s)
		return !found
	})
}
func (r subset) appendBody(b []byte) []byte { return List(r...).append(b) }
func (r subset) String() string             { return "a list of any of " + listing(stringValues(r)) }

// allOf allows the values that each of its parts allows.
type allOf []bound

// newAllOf returns no bound if a part is none: nothing is then allowed.
func newAllOf(parts []bound) (bound, error) {
	if len(parts) == 0 || len(parts) > MaxConstraintParts {
		return nil, fmt.Errorf("between 1 and %d parts are required", MaxConstraintParts)
	}
	for _, p := range parts {
		if _, nested := p.(allOf); nested {
			return nil, errors.New("all cannot contain all")
		}
		if p == nil {
			return nil, nil
		}
	}
	return allOf(parts), nil
}

func (r allOf) name() string     { return "all" }
func (r allOf) takes() valueKind { return r[0].takes() }
func (r allOf) allows(v Value) bool {
	return !slices.ContainsFunc(r, func(p bound) bool { return !p.allows(v) })
}
func (r allOf) covers(bound) bool { return false } // boundCovers checks its parts

// values has the values of a finite part that the other parts allow.
func (r allOf) values() ([]Value, bool) {
	for _, p := range r {
		f, ok := p.(finite)
		if !ok {
			continue
		}
		if values, ok := f.values(); ok {
			return slices.DeleteFunc(slices.Clone(values), func(v Value) bool { return !r.allows(v) }), true
		}
	}
	return nil, false
}

func (r allOf) appendBody(b []byte) []byte {
	b = append(b, '[')
	for i, p := range r {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendBound(b, p)
	}
	return append(b, ']')
}

func (r allOf) String() string {
	s := make([]string, len(r))
	for i, p := range r {
		s[i] = p.String()
	}
	return strings.Join(s, ", and ")
}
