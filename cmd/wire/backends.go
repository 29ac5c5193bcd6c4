package wire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/plugins/exec"
	"github.com/pawlsec/pawl/plugins/jwt"
	"github.com/pawlsec/pawl/plugins/kv"
	"github.com/pawlsec/pawl/plugins/pki"
	"github.com/pawlsec/pawl/plugins/postgres"
	"github.com/pawlsec/pawl/plugins/ssh"
	"github.com/pawlsec/pawl/plugins/token"
	"github.com/pawlsec/pawl/plugins/vault"
)

// backends makes the configured targets.
func (s *Server) backends(configured map[string]Backend, log *slog.Logger) (map[string]broker.Backend, error) {
	made := map[string]broker.Backend{}
	for name, c := range configured {
		b, err := s.backend(name, c, log)
		if err != nil {
			return nil, fmt.Errorf("backends.%s: %w", name, err)
		}
		made[name] = b
	}
	return made, nil
}

func (s *Server) backend(name string, c Backend, log *slog.Logger) (broker.Backend, error) {
	switch c.Plugin {
	case "kv":
		return kv.New(kv.Config{}), nil
	case "pki":
		return pki.New(pki.Config{Vault: s.Vault})
	case "ssh":
		return ssh.New(ssh.Config{KRL: c.KRL})
	case "jwt":
		return jwt.New(jwt.Config{Vault: s.Vault, Issuer: c.Issuer, Active: s.active, StatusURI: c.StatusURI, Sign: s.sign})
	case "token":
		return token.New(token.Config{Vault: s.Vault})
	case "exec":
		return exec.New(exec.Config{Name: name, Program: *c.Program.program(), Probe: c.Probe.program(), Timeout: c.Timeout})
	case "postgres":
		b, err := postgres.New(postgres.Config{DSN: c.DSN, Credentials: serviceLogins{s.Vault, c}, Log: log})
		if err == nil {
			s.later(b.Close)
		}
		return b, err
	}
	return nil, fmt.Errorf("plugin %q is not in this build", c.Plugin)
}

func (p *Program) program() *exec.Program {
	if p == nil {
		return nil
	}
	return &exec.Program{Path: p.Path, SHA256: p.SHA256, Args: p.Args, Env: p.Env}
}

// serviceLogins fetches the broker's own database logins from Vault, with its own token.
type serviceLogins struct {
	vault *vault.Client
	c     Backend
}

// Credential implements [postgres.Credentials].
func (l serviceLogins) Credential(ctx context.Context, p postgres.Purpose) (username, password string, expires time.Time, err error) {
	role := cmp.Or(l.c.Shaper, "pawl-shaper")
	if p == postgres.Revoker {
		role = cmp.Or(l.c.Revoker, "pawl-revoker")
	}
	asked := time.Now()
	data, err := l.vault.Read(ctx, []string{cmp.Or(l.c.Mount, "database"), "creds", role})
	if err != nil {
		return "", "", time.Time{}, err
	}
	username, _ = data["username"].(string)
	password, _ = data["password"].(string)
	if username == "" || password == "" {
		return "", "", time.Time{}, errors.New("vault gave no database login")
	}
	return username, password, asked.Add(cmp.Or(l.c.ServiceTTL, 4*time.Hour)), nil
}

// checkTools has each backend check the tools that name it.
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

// offline makes the configured targets for checking tools alone: they reach no Vault and nothing
// else. done gives them back.
func offline(configured map[string]Backend) (made map[string]broker.Backend, done func(), err error) {
	s := &Server{}
	made = map[string]broker.Backend{}
	for name, c := range configured {
		c.KRL = "" // a running broker may hold it
		if c.Plugin == "postgres" {
			b, err := postgres.New(postgres.Config{DSN: c.DSN, Credentials: noLogins{}})
			if err != nil {
				s.Close()
				return nil, nil, fmt.Errorf("backends.%s: %w", name, err)
			}
			s.later(b.Close)
			made[name] = b
		} else if made[name], err = s.backend(name, c, nil); err != nil {
			s.Close()
			return nil, nil, fmt.Errorf("backends.%s: %w", name, err)
		}
	}
	return made, s.Close, nil
}

// noLogins keeps a backend that only checks from connecting.
type noLogins struct{}

// Credential implements [postgres.Credentials].
func (noLogins) Credential(context.Context, postgres.Purpose) (username, password string, expires time.Time, err error) {
	return "", "", time.Time{}, errors.New("only checking")
}

// minting is what a backend says about the Vault path of a tool's mint.
type minting interface {
	Access(broker.Tool) (path []string, write, leased bool)
}

