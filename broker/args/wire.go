package args

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"unicode/utf8"
)

// maxConstraintRaw leaves room for white space, and for the escapes of encoding/json in a constraint that is part of a
// larger value.
const maxConstraintRaw = 6*MaxConstraint + 1<<10

// ParseConstraint reads the wire form of a [Constraint]. It refuses unknown and repeated members, null, and numbers
// that are not 64-bit integers. It refuses invalid UTF-8, text after the object, and anything beyond a limit.
// {"one_of":[]} is the zero Constraint.
func ParseConstraint(raw []byte) (Constraint, error) {
	if len(raw) > maxConstraintRaw {
		return Constraint{}, fmt.Errorf("constraint has more than %d bytes", MaxConstraint)
	}
	if !json.Valid(raw) || !utf8.Valid(raw) {
		return Constraint{}, errors.New("constraint is not valid JSON in UTF-8")
	}
	r, err := parseBound(raw)
	if err != nil {
		return Constraint{}, fmt.Errorf("constraint %w", err)
	}
	if r != nil && len(appendBound(nil, r)) > MaxConstraint {
		return Constraint{}, fmt.Errorf("constraint has more than %d bytes", MaxConstraint)
	}
	return Constraint{r}, nil
}

// UnmarshalJSON is [ParseConstraint].
func (c *Constraint) UnmarshalJSON(raw []byte) (err error) {
	*c, err = ParseConstraint(raw)
	return err
}

// MarshalJSON writes the canonical wire form: no white space, sorted sets without duplicates, no defaults.
// [ParseConstraint] reads it back as the same constraint.
func (c Constraint) MarshalJSON() ([]byte, error) {
	if c.bound == nil {
		return []byte(`{"one_of":[]}`), nil
	}
	return appendBound(nil, c.bound), nil
}

func appendBound(b []byte, r bound) []byte {
	b = append(appendString(append(b, '{'), r.name()), ':')
	return append(r.appendBody(b), '}')
}

func appendValues(b []byte, values []Value) []byte {
	b = append(b, '[')
	for i, v := range values {
		if i > 0 {
			b = append(b, ',')
		}
		b = v.append(b)
	}
	return append(b, ']')
}

// parseBound reads one object of valid JSON. A nil bound without an error allows nothing.
func parseBound(raw json.RawMessage) (r bound, err error) {
	count := 0
	err = readMembers(raw, func(name string, body json.RawMessage) error {
		if count++; count > 1 {
			return errors.New("must have exactly one member")
		}
		if r, err = parseBody(name, body); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	})
	if err == nil && count == 0 {
		err = errors.New("must have exactly one member")
	}
	return r, err
}

func parseBody(name string, body json.RawMessage) (bound, error) {
	switch name {
	case "exact":
		v, err := parseOne(body)
		if err != nil {
			return nil, err
		}
		return newExact(v)
	case "one_of":
		return boundFromEach(body, parseOne, newOneOf)
	case "not_one_of":
		return boundFromEach(body, parseOne, newNotOneOf)
	case "subset":
		return boundFromEach(body, parseText, newSubset)
	case "all":
		return boundFromEach(body, parseBound, newAllOf)
	case "range":
		return parseInterval(body)
	case "prefix":
		return boundFromText(body, newPrefix)
	case "glob":
		return boundFromText(body, newGlob)
	case "cidr":
		return boundFromText(body, newNetwork)
	case "subpath":
		return boundFromText(body, newSubpath)
	case "url":
		return parseLocation(body)
	case "shell":
		return parseShell(body)
	}
	return nil, errors.New("is not a kind of constraint; the kinds are exact, one_of, not_one_of, range, prefix, " +
		"glob, cidr, subset, subpath, url, shell and all")
}

func boundFromText(body json.RawMessage, build func(string) (bound, error)) (bound, error) {
	s, err := parseText(body)
	if err != nil {
		return nil, err
	}
	return build(s)
}

