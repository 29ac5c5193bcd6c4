// Package wire makes a running broker out of a configuration: it is the one place that knows
// every part and puts them together.
package wire

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker/policy"
)

// Config is the configuration file of `pawl server`. Unknown keys are errors. Durations are
// written like 90s or 4h.
type Config struct {
	TrustDomains []string           `yaml:"trust_domains"` // whose workloads may come; required
	WorkloadAPI  string             `yaml:"workload_api"`  // unix:///path of the SPIFFE Workload API; empty: $SPIFFE_ENDPOINT_SOCKET
	JWTAudience  string             `yaml:"jwt_audience"`  // accept JWT-SVIDs for this one audience; empty: only X.509-SVIDs
	Listen       Listen             `yaml:"listen"`        // required
	Operators    []string           `yaml:"operators"`     // SPIFFE IDs that may look and revoke over TLS; empty: only the local socket
	Ledger       string             `yaml:"ledger"`        // file; required
	Policy       Policy             `yaml:"policy"`        // required
	Vault        Vault              `yaml:"vault"`         // required
	Backends     map[string]Backend `yaml:"backends"`      // by the name that tools use; at least one
	SweepEvery   time.Duration      `yaml:"sweep_every"`   // how often strays are looked for; zero: 1m
	SigningKey   string             `yaml:"signing_key"`   // private Ed25519 JWK that signs reports, checkpoints and status lists, a file; empty: these are refused
	Signals      []Signal           `yaml:"signals"`       // whose security events are believed; empty: none, and there is no such endpoint

	Subscribers map[string]Subscriber `yaml:"subscribers"` // who is told of revocations by security events, each under a name of lower-case letters, digits and dashes; needs signing_key; empty: nobody
	SelfTest    SelfTest              `yaml:"self_test"`   // whether revoking works is tried on a schedule; empty: it is not

	Issuer string `yaml:"issuer"` // the iss of these events; empty: https://, the first trust domain, /pawl
}

// Listen says where the broker is reached. An address without a host is all interfaces.
type Listen struct {
	Agents    string `yaml:"agents"`    // host:port, TLS; required
	Operators string `yaml:"operators"` // host:port, TLS; empty: operators use the socket
	Socket    string `yaml:"socket"`    // unix socket for local operators (root, or the broker's own user); required: revoking must work when TLS cannot
}

// Policy says which bundle rules.
type Policy struct {
	Bundle string `yaml:"bundle"` // signed bundle, a file; required
	Keys   string `yaml:"keys"`   // JWK set of the platform keys, a file; required
	Need   int    `yaml:"need"`   // how many of them must have signed; zero: 1

	// Candidate never decides.
	Candidate string `yaml:"candidate"` // a second signed bundle, a file, that is asked the same questions; where it would answer differently is logged and counted; empty: none
}

// Vault says which Vault, and how the broker is known there.
type Vault struct {
	Address     string        `yaml:"address"`      // https://host:port; required
	CA          string        `yaml:"ca"`           // PEM file of the authorities of its certificate; required
	Namespace   string        `yaml:"namespace"`    // empty: the root namespace
	Auth        string        `yaml:"auth"`         // cert or jwt: with which SVID the broker logs in; empty: cert
	Mount       string        `yaml:"mount"`        // of the auth method; empty: its name
	Role        string        `yaml:"role"`         // of the auth method; empty: pawl-broker
	Audience    string        `yaml:"audience"`     // of the JWT-SVID for Vault; required with jwt
	MintTimeout time.Duration `yaml:"mint_timeout"` // how long a mint is waited for; zero: 10s
	MintBound   time.Duration `yaml:"mint_bound"`   // Vault's max_request_duration; zero: 90s
}

