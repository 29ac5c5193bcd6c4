package jwt

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// settings hold the sources of audience and scope: an argument or a fixed value each.
type settings struct {
	audience, scope source
	outlives        time.Duration // sessions and tokens of the service end this long after the token
}

type source struct{ arg, fixed string }

// Load implements [broker.Backend]. The tool's Path is a transit mount and a key of type ecdsa-p256. Settings:
//
//	audience, scope   a fixed value
//	arg.<argument>    "audience" or "scope": the argument fills it
//	outlives          the time, of at most 24h, after which the service has ended every session and token that it gave for
//	                  an expired token; until then it is not dead. Default: these are not counted
//
// A token has exactly one audience. Every argument is part of the digest in the token.
func (b *Backend) Load(t broker.Tool) error {
	_, err := load(t)
	return err
}

func load(t broker.Tool) (s settings, err error) {
	if len(t.Path.Segments()) != 2 {
		return s, fmt.Errorf("tool %q: the path must be a mount and a key", t.Name)
	}
	for _, key := range slices.Sorted(maps.Keys(t.Settings)) {
		if err := s.set(t, key, t.Settings[key]); err != nil {
			return s, fmt.Errorf("tool %q: setting %q: %w", t.Name, key, err)
		}
	}
	if s.outlives, err = t.Outlives(); err != nil {
		return s, fmt.Errorf("tool %q: setting \"outlives\": %w", t.Name, err)
	}
	if s.audience == (source{}) {
		return s, fmt.Errorf("tool %q: an audience is required: without one every service would accept the token", t.Name)
	}
	return s, nil
}

func (s *settings) set(t broker.Tool, key, value string) error {
	if key == "outlives" {
		return nil // load reads it
	}
	name, isArg := strings.CutPrefix(key, "arg.")
	field, src := key, source{fixed: value}
	if isArg {
		field, src = value, source{arg: name}
		if p, ok := t.Arguments[name]; !ok || !p.Required || p.Kind != "string" && (p.Kind != "list" || field != "scope") {
			return fmt.Errorf("the tool has no required argument %q that is a string", name)
		}
	}
	var into *source
	switch field {
	case "audience":
		into = &s.audience
	case "scope":
		into = &s.scope
	default:
		return errors.New("unknown setting or claim")
	}
	if *into != (source{}) {
		return errors.New("the claim has two sources")
	}
	*into = src
	if isArg {
		return nil
	}
	return check(field, value)
}

// check rejects a value that would be several audiences or a malformed list of scopes.
func check(field, s string) error {
	if s == "" || len(s) > 1024 {
		return errors.New("must have between 1 and 1,024 bytes")
	}
	for i := 0; i < len(s); i++ {
		blank := s[i] == ' ' && field == "scope" && i > 0 && i < len(s)-1 && s[i-1] != ' '
		if s[i] <= ' ' && !blank || s[i] >= 0x7f || strings.IndexByte(`"\{}`, s[i]) >= 0 {
			return errors.New("contains a character that is not allowed in audiences and RFC 6749 scopes")
		}
	}
	return nil
}

func (src source) values(args args.Args) ([]string, error) {
	if src.arg == "" {
		return []string{src.fixed}, nil
	}
	v, _ := args.Get(src.arg)
	if list, ok := v.Strings(); ok && len(list) > 0 {
		return list, nil
	}
	if s, ok := v.Text(); ok && s != "" {
		return []string{s}, nil
	}
	return nil, fmt.Errorf("argument %q is required", src.arg)
}

// claims returns the claims that the settings and the arguments determine.
func (s settings) claims(g broker.Grant) (c claims, err error) {
	audience, err := s.audience.values(g.Args)
	if err != nil {
		return c, err
	}
	if len(audience) != 1 || check("audience", audience[0]) != nil {
		return c, errors.New("the audience must be one name")
	}
	c.Audience = audience[0]
	if s.scope == (source{}) {
		return c, nil
	}
	scope, err := s.scope.values(g.Args)
	if err != nil {
		return c, err
	}
	for _, one := range scope {
		// Each element of an argument is one scope. Only a fixed value may list several.
		if check("scope", one) != nil || s.scope.arg != "" && strings.Contains(one, " ") {
			return c, errors.New("a scope must be one name")
		}
	}
	c.Scope = strings.Join(scope, " ")
	return c, nil
}