func boundFromEach[T any](
	body json.RawMessage, parse func(json.RawMessage) (T, error), build func([]T) (bound, error),
) (bound, error) {
	list, err := readElements(body, parse)
	if err != nil {
		return nil, err
	}
	return build(list)
}

func parseInterval(body json.RawMessage) (bound, error) {
	r := interval{math.MinInt64, math.MaxInt64}
	err := readMembers(body, func(name string, raw json.RawMessage) (err error) {
		switch name {
		case "min":
			r.min, err = parseInteger(raw)
		case "max":
			r.max, err = parseInteger(raw)
		default:
			err = errors.New("has only the members min and max")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return newInterval(r.min, r.max)
}

func parseLocation(body json.RawMessage) (bound, error) {
	var l location
	err := readMembers(body, func(name string, raw json.RawMessage) (err error) {
		switch name {
		case "scheme":
			l.scheme, err = parseText(raw)
		case "host":
			l.host, err = parseText(raw)
		case "path":
			l.path, err = parseText(raw)
		case "port":
			var n int64
			if n, err = parseInteger(raw); err == nil && (n < 1 || n > math.MaxUint16) {
				err = errors.New("port must be between 1 and 65535")
			}
			l.port = uint16(n)
		default:
			err = errors.New("has only the members scheme, host, port and path")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return newLocation(l)
}

func parseShell(body json.RawMessage) (bound, error) {
	var command [][]string
	var words []string
	err := readMembers(body, func(name string, raw json.RawMessage) (err error) {
		switch name {
		case "command":
			command, err = readElements(raw, parseChoices)
		case "words":
			words, err = readElements(raw, parseText)
		default:
			err = errors.New("has only the members command and words")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return newShell(command, words)
}

// parseChoices reads a word or a list of words.
func parseChoices(raw json.RawMessage) ([]string, error) {
	if raw[0] == '[' {
		return readElements(raw, parseText)
	}
	s, err := parseText(raw)
	return []string{s}, err
}

// readMembers calls do with each member of one object of valid JSON. It refuses a duplicate name.
func readMembers(raw json.RawMessage, do func(name string, value json.RawMessage) error) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return errors.New("must be a JSON object")
	}
	var seen []string
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return errors.New("is not valid JSON")
		}
		name, ok := t.(string)
		if !ok || slices.Contains(seen, name) || len(seen) == 8 {
			return errors.New("has a duplicate member, or too many members")
		}
		seen = append(seen, name)
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return errors.New("is not valid JSON")
		}
		if err := do(name, value); err != nil {
			return err
		}
	}
	return nil
}

// readElements reads a list of at most [MaxConstraintSet] elements.
func readElements[T any](raw json.RawMessage, parse func(json.RawMessage) (T, error)) ([]T, error) {
	var elements []json.RawMessage
	if raw[0] != '[' || json.Unmarshal(raw, &elements) != nil {
		return nil, errors.New("must be a list")
	}
	if len(elements) > MaxConstraintSet {
		return nil, fmt.Errorf("more than %d elements", MaxConstraintSet)
	}
	list := make([]T, len(elements))
	for i, e := range elements {
		var err error
		if list[i], err = parse(e); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// parseOne reads one value in the form of a step's argument.
func parseOne(raw json.RawMessage) (Value, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	v, err := parseValue(dec)
	if err != nil {
		return Value{}, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return Value{}, errors.New("there is text after the value")
	}
	return v, nil
}

func parseText(raw json.RawMessage) (string, error) {
	v, err := parseOne(raw)
	if err == nil && v.kind != stringValue {
		err = errors.New("must be a string")
	}
	return v.s, err
}

func parseInteger(raw json.RawMessage) (int64, error) {
	v, err := parseOne(raw)
	if err == nil && v.kind != intValue {
		err = errors.New("must be an integer")
	}
	return v.n, err
}