// Backend is one target of secrets. Which of the fields count is the plugin's matter; one that
// does not must be absent.
type Backend struct {
	Plugin string `yaml:"plugin"` // postgres, pki, ssh, jwt, token, kv or exec; required

	DSN        string        `yaml:"dsn"`         // postgres: host, port, dbname, sslmode; never a user or password
	Mount      string        `yaml:"mount"`       // postgres: the database engine's mount; empty: database
	Shaper     string        `yaml:"shaper"`      // postgres: Vault role of the broker's own login that makes shapes; empty: pawl-shaper
	Revoker    string        `yaml:"revoker"`     // postgres: of the one that severs; empty: pawl-revoker
	ServiceTTL time.Duration `yaml:"service_ttl"` // postgres: the life of both; zero: 4h
	KRL        string        `yaml:"krl"`         // ssh: key revocation list that sshd reads; empty: none, and secrets live until their end
	Issuer     string        `yaml:"issuer"`      // jwt: the iss claim; required
	StatusURI  string        `yaml:"status_uri"`  // jwt: https URL at which verifiers reach GET /v1/status-lists/NAME of listen.agents; empty: tokens name no status list
	Program    *Program      `yaml:"program"`     // exec: the plugin; required
	Probe      *Program      `yaml:"probe"`       // exec: proves in its place, so that what cuts is not what says it is cut; empty: the plugin does
	Timeout    time.Duration `yaml:"timeout"`     // exec: of one start to its end; zero: 10s
}

// Program is an external plugin.
type Program struct {
	Path   string   `yaml:"path"`   // absolute; one file that needs no other beside it; required
	SHA256 string   `yaml:"sha256"` // its checksum, 64 lower-case hexadecimal digits, checked at every start; required
	Args   []string `yaml:"args"`   // after the program's name
	Env    []string `yaml:"env"`    // NAME=value; empty: the environment is empty
}

// ReadConfig reads and validates a file.
func ReadConfig(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, err
	}
	defer f.Close() //nolint:errcheck // only read
	raw, err := io.ReadAll(io.LimitReader(f, policy.MaxFile+1))
	if err != nil {
		return Config{}, err
	}
	c, err := ParseConfig(raw)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// ParseConfig reads YAML strictly, by the rules of [policy.ReadYAML]. Missing required fields are errors
// that name the field.
func ParseConfig(raw []byte) (Config, error) {
	var c Config
	err := policy.ReadYAML("", raw, &c)
	if errors.Is(err, policy.ErrNoDocument) {
		err = errors.New("is empty; see `pawl server --example`")
	}
	if err != nil {
		return Config{}, err
	}
	return c, c.check()
}

func (c Config) check() error {
	var missing []error
	need := func(name string, ok bool) {
		if !ok {
			missing = append(missing, fmt.Errorf("%s is required", name))
		}
	}
	need("trust_domains", len(c.TrustDomains) > 0)
	need("listen.agents", c.Listen.Agents != "")
	need("listen.socket", c.Listen.Socket != "")
	need("ledger", c.Ledger != "")
	need("policy.bundle", c.Policy.Bundle != "")
	need("policy.keys", c.Policy.Keys != "")
	need("vault.address", c.Vault.Address != "")
	need("vault.ca", c.Vault.CA != "")
	need("backends", len(c.Backends) > 0)
	if c.Vault.Auth == "jwt" {
		need("vault.audience", c.Vault.Audience != "")
	} else if c.Vault.Auth != "" && c.Vault.Auth != "cert" {
		missing = append(missing, fmt.Errorf("vault.auth is %q; it is cert or jwt", c.Vault.Auth))
	}
	if c.Listen.Operators != "" {
		need("operators (with listen.operators)", len(c.Operators) > 0)
	}
	for name, b := range c.Backends {
		missing = append(missing, b.check("backends."+name))
		if b.StatusURI != "" {
			need("signing_key (with backends."+name+".status_uri)", c.SigningKey != "")
		}
	}
	for i, s := range c.Signals {
		missing = append(missing, s.check(fmt.Sprintf("signals.%d", i)))
	}
	if len(c.Subscribers) > 0 {
		need("signing_key (with subscribers)", c.SigningKey != "")
	}
	missing = append(missing, c.SelfTest.check())
	for name, s := range c.Subscribers {
		missing = append(missing, s.check(name))
	}
	return errors.Join(missing...)
}

// check refuses keys that the plugin would ignore: a setting without an effect misleads.
func (b Backend) check(name string) error {
	p, ok := pluginNamed(b.Plugin)
	if !ok {
		return fmt.Errorf("%s.plugin is %q; it is %s", name, b.Plugin, pluginNames())
	}
	set := b.keysSet()
	for _, key := range set {
		if !slices.Contains(p.keys, key) {
			return fmt.Errorf("%s.%s is not a key of plugin %s", name, key, b.Plugin)
		}
	}
	for _, key := range p.required {
		if !slices.Contains(set, key) {
			return fmt.Errorf("%s.%s is required", name, key)
		}
	}
	return nil
}
