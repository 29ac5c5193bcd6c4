package wire

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/plugins/vault"
)

// The abilities of a backend that this package uses, found by type assertion, besides those of package
// broker such as [broker.Severer]. introspect.go declares those of a backend that signs tokens.
type (
	// accessReporter gives the Vault path at which a tool's secrets are minted: by a write or by a read,
	// and with a lease or without one.
	accessReporter interface {
		Access(broker.Tool) (path broker.VaultPath, write, leased bool)
	}
	// wrapReporter reports whether a tool's mint requests a wrapped answer.
	wrapReporter interface {
		Wraps(broker.Tool) bool
	}
)

// backends makes the configured backends.
func backends(o opener, configured map[string]Backend) (map[string]broker.Backend, error) {
	made := map[string]broker.Backend{}
	for name, c := range configured {
		p, ok := pluginNamed(c.Plugin)
		if !ok {
			return nil, fmt.Errorf("backends.%s: plugin %q is not in this build", name, c.Plugin)
		}
		b, err := p.open(o, name, c)
		if err != nil {
			return nil, fmt.Errorf("backends.%s: %w", name, err)
		}
		made[name] = b
	}
	return made, nil
}

// offline makes the configured backends for checking tools alone. They reach no Vault and no target.
// done closes them.
func offline(configured map[string]Backend) (made map[string]broker.Backend, done func(), err error) {
	var closing []func()
	done = func() {
		for _, f := range slices.Backward(closing) {
			f()
		}
	}
	o := opener{checking: true, onClose: func(f func()) { closing = append(closing, f) },
		active: func(context.Context, broker.GrantID) (bool, error) { return false, errOnlyChecks },
		sign:   func(string, []byte) ([]byte, error) { return nil, errOnlyChecks }}
	if made, err = backends(o, configured); err != nil {
		done()
		return nil, nil, err
	}
	return made, done, nil
}

// errOnlyChecks is the answer of a backend that only checks tools.
var errOnlyChecks = errors.New("this backend only checks tools")

// checkTools calls Load of each tool's backend and joins the errors.
func checkTools(tools []broker.Tool, backends map[string]broker.Backend) error {
	var wrong []error
	for _, t := range tools {
		b, ok := backends[t.Backend]
		if !ok {
			wrong = append(wrong, fmt.Errorf("tool %q names backend %q, which is not configured", t.Name, t.Backend))
			continue
		}
		if err := b.Load(t); err != nil {
			wrong = append(wrong, fmt.Errorf("tool %q: %w", t.Name, err))
		}
	}
	return errors.Join(wrong...)
}

// Access gives the Vault policy and the mint path of each tool, for setting Vault up. A canary gets none:
// a right in Vault that no caller may use is one too many.
func Access(tools []broker.Tool, backends map[string]Backend) (list []vault.Access) {
	for _, t := range tools {
		p, _ := pluginNamed(backends[t.Backend].Plugin)
		b, ok := p.bare.(accessReporter)
		if t.Canary || !ok {
			continue
		}
		path, write, leased := b.Access(t)
		w, ok := p.bare.(wrapReporter)
		list = append(list, vault.Access{Tool: t.Name, Policy: t.Policy, Path: path, Write: write, Leased: leased, Wrap: ok && w.Wraps(t)})
	}
	return list
}

// Reads gives the Vault paths that the broker's own token reads for its backends, each once: to prove
// secrets dead, and to get the broker's own database logins.
func Reads(tools []broker.Tool, backends map[string]Backend) (reads []vault.ReadAccess, err error) {
	seen := map[vault.ReadAccess]bool{}
	for _, t := range tools {
		c := backends[t.Backend]
		p, _ := pluginNamed(c.Plugin)
		if p.reads == nil {
			continue
		}
		more, err := p.reads(t, c)
		if err != nil {
			return nil, fmt.Errorf("tool %q: %w", t.Name, err)
		}
		for _, r := range more {
			if !seen[r] {
				seen[r] = true
				reads = append(reads, r)
			}
		}
	}
	return reads, nil
}

