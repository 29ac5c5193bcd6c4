package token

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// settings are the parsed settings of a tool.
type settings struct {
	fixed []string
	by    map[string]map[string][]string // argument → value → policies
	uses  int
	wrap  bool

	outlives time.Duration // everything obtained with the token has ended this long after the token's end
}

const maxPolicies = 32

// Load implements [broker.Backend]. The tool's Path is auth, token, create and a Vault token role: see [Role].
// Settings:
//
//	policies                      the policies of every token, joined by commas
//	policies.<argument>.<value>   the policies that this value of the argument adds
//	uses                          the number of uses of the token, 1 to 1,000; default unlimited until it expires
//	wrap                          false delivers the token itself; default true: Vault wraps it
//	outlives                      the time, of at most 24h, after which everything has ended that the policies let a token
//	                              obtain from Vault, such as leases that Vault cannot revoke, certificates without a lease
//	                              and orphan tokens; until then the token is not dead. Default: these are not counted
//
// A wrapped token is delivered as its wrapping token, which unwraps it once, within the step's lifetime, and does
// nothing else. A copy of the wrapping token, in a log or at a proxy, is useless once it was used. If the copy is used
// first, the tool fails to unwrap its token, and so detects the theft. A tool that cannot unwrap sets wrap: "false".
//
// An argument selects among the values in the settings and does not reach Vault in any other way. So every argument
// must be required, a string, and have at least one value. A token never gets the policy default or one of Pawl's own.
func (b *Backend) Load(t broker.Tool) error {
	_, err := load(t)
	return err
}

func load(t broker.Tool) (settings, error) {
	s := settings{by: map[string]map[string][]string{}, wrap: true}
	if path := t.Path.Segments(); len(path) != 4 || !slices.Equal(path[:3], []string{"auth", "token", "create"}) {
		return s, fmt.Errorf("tool %q: the path must be auth, token, create and a token role", t.Name)
	}
	for _, key := range slices.Sorted(maps.Keys(t.Settings)) {
		if err := s.set(t, key, t.Settings[key]); err != nil {
			return s, fmt.Errorf("tool %q: setting %.80q: %w", t.Name, key, err)
		}
	}
	var err error
	if s.outlives, err = t.Outlives(); err != nil {
		return s, fmt.Errorf("tool %q: setting \"outlives\": %w", t.Name, err)
	}
	for _, name := range slices.Sorted(maps.Keys(t.Arguments)) {
		if len(s.by[name]) == 0 {
			return s, fmt.Errorf("tool %q: argument %q selects no policies: it would not change the token", t.Name, name)
		}
	}
	if len(s.fixed) == 0 && len(s.by) == 0 {
		return s, fmt.Errorf("tool %q: policies are required: a token without any can do nothing", t.Name)
	}
	return s, nil
}

func (s *settings) set(t broker.Tool, key, value string) (err error) {
	if key == "outlives" {
		return nil // load reads it
	}
	if key == "uses" {
		if s.uses, err = strconv.Atoi(value); err != nil || s.uses < 1 || s.uses > 1000 || strconv.Itoa(s.uses) != value {
			return errors.New("must be a number from 1 to 1,000")
		}
		return nil
	}
	if key == "wrap" {
		if s.wrap = value == "true"; !s.wrap && value != "false" {
			return errors.New("must be true or false")
		}
		return nil
	}
	policies, err := parse(value)
	if err != nil {
		return err
	}
	if key == "policies" {
		s.fixed = policies
		return nil
	}
	rest, ok := strings.CutPrefix(key, "policies.")
	name, choice, found := strings.Cut(rest, ".")
	if !ok || !found {
		return errors.New("unknown setting")
	}
	if p, ok := t.Arguments[name]; !ok || !p.Required || p.Kind != "string" {
		return fmt.Errorf("the tool has no required argument %q that is a string", name)
	}
	if s.by[name] == nil {
		s.by[name] = map[string][]string{}
	}
	s.by[name][choice] = policies
	return nil
}

// parse reads policies joined by commas. It rejects Pawl's own policies: they can mint other tools' secrets.
func parse(value string) ([]string, error) {
	list := strings.Split(value, ",")
	for _, p := range list {
		unchanged := broker.CheckVaultName(p) == nil && strings.ToLower(p) == p // else Vault stores another name
		if !unchanged || p == "root" || p == "default" || strings.HasPrefix(p, "pawl-") {
			return nil, fmt.Errorf("policy %.40q: must be lower-case letters, digits, '.', '-' and '_', "+
				"and not root, default or one of Pawl's own", p)
		}
	}
	return list, nil
}

// policies returns the fixed policies and those that the arguments select, sorted.
func (s settings) policies(args args.Args) ([]string, error) {
	list := slices.Clone(s.fixed)
	for name, choices := range s.by {
		v, _ := args.Get(name)
		text, ok := v.Text()
		chosen, known := choices[text]
		if !ok || !known {
			return nil, fmt.Errorf("argument %q has a value that the tool does not declare", name)
		}
		list = append(list, chosen...)
	}
	slices.Sort(list)
	if list = slices.Compact(list); len(list) > maxPolicies {
		return nil, fmt.Errorf("the arguments select more than %d policies", maxPolicies)
	}
	return list, nil
}

// Role returns the token role that Vault needs for a tool, as a path and the body of a write to it. With this role no
// token can have a policy that the tool's settings do not name.
func Role(t broker.Tool) (path broker.VaultPath, data map[string]any, err error) {
	s, err := load(t)
	if err != nil {
		return broker.VaultPath{}, nil, err
	}
	if path, err = broker.VaultPathOf("auth", "token", "roles", t.Path.Segments()[3]); err != nil {
		return broker.VaultPath{}, nil, err
	}
	list := slices.Clone(s.fixed)
	for _, choices := range s.by {
		for _, policies := range choices {
			list = append(list, policies...)
		}
	}
	slices.Sort(list)
	return path, map[string]any{
		"allowed_policies": slices.Compact(list), "orphan": false, "renewable": false,
		"token_no_default_policy": true, "token_type": "service",
	}, nil
}