// wrapping is what a backend says whose tools may have their mint wrapped.
type wrapping interface {
	Wraps(broker.Tool) bool
}

// Access gives the Vault policy and mint path of each tool, for setting Vault up.
func Access(tools []broker.Tool, backends map[string]Backend) (list []vault.Access) {
	for _, t := range tools {
		if t.Canary {
			continue // a right in Vault that nobody may use is one too many
		}
		var m minting
		switch backends[t.Backend].Plugin {
		case "kv":
			m = &kv.Backend{}
		case "pki":
			m = &pki.Backend{}
		case "ssh":
			m = &ssh.Backend{}
		case "jwt":
			m = &jwt.Backend{}
		case "token":
			m = &token.Backend{}
		case "exec":
			m = &exec.Backend{}
		case "postgres":
			m = &postgres.Backend{}
		default:
			continue
		}
		path, write, leased := m.Access(t)
		w, ok := m.(wrapping)
		list = append(list, vault.Access{Policy: t.Policy, Path: path, Write: write, Leased: leased, Wrap: ok && w.Wraps(t)})
	}
	return list
}

// Reads gives the Vault paths that the broker itself reads for its backends: to prove secrets
// dead, and its own database logins.
func Reads(tools []broker.Tool, backends map[string]Backend) (paths [][]string) {
	seen := map[string]bool{}
	add := func(path ...string) {
		if key := strings.Join(path, "/"); !seen[key] {
			seen[key] = true
			paths = append(paths, path)
		}
	}
	for _, t := range tools {
		switch b := backends[t.Backend]; b.Plugin {
		case "pki":
			add(t.Path[0], "cert", "*")
			add(t.Path[0], "crl", "rotate")
		case "jwt":
			add(t.Path[0], "keys", t.Path[1])
		case "postgres":
			mount := cmp.Or(b.Mount, "database")
			add(mount, "creds", cmp.Or(b.Shaper, "pawl-shaper"))
			add(mount, "creds", cmp.Or(b.Revoker, "pawl-revoker"))
		}
	}
	return paths
}

// TokenRoles gives the writes that tools of the token plugin need in Vault, beside the plan of
// [vault.SetupConfig].
func TokenRoles(tools []broker.Tool, backends map[string]Backend) (writes []vault.Write, err error) {
	for _, t := range tools {
		if backends[t.Backend].Plugin != "token" || t.Canary {
			continue
		}
		path, data, err := token.Role(t)
		if err != nil {
			return nil, fmt.Errorf("tool %q: %w", t.Name, err)
		}
		writes = append(writes, vault.Write{Why: "What tokens of tool " + string(t.Name) + " may be", Method: "POST", Path: strings.Join(path, "/"), Data: data})
	}
	return writes, nil
}

// leaseLister is the Vault client with the paths whose leases are ours: those at which tools mint.
type leaseLister struct {
	*vault.Client
	policy   *policy.Running
	backends map[string]broker.Backend
}

// Leases implements [broker.LeaseLister].
func (l leaseLister) Leases(ctx context.Context, tools []broker.Tool) (found []broker.FoundLease, err error) {
	if tools == nil {
		tools = l.policy.Current().Tools()
	}
	listed, err := listLeases(ctx, func(ctx context.Context, path []string) ([]vault.LeaseInfo, error) { return l.Client.Leases(ctx, path) },
		mintPaths(tools, l.backends))
	for _, lease := range listed {
		found = append(found, broker.FoundLease{ID: lease.ID, Issued: lease.Issued})
	}
	return found, err
}

// mintPaths gives the paths at which tools get leases, each once.
func mintPaths(tools []broker.Tool, backends map[string]broker.Backend) (paths [][]string) {
	seen := map[string]bool{}
	for _, t := range tools {
		m, ok := backends[t.Backend].(minting)
		if !ok || len(t.Path) < 2 {
			continue
		}
		path, _, leased := m.Access(t)
		if key := strings.Join(path, "/"); leased && !seen[key] {
			seen[key] = true
			paths = append(paths, path)
		}
	}
	return paths
}

// listLeases lists below each path. One that may not be listed, as a tool's of an earlier bundle may be, leaves out no
// other.
func listLeases(ctx context.Context, list func(context.Context, []string) ([]vault.LeaseInfo, error), paths [][]string) (all []vault.LeaseInfo, err error) {
	var errs []error
	for _, path := range paths {
		found, err := list(ctx, path)
		all, errs = append(all, found...), append(errs, err)
	}
	return all, errors.Join(errs...)
}
