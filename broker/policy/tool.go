package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/yaml"
)

// toolDecl is a tool in the form of a payload.
type toolDecl struct {
	Name      string               `json:"name"`
	Backend   string               `json:"backend"`
	Narrowing string               `json:"narrowing"`
	TTL       string               `json:"ttl,omitempty"`
	Arguments map[string]paramDecl `json:"arguments,omitempty"`
	Vault     vaultDecl            `json:"vault"`
	Settings  map[string]string    `json:"settings,omitempty"`
	Canary    bool                 `json:"canary,omitempty"`
	StepToken bool                 `json:"step_token,omitempty"`
}

type paramDecl struct {
	Kind       string           `json:"kind"`
	Required   bool             `json:"required,omitempty"`
	Constraint *args.Constraint `json:"constraint,omitempty"`
}

type vaultDecl struct {
	Policy string `json:"policy"`
	Path   string `json:"path"`
}

// toolYAML is a tool in the form of tools.yaml.
type toolYAML struct {
	Name      string               `yaml:"name"`
	Backend   string               `yaml:"backend"`
	Narrowing string               `yaml:"narrowing"`
	TTL       string               `yaml:"ttl"`
	Arguments map[string]paramYAML `yaml:"arguments"`
	Vault     struct {
		Policy string `yaml:"policy"`
		Path   string `yaml:"path"`
	} `yaml:"vault"`
	Settings  map[string]string `yaml:"settings"`
	Canary    bool              `yaml:"canary"`
	StepToken bool              `yaml:"step_token"`
}

type paramYAML struct {
	Kind       string `yaml:"kind"`
	Required   bool   `yaml:"required"`
	Constraint any    `yaml:"constraint"`
}

// decl converts a tool to the payload's form.
func (y toolYAML) decl() (toolDecl, error) {
	d := toolDecl{Name: y.Name, Backend: y.Backend, Narrowing: y.Narrowing, TTL: y.TTL,
		Vault: vaultDecl(y.Vault), Settings: y.Settings, Canary: y.Canary, StepToken: y.StepToken}
	if ttl, err := time.ParseDuration(y.TTL); err == nil {
		d.TTL = ttl.String() // one spelling; tool refuses text that does not parse
	}
	for name, p := range y.Arguments {
		decl := paramDecl{Kind: p.Kind, Required: p.Required}
		if p.Constraint != nil {
			raw, err := yaml.AsJSON(p.Constraint)
			if err != nil {
				return d, fmt.Errorf("argument %q: constraint %w", name, err)
			}
			c, err := args.ParseConstraint(raw)
			if err != nil {
				return d, fmt.Errorf("argument %q: %w", name, err)
			}
			decl.Constraint = &c
		}
		if d.Arguments == nil {
			d.Arguments = make(map[string]paramDecl, len(y.Arguments))
		}
		d.Arguments[name] = decl
	}
	return d, nil
}

// tool checks the declaration and converts it to the broker's form.
func (d toolDecl) tool() (t broker.Tool, err error) {
	if t.Name, err = broker.ParseToolName(d.Name); err != nil {
		return t, err
	}
	if _, err := broker.ParseToolName(d.Backend); err != nil {
		return t, fmt.Errorf("backend %.60q is not a name", d.Backend)
	}
	t.Backend, t.Canary, t.StepToken = d.Backend, d.Canary, d.StepToken
	if t.Narrowing, err = broker.ParseNarrowing(d.Narrowing); err != nil {
		return t, err
	}
	if d.TTL != "" {
		if t.TTL, err = parseTTL(d.TTL); err != nil {
			return t, err
		}
	}
	if t.Arguments, err = parameters(d.Arguments); err != nil {
		return t, err
	}
	if err := broker.CheckVaultName(d.Vault.Policy); err != nil {
		return t, fmt.Errorf("vault.policy: %w", err)
	}
	if t.Path, err = broker.ParseVaultPath(d.Vault.Path); err != nil {
		return t, fmt.Errorf("vault.path: %w", err)
	}
	if len(t.Path.Segments()) < 2 {
		return t, fmt.Errorf("vault.path %.60q must have at least two segments: a mount and a role", d.Vault.Path)
	}
	t.Policy, t.Settings = d.Vault.Policy, maps.Clone(d.Settings)
	return t, nil
}

func parameters(decls map[string]paramDecl) (map[string]broker.Parameter, error) {
	if len(decls) > args.MaxCount {
		return nil, fmt.Errorf("more than %d arguments", args.MaxCount)
	}
	params := make(map[string]broker.Parameter, len(decls))
	for _, name := range slices.Sorted(maps.Keys(decls)) {
		d := decls[name]
		if _, err := args.New(map[string]args.Value{name: {}}); err != nil {
			return nil, fmt.Errorf("argument %.70q: %w", name, err)
		}
		if !slices.Contains([]string{"string", "integer", "boolean", "list"}, d.Kind) {
			return nil, fmt.Errorf("argument %q: kind %.20q is not string, integer, boolean or list", name, d.Kind)
		}
		params[name] = broker.Parameter(d)
	}
	return params, nil
}

// parseTTL parses the lifetime of a secret: whole seconds up to [broker.MaxTTL].
func parseTTL(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 || d > broker.MaxTTL || d%time.Second != 0 {
		return 0, fmt.Errorf("ttl %.20q is not a whole number of seconds up to %v", s, broker.MaxTTL)
	}
	return d, nil
}

// plainName accepts the name of a policy file, or the id of a policy with its joints replaced.
func plainName(s string) bool {
	return len(s) > 0 && len(s) <= 128 && strings.Trim(s, ".") != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	}) < 0
}

func all[T any](s []T, f func(T) bool) bool {
	return !slices.ContainsFunc(s, func(v T) bool { return !f(v) })
}
