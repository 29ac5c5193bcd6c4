// Package wire builds a running broker from a configuration. Only this package knows every part and
// connects them.
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
// written like 90s or 4h. The comments of the fields are the table of docs/configuration.md.
type Config struct {
	TrustDomains []string `yaml:"trust_domains"` // the trust domains of the workloads that are let in; required
	// address of the SPIFFE Workload API, unix:///path; empty: $SPIFFE_ENDPOINT_SOCKET
	WorkloadAPI string `yaml:"workload_api"`
	JWTAudience string `yaml:"jwt_audience"` // accept JWT-SVIDs for this one audience; empty: only X.509-SVIDs
	Listen      Listen `yaml:"listen"`       // required
	// SPIFFE IDs of operators that may read, revoke and freeze over TLS; empty: only the local socket
	Operators  []string           `yaml:"operators"`
	Ledger     string             `yaml:"ledger"`      // file of the ledger; required
	Policy     Policy             `yaml:"policy"`      // required
	Vault      Vault              `yaml:"vault"`       // required
	Backends   map[string]Backend `yaml:"backends"`    // by the name that tools use; at least one
	SweepEvery time.Duration      `yaml:"sweep_every"` // how often to sweep for orphaned leases and logins; zero: 1m
	// file of the private Ed25519 JWK that signs reports, checkpoints and status lists; empty: these are refused
	SigningKey string `yaml:"signing_key"`
	// transmitters of security events that the broker acts on; empty: none, and the endpoint does not exist
	Signals []Signal `yaml:"signals"`
	// receivers of security events about revocations, each under a name of lower-case letters, digits and dashes;
	// needs signing_key; empty: none
	Subscribers map[string]Subscriber `yaml:"subscribers"`
	SelfTest    SelfTest              `yaml:"self_test"` // a scheduled test that revoking works; empty: none
	// the iss claim of the events to subscribers; empty: https://, the first trust domain, /pawl
	Issuer string `yaml:"issuer"`
}

// Listen has the broker's addresses. An address without a host is all interfaces.
type Listen struct {
	Agents    string `yaml:"agents"`    // host:port, TLS; required
	Operators string `yaml:"operators"` // host:port, TLS; empty: operators use the socket
	// Unix socket for local operators (root and the broker's own user); required, because revoking must work when
	// TLS does not
	Socket string `yaml:"socket"`
}

// Policy selects the policy bundle.
type Policy struct {
	Bundle string `yaml:"bundle"` // file of the signed bundle; required
	Keys   string `yaml:"keys"`   // file of the JWK set of the platform keys; required
	Need   int    `yaml:"need"`   // how many of these keys must have signed; zero: 1
	// file of a second signed bundle that answers the same questions and never decides; answers that differ are
	// logged and counted; empty: none
	Candidate string `yaml:"candidate"`
}

// Vault has the address of Vault and the broker's login there.
type Vault struct {
	Address     string        `yaml:"address"`      // https://host:port; required
	CA          string        `yaml:"ca"`           // PEM file of the authorities of Vault's certificate; required
	Namespace   string        `yaml:"namespace"`    // empty: the root namespace
	Auth        string        `yaml:"auth"`         // kind of SVID for the login, cert or jwt; empty: cert
	Mount       string        `yaml:"mount"`        // mount of the auth method; empty: the method's name
	Role        string        `yaml:"role"`         // role of the auth method; empty: pawl-broker
	Audience    string        `yaml:"audience"`     // audience of the JWT-SVID for Vault; required with jwt
	MintTimeout time.Duration `yaml:"mint_timeout"` // how long the broker waits for a mint; zero: 10s
	MintBound   time.Duration `yaml:"mint_bound"`   // Vault's max_request_duration; zero: 90s
}

// Backend is one target of secrets. The plugin's row in [plugins] lists the fields that it takes; the
// others must be absent.
type Backend struct {
	Plugin string `yaml:"plugin"` // postgres, pki, ssh, jwt, token, kv or exec; required

	DSN   string `yaml:"dsn"`   // postgres: host, port, dbname and sslmode, never a user or password; required
	Mount string `yaml:"mount"` // postgres: mount of the database engine; empty: database
	// postgres: Vault role of the broker's own login that makes shapes; empty: pawl-shaper
	Shaper string `yaml:"shaper"`
	// postgres: Vault role of the broker's own login that severs; empty: pawl-revoker
	Revoker    string        `yaml:"revoker"`
	ServiceTTL time.Duration `yaml:"service_ttl"` // postgres: lifetime of these two logins; zero: 4h
	// ssh: file of the key revocation list that sshd reads; empty: none, and certificates live until they expire
	KRL    string `yaml:"krl"`
	Issuer string `yaml:"issuer"` // jwt: the iss claim; required
	// jwt: https URL at which verifiers reach GET /v1/status-lists/NAME of listen.agents; empty: tokens name no
	// status list
	StatusURI string   `yaml:"status_uri"`
	Program   *Program `yaml:"program"` // exec: the plugin; required
	// exec: a second program that proves in the plugin's place, so that the program that severs does not vouch for
	// itself; empty: the plugin proves
	Probe   *Program      `yaml:"probe"`
	Timeout time.Duration `yaml:"timeout"` // exec: limit of one run, from its start to its end; zero: 10s
}

// Program is an external plugin.
type Program struct {
	Path string `yaml:"path"` // absolute path of one file that needs no other file beside it; required
	// checksum of the file, 64 lower-case hexadecimal digits, checked at every start; required
	SHA256 string   `yaml:"sha256"`
	Args   []string `yaml:"args"` // arguments after the program's name
	Env    []string `yaml:"env"`  // NAME=value; empty: the environment is empty
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

// ParseConfig reads YAML strictly, by the rules of [policy.ReadYAML]. The error names each required field
// that is missing.
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
	var wrong []error
	need := func(name string, ok bool) {
		if !ok {
			wrong = append(wrong, fmt.Errorf("%s is required", name))
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
		wrong = append(wrong, fmt.Errorf("vault.auth is %q; it is cert or jwt", c.Vault.Auth))
	}
	if c.Listen.Operators != "" {
		need("operators (with listen.operators)", len(c.Operators) > 0)
	}
	for name, b := range c.Backends {
		wrong = append(wrong, b.check("backends."+name))
		if b.StatusURI != "" {
			need("signing_key (with backends."+name+".status_uri)", c.SigningKey != "")
		}
	}
	for i, s := range c.Signals {
		wrong = append(wrong, s.check(fmt.Sprintf("signals.%d", i)))
	}
	if len(c.Subscribers) > 0 {
		need("signing_key (with subscribers)", c.SigningKey != "")
	}
	wrong = append(wrong, c.SelfTest.check())
	for name, s := range c.Subscribers {
		wrong = append(wrong, s.check(name))
	}
	return errors.Join(wrong...)
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