// Writes gives the writes that the tools' plugins need in Vault, besides the plan of
// [vault.SetupConfig]. A canary gets none, as in [Access].
func Writes(tools []broker.Tool, backends map[string]Backend) (writes []vault.Write, err error) {
	for _, t := range tools {
		p, _ := pluginNamed(backends[t.Backend].Plugin)
		if p.writes == nil || t.Canary {
			continue
		}
		more, err := p.writes(t)
		if err != nil {
			return nil, fmt.Errorf("tool %q: %w", t.Name, err)
		}
		writes = append(writes, more...)
	}
	return writes, nil
}

// Survey checks with the broker's rights in Vault whether the tools' secrets can be proven dead, once for each mount.
// found describes the mounts. The error has every fault.
func Survey(ctx context.Context, v *vault.Client, tools []broker.Tool, backends map[string]Backend) (found []string, err error) {
	var faults []error
	done := map[string]bool{}
	for _, t := range tools {
		p, _ := pluginNamed(backends[t.Backend].Plugin)
		if p.survey == nil || t.Canary {
			continue
		}
		mount := t.Path.Segments()[0]
		if done[p.name+" "+mount] {
			continue
		}
		done[p.name+" "+mount] = true
		text, err := p.survey(ctx, v, mount)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		found = append(found, text)
	}
	return found, errors.Join(faults...)
}

// Examine checks what can be wrong outside the backend called name: in Vault and at the target. It may make logins of the
// broker's own, which end with v's login. found is empty where there is nothing to check.
func Examine(
	ctx context.Context, v *vault.Client, name string, c Backend, tools []broker.Tool,
) (found string, err error) {
	p, _ := pluginNamed(c.Plugin)
	if p.examine == nil {
		return "", nil
	}
	var own []broker.Tool
	for _, t := range tools {
		if t.Backend == name && !t.Canary {
			own = append(own, t)
		}
	}
	return p.examine(ctx, v, c, own)
}

// Reach checks, without a credential, that the target of a validated configuration is there. found
// describes it.
func Reach(ctx context.Context, c Backend) (found string, err error) {
	if p, _ := pluginNamed(c.Plugin); p.reach != nil {
		return p.reach(ctx, c)
	}
	return inVault, nil
}

// leaseLister lists the leases below the paths at which tools mint.
type leaseLister struct {
	*vault.Client
	policy   *policy.Running
	backends map[string]broker.Backend
}

// Leases implements [broker.LeaseLister].
func (l leaseLister) Leases(ctx context.Context, tools []broker.Tool) (ids []string, err error) {
	if tools == nil {
		tools = l.policy.Current().Tools()
	}
	return listLeases(ctx, l.Client.Leases, mintPaths(tools, l.backends))
}

// mintPaths gives the paths at which tools get leases, each once.
func mintPaths(tools []broker.Tool, backends map[string]broker.Backend) (paths []broker.VaultPath) {
	seen := map[broker.VaultPath]bool{}
	for _, t := range tools {
		b, ok := backends[t.Backend].(accessReporter)
		if !ok || len(t.Path.Segments()) < 2 {
			continue
		}
		if path, _, leased := b.Access(t); leased && !seen[path] {
			seen[path] = true
			paths = append(paths, path)
		}
	}
	return paths
}

// listLeases lists below each path. A path that may not be listed leaves out no other: it may be that of
// a tool of an earlier bundle.
func listLeases(
	ctx context.Context, list func(context.Context, broker.VaultPath) ([]string, error), paths []broker.VaultPath,
) (all []string, err error) {
	var errs []error
	for _, path := range paths {
		found, err := list(ctx, path)
		all, errs = append(all, found...), append(errs, err)
	}
	return all, errors.Join(errs...)
}
