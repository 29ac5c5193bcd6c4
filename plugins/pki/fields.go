package pki

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// field is the source of a certificate field's value: an argument or, if arg is empty, a fixed value.
type field struct{ arg, fixed string }

type fields map[string]field

// checks holds the fields that carry names, each with the check that its names must pass.
var checks = map[string]func(string) error{
	"common_name": checkDNS, "alt_names": checkDNS, "uri_sans": checkURI, "ip_sans": checkIP,
}

func load(t broker.Tool) (fields, error) {
	if len(t.Path.Segments()) != 2 {
		return nil, fmt.Errorf("tool %q: the path must be a mount and a role", t.Name)
	}
	f := fields{}
	for _, key := range slices.Sorted(maps.Keys(t.Settings)) {
		if err := f.set(t, key, t.Settings[key]); err != nil {
			return nil, fmt.Errorf("tool %q: setting %q: %w", t.Name, key, err)
		}
	}
	for name := range t.Arguments {
		if t.Settings["arg."+name] == "" {
			return nil, fmt.Errorf("tool %q: argument %q fills no field: set arg.%s", t.Name, name, name)
		}
	}
	if f.asked() && strings.HasPrefix(f["peers"].fixed, "resume-unlisted") {
		return nil, fmt.Errorf("tool %q: with revocation ocsp its servers check no list: peers cannot be resume-unlisted", t.Name)
	}
	for name := range f {
		if checks[name] != nil {
			return f, nil
		}
	}
	return nil, fmt.Errorf("tool %q: a certificate needs a name", t.Name)
}

// asked reports whether the tool's servers ask the OCSP responder.
func (f fields) asked() bool { return f["revocation"].fixed == "ocsp" }

func (f fields) set(t broker.Tool, key, value string) error {
	name, isArg := strings.CutPrefix(key, "arg.")
	if !isArg {
		return f.fix(key, value)
	}
	p, declared := t.Arguments[name]
	if !declared || !p.Required || p.Kind != "string" && p.Kind != "list" {
		return fmt.Errorf("the tool has no required argument %q that is a string or a list", name)
	}
	for target := range strings.SplitSeq(value, ",") {
		_, known := checks[target]
		switch {
		case !known:
			return fmt.Errorf("unknown field %.40q", target)
		case f[target] != (field{}):
			return fmt.Errorf("field %q has two sources", target)
		case target == "common_name" && p.Kind != "string":
			return errors.New("a list cannot fill common_name")
		}
		f[target] = field{arg: name}
	}
	return nil
}

func (f fields) fix(key, value string) error {
	if key == "usage" {
		if usages[value] == nil || value == "" {
			return errors.New("must be client, server or both")
		}
		f[key] = field{fixed: value}
		return nil
	}
	if key == "revocation" {
		if value != "list" && value != "ocsp" {
			return errors.New("must be list or ocsp")
		}
		f[key] = field{fixed: value}
		return nil
	}
	if key == "peers" {
		if _, err := parsePeers(value); err != nil {
			return err
		}
		f[key] = field{fixed: value}
		return nil
	}
	check, known := checks[key]
	switch {
	case !known:
		return errors.New("unknown setting")
	case f[key] != (field{}):
		return errors.New("the field has two sources")
	}
	for v := range strings.SplitSeq(value, ",") {
		if err := check(v); err != nil {
			return fmt.Errorf("%.60q %w", v, err)
		}
	}
	if key == "common_name" && strings.Contains(value, ",") {
		return errors.New("only one common name is allowed")
	}
	f[key] = field{fixed: value}
	return nil
}

// values returns the checked values of a field for one step.
func (f fields) values(name string, args args.Args) ([]string, error) {
	src, ok := f[name]
	if !ok {
		return nil, nil
	}
	if src.arg == "" {
		return strings.Split(src.fixed, ","), nil
	}
	v, given := args.Get(src.arg)
	list, isList := v.Strings()
	if s, isText := v.Text(); isText {
		list, isList = []string{s}, true
	}
	if !given || !isList || len(list) == 0 {
		return nil, fmt.Errorf("argument %q is needed", src.arg)
	}
	for _, s := range list {
		if err := checks[name](s); err != nil {
			return nil, fmt.Errorf("argument %q: %w", src.arg, err)
		}
	}
	return list, nil
}

func (f fields) names(args args.Args) (n names, err error) {
	common, err := f.values("common_name", args)
	if err != nil {
		return names{}, err
	}
	n.common = strings.Join(common, "")
	if n.dns, err = f.values("alt_names", args); err != nil {
		return names{}, err
	}
	if n.uris, err = f.values("uri_sans", args); err != nil {
		return names{}, err
	}
	n.ips, err = f.values("ip_sans", args)
	return n, err
}
