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

	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/yaml"
)

// Config is the configuration file of `pawl server`. Unknown keys are errors. Durations are
// written like 90s or 4h. The comments of the fields are the table of docs/configuration.md.
type Config struct {
	TrustDomains []string `yaml:"trust_domains"` // the trust domains of the workloads that are let in; required
	// address of the SPIFFE Workload API, unix:///path; empty: $SPIFFE_ENDPOINT_SOCKET
	WorkloadAPI string `yaml:"workload_api"`
	// which of several identities that the Workload API can give its process is the broker's own: its SPIFFE ID, or the
	// hint of its entry in SPIRE; empty: the only one, and with several the broker has none
	SPIFFEID    string `yaml:"spiffe_id"`
	JWTAudience string `yaml:"jwt_audience"` // accept JWT-SVIDs for this audience alone; empty: only X.509-SVIDs
	// other audiences that a JWT-SVID may have beside jwt_audience; the services under these names can present an agent's
	// token here; empty: none
	JWTCompanions []string `yaml:"jwt_companions"`
	Listen        Listen   `yaml:"listen"` // required
	// SPIFFE IDs of operators that may read, revoke and freeze over TLS; empty: only the local socket
	Operators []string `yaml:"operators"`
	Ledger    string   `yaml:"ledger"` // file of the ledger; required
	// how long chains and revocations that have ended stay in the ledger, with the audit log of that time, before they
	// move to segments in the directory LEDGER.archive; at least 1h; zero: for ever
	Keep       time.Duration      `yaml:"keep"`
	Policy     Policy             `yaml:"policy"`      // required
	Vault      Vault              `yaml:"vault"`       // required
	Backends   map[string]Backend `yaml:"backends"`    // by the name that tools use; at least one
	SweepEvery time.Duration      `yaml:"sweep_every"` // how often to sweep for orphaned logins; every tenth sweep, and each one after a start, a lost answer of a mint or an orphan, lists leases too; zero: 1m
	// file of the private Ed25519 JWK that signs reports, checkpoints and status lists; empty: these are refused
	SigningKey string `yaml:"signing_key"`
	// transmitters of security events that the broker acts on; empty: none, and the endpoint does not exist
	Signals []Signal `yaml:"signals"`
	// receivers of security events about revocations, each under a name of lower-case letters, digits and dashes;
	// needs signing_key; empty: none
	Subscribers map[string]Subscriber `yaml:"subscribers"`
	Limits      Limits                `yaml:"limits"`    // what one caller can take
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
	Address   string `yaml:"address"`   // https://host:port; required
	CA        string `yaml:"ca"`        // PEM file of the authorities of Vault's certificate; required
	Namespace string `yaml:"namespace"` // empty: the root namespace
	Auth      string `yaml:"auth"`      // kind of SVID for the login, cert or jwt; empty: cert
	Mount     string `yaml:"mount"`     // mount of the auth method; empty: the method's name
	Role      string `yaml:"role"`      // role of the auth method; empty: pawl-broker
	Audience  string `yaml:"audience"`  // audience of the JWT-SVID for Vault; required with jwt
	// policies that an entity or group of Vault's identity may give the broker's tokens, and with them every step's;
	// empty: none, and nothing is issued while there is one
	IdentityPolicies []string      `yaml:"identity_policies"`
	MintTimeout      time.Duration `yaml:"mint_timeout"` // how long the broker waits for a mint; zero: 10s
	MintBound        time.Duration `yaml:"mint_bound"`   // Vault's max_request_duration; zero: 90s
	// true: a proxy before Vault may answer in its place, or send a request twice; then no answer shows that nothing was
	// made, and steps that Vault refused count as unknown; docs/vault.md
	BehindProxy bool `yaml:"behind_proxy"`
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

// ParseConfig reads YAML strictly, by the rules of [yaml.Read]. The error names each required field
// that is missing.
func ParseConfig(raw []byte) (Config, error) {
	var c Config
	err := yaml.Read("", raw, &c)
	if errors.Is(err, yaml.ErrNoDocument) {
		err = errors.New("is empty; see `pawl server --example`")
	}
	if err != nil {
		return Config{}, err
	}
	return c, c.check()
}

// minKeep is the least time for which the ledger keeps what has ended. The index of chains needs it, and it is longer
// than the life of a secret and the time in which a lost mint can complete.
const minKeep = time.Hour

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
	if c.Keep != 0 && c.Keep < minKeep {
		wrong = append(wrong, fmt.Errorf("keep is %s; it is at least %s, or zero for ever", c.Keep, minKeep))
	}
	need("policy.bundle", c.Policy.Bundle != "")
	need("policy.keys", c.Policy.Keys != "")
	need("vault.address", c.Vault.Address != "")
	need("vault.ca", c.Vault.CA != "")
	need("backends", len(c.Backends) > 0)
	if _, err := client.ParseIdentity(c.SPIFFEID); err != nil {
		wrong = append(wrong, fmt.Errorf("spiffe_id: %w", err))
	}
	wrong = append(wrong, checkVaultNames("vault.", map[string]string{"mount": c.Vault.Mount, "role": c.Vault.Role}))
	if c.Vault.Auth == "jwt" {
		need("vault.audience", c.Vault.Audience != "")
	} else if c.Vault.Auth != "" && c.Vault.Auth != "cert" {
		wrong = append(wrong, fmt.Errorf("vault.auth is %q; it is cert or jwt", c.Vault.Auth))
	}
	if len(c.JWTCompanions) > 0 {
		need("jwt_audience (with jwt_companions)", c.JWTAudience != "")
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
	wrong = append(wrong, c.SelfTest.check(), c.Limits.check())
	for name, s := range c.Subscribers {
		wrong = append(wrong, s.check(name))
	}
	return errors.Join(wrong...)
}

// FreezeWarning says that no two people can lift a freeze of this configuration's broker, with the remedy.
// Empty: two can. The users of the local socket count as one person.
func (c Config) FreezeWarning() string {
	people := 1
	if c.Listen.Operators != "" {
		people += len(slices.Compact(slices.Sorted(slices.Values(c.Operators))))
	}
	if people > 1 {
		return ""
	}
	return "nobody can lift a freeze here: it takes two people, the users of the local socket count as one, and no other " +
		"operator is configured: set operators and listen.operators; or as root, with the broker stopped: " +
		"pawl unfreeze --offline --config FILE --reason TEXT REVOCATION"
}
