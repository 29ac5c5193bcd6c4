package vault

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

// SetupConfig describes the configuration that a broker needs in Vault.
type SetupConfig struct {
	BrokerID spiffeid.ID // required
	Tools    []Access    // required: a broker without tools has no use for Vault
	Reads    []ReadAccess

	// TrustPEM holds the trust domain's X.509 authorities in PEM. If set, the plan makes the cert auth role. Vault
	// keeps a copy, and SPIRE rotates its authorities within hours: run Setup again with each new bundle. During a
	// rotation the old and the new authorities overlap, and TrustPEM holds both.
	TrustPEM string

	JWTKeysPEM  []string // PEM public keys of the trust domain's JWT authorities; set: the plan makes the jwt auth role
	JWKSURL     string   // instead of JWTKeysPEM: where Vault fetches the keys, so that it follows their rotation
	JWTAudience string   // required with either: the single audience of the broker's JWT-SVID

	Role       string // auth role; empty: "pawl-broker"
	Mount      string // of the auth method; empty: "cert" or "jwt". With both methods it must be empty
	TokenRole  string // as in Config
	Delegation string // as in Config
	// LoginTTL is the period of the login token. Zero is 1 hour. If the broker dies, all its tokens end after that
	// time; delegations' tokens end sooner.
	LoginTTL time.Duration
}

// ReadAccess is what a proof reads in Vault with the broker's token.
type ReadAccess struct {
	Path  broker.VaultPath
	Below bool // all paths below Path instead of Path
}

func (r ReadAccess) String() string {
	if r.Below {
		return r.Path.String() + "/*"
	}
	return r.Path.String()
}

// Write is one request of the plan and the reason for it.
type Write struct {
	Why    string         `json:"why"`
	Method string         `json:"method"`
	Path   string         `json:"path"`
	Data   map[string]any `json:"data"`
	Exists bool           `json:"-"` // "path is already in use" counts as success
}

// Plan returns the writes in order and sends none. A platform team can read it and apply it with `vault write`.
func (s SetupConfig) Plan() ([]Write, error) {
	if err := s.complete(); err != nil {
		return nil, fmt.Errorf("vault setup: %w", err)
	}
	plan := []Write{
		policy("What the broker's own token may do", s.Role, s.brokerPolicy()),
		policy("What a delegation's token may do besides its tools", s.Delegation, delegationPolicy),
	}
	for _, a := range s.policies() {
		plan = append(plan, policy("What a mint with this tool may do, and nothing else", a[0].Policy, toolPolicy(a)))
	}
	plan = append(plan, Write{
		Why: "The token role with which the broker makes the tokens of root delegations. " +
			"It allows Pawl's tool policies, no orphans and none of the broker's own policies",
		Method: "POST", Path: "auth/token/roles/" + s.TokenRole,
		Data: map[string]any{
			"allowed_policies_glob": []string{"pawl-tool-*"}, "allowed_policies": []string{s.Delegation},
			"orphan": false, "renewable": true, "token_type": "service", "token_no_default_policy": true,
			"token_explicit_max_ttl": formatTTL(broker.MaxChainTTL), // the only hard end that Vault keeps at a renewal
		},
	})
	if s.TrustPEM != "" {
		plan = append(plan, enable("cert", s.mount("cert")), s.certRole())
	}
	if s.JWTAudience != "" {
		plan = append(plan, enable("jwt", s.mount("jwt")), s.jwtConfig(), s.jwtRole())
	}
	return plan, nil
}

func (s *SetupConfig) complete() error {
	setDefault(&s.Role, "pawl-broker")
	setDefault(&s.TokenRole, "pawl-chain")
	setDefault(&s.Delegation, "pawl-delegation")
	if s.LoginTTL == 0 {
		s.LoginTTL = time.Hour
	}
	jwt := len(s.JWTKeysPEM) > 0 || s.JWKSURL != ""
	switch {
	case s.BrokerID.IsZero():
		return errors.New("BrokerID is required")
	case len(s.Tools) == 0:
		return errors.New("Tools is required")
	case s.TrustPEM == "" && !jwt:
		return errors.New("TrustPEM, JWTKeysPEM or JWKSURL is required: without one of them the broker cannot log in")
	case jwt != (s.JWTAudience != ""):
		return errors.New("JWTAudience is required with JWTKeysPEM or JWKSURL, and only with them: " +
			"without it Vault would accept every audience")
	case len(s.JWTKeysPEM) > 0 && s.JWKSURL != "":
		return errors.New("JWTKeysPEM and JWKSURL are mutually exclusive")
	case s.Mount != "" && jwt && s.TrustPEM != "":
		return errors.New("Mount is of one auth method, and TrustPEM and JWTKeysPEM or JWKSURL ask for two")
	case s.LoginTTL < time.Minute:
		return errors.New("LoginTTL must be at least a minute")
	case strings.ContainsAny(s.BrokerID.String(), "*,"):
		return errors.New("BrokerID must not contain '*' or ',': Vault reads them as patterns")
	case s.TrustPEM != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(s.TrustPEM)):
		return errors.New("TrustPEM contains no certificate")
	}
	if s.Mount != "" {
		if err := broker.CheckVaultName(s.Mount); err != nil {
			return fmt.Errorf("Mount: %w", err)
		}
	}
	if err := errors.Join(checkPolicy(s.Role), broker.CheckVaultName(s.TokenRole), checkPolicy(s.Delegation)); err != nil {
		return err
	}
	for _, a := range s.Tools {
		if a.Path.IsZero() {
			return fmt.Errorf("tool policy %q: Path is required", a.Policy)
		}
		if err := checkPolicy(a.Policy); err != nil {
			return err
		}
		if !strings.HasPrefix(a.Policy, "pawl-tool-") {
			return fmt.Errorf("tool policy %q must begin with pawl-tool-: the token role allows no other", a.Policy)
		}
	}
	for _, r := range s.Reads {
		if r.Path.IsZero() {
			return errors.New("Reads: Path is required")
		}
	}
	return nil
}

// policies groups the tools by policy, sorted by name. Several tools may share one policy.
func (s *SetupConfig) policies() (groups [][]Access) {
	tools := slices.SortedStableFunc(slices.Values(s.Tools), func(a, b Access) int {
		return strings.Compare(a.Policy, b.Policy)
	})
	for _, a := range tools {
		if n := len(groups); n > 0 && groups[n-1][0].Policy == a.Policy {
			groups[n-1] = append(groups[n-1], a)
			continue
		}
		groups = append(groups, []Access{a})
	}
	return groups
}

func policy(why, name, text string) Write {
	return Write{Why: why, Method: "PUT", Path: "sys/policies/acl/" + name, Data: map[string]any{"policy": text}}
}

// mount is the mount of an auth method.
func (s *SetupConfig) mount(method string) string { return cmp.Or(s.Mount, method) }

func enable(method, mount string) Write {
	return Write{Why: "The auth method that checks the broker's SVID", Method: "POST", Path: "sys/auth/" + mount,
		Data: map[string]any{"type": method}, Exists: true}
}

// delegationPolicy allows plain token creation, for which Vault enforces that a child's policies are a subset.
const delegationPolicy = `# Make the tokens of steps and of narrower delegations. Vault refuses a wider one.
path "auth/token/create" { capabilities = ["create", "update"] }
# Renew itself while the chain is in use. Without renewal the token ends within minutes.
path "auth/token/renew-self" { capabilities = ["update"] }
`

func toolPolicy(tool []Access) string {
	var b strings.Builder
	b.WriteString("# Mint one secret.\n")
	for _, a := range tool {
		can := `"read"`
		if a.Write {
			can = `"create", "update"`
		}
		wrapped := " " // without these bounds Vault also returns the response unwrapped
		if a.Wrap {
			wrapped = fmt.Sprintf("\n  min_wrapping_ttl = \"1s\"\n  max_wrapping_ttl = %q\n", formatTTL(broker.MaxTTL))
		}
		fmt.Fprintf(&b, "path %q { capabilities = [%s]%s}\n", a.Path.String(), can, wrapped)
	}
	return b.String()
}

// brokerPolicy grants none of the tools' rights: the broker cannot mint with its own token.
func (s *SetupConfig) brokerPolicy() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Make the tokens of root delegations, through the role that limits them.
path "auth/token/create/%s" { capabilities = ["create", "update"] }
# Stay logged in.
path "auth/token/renew-self" { capabilities = ["update"] }
# Revoke the token of a delegation or a step. Needs the accessor, which only its maker knows.
path "auth/token/revoke-accessor" { capabilities = ["update"] }
# Check whether a token is gone. Needs the accessor, too.
path "auth/token/lookup-accessor" { capabilities = ["update"] }
# Ask what a tool's policy permits, so that a missing one is noticed before an agent meets it.
path "sys/capabilities-accessor" { capabilities = ["create", "update"] }
# List the leases that Vault has stopped trying to revoke. Vault requires sudo for it.
path "sys/leases" { capabilities = ["read", "sudo"] }
`, s.TokenRole)
	var leases []string
	for _, a := range s.Tools {
		if a.Leased {
			leases = append(leases, a.Path.String())
		}
	}
	slices.Sort(leases)
	if leases = slices.Compact(leases); len(leases) > 0 {
		under := make([]string, len(leases))
		for i, p := range leases {
			under[i] = fmt.Sprintf("%q", p+"/*")
		}
		only := strings.Join(under, ", ")
		fmt.Fprintf(&b, `# Revoke a lease and check whether it is gone: leases of Pawl's tools only.
path "sys/leases/revoke" {
  capabilities = ["create", "update"]
  allowed_parameters = { "lease_id" = [%s], "sync" = [] }
}
path "sys/leases/lookup" {
  capabilities = ["create", "update"]
  allowed_parameters = { "lease_id" = [%s] }
}
# Find orphaned leases, which the ledger does not know. Vault requires sudo for a list.
`, only, only)
		for _, p := range leases {
			fmt.Fprintf(&b, "path %q { capabilities = [\"list\", \"sudo\"] }\n", "sys/leases/lookup/"+p+"/")
		}
	}
	if len(s.Reads) > 0 {
		b.WriteString("# Read the proofs that a secret is dead.\n")
	}
	for _, r := range s.Reads {
		fmt.Fprintf(&b, "path %q { capabilities = [\"read\"] }\n", r.String())
	}
	return b.String()
}

// tokenFields adds the members that both auth roles share. The period keeps the login token, and the tree below it,
// alive for as long as the broker renews it.
func (s *SetupConfig) tokenFields(more map[string]any) map[string]any {
	more["token_policies"] = []string{s.Role}
	more["token_no_default_policy"] = true
	more["token_type"] = "service"
	more["token_period"] = formatTTL(ceilSecond(s.LoginTTL))
	return more
}

func (s *SetupConfig) certRole() Write {
	return Write{
		Why: "Log in with an X.509-SVID of exactly this SPIFFE ID. " +
			"Vault keeps a copy of the authority: write it again after each rotation",
		Method: "POST", Path: "auth/" + s.mount("cert") + "/certs/" + s.Role,
		Data: s.tokenFields(map[string]any{
			"certificate": s.TrustPEM, "allowed_uri_sans": []string{s.BrokerID.String()}, "display_name": s.Role,
		}),
	}
}

func (s *SetupConfig) jwtConfig() Write {
	algorithms := []string{"ES256", "ES384", "RS256"} // Vault's default is RS256 only; SPIRE signs with ES256
	data := map[string]any{"jwt_validation_pubkeys": s.JWTKeysPEM, "jwt_supported_algs": algorithms}
	why := "The keys that sign JWT-SVIDs. Vault keeps copies: with JWKSURL it follows their rotation"
	if s.JWKSURL != "" {
		data = map[string]any{"jwks_url": s.JWKSURL, "jwt_supported_algs": algorithms}
		why = "Where Vault fetches the keys that sign JWT-SVIDs"
	}
	return Write{Why: why, Method: "POST", Path: "auth/" + s.mount("jwt") + "/config", Data: data}
}

func (s *SetupConfig) jwtRole() Write {
	return Write{
		Why:    "Log in with a JWT-SVID of exactly this SPIFFE ID and audience",
		Method: "POST", Path: "auth/" + s.mount("jwt") + "/role/" + s.Role,
		Data: s.tokenFields(map[string]any{
			"role_type": "jwt", "user_claim": "sub", "bound_subject": s.BrokerID.String(),
			"bound_audiences":   []string{s.JWTAudience},
			"clock_skew_leeway": 5, "expiration_leeway": 5, "not_before_leeway": 5,
		}),
	}
}

// Admin is the access of an administrator of Vault. Setup uses the token and does not keep it.
type Admin struct {
	Address string
	Roots   *x509.CertPool
	Token   string
}

// Setup applies the plan and returns it. It may be repeated: each write sets a state.
func Setup(ctx context.Context, admin Admin, s SetupConfig) ([]Write, error) {
	plan, err := s.Plan()
	if err != nil {
		return nil, err
	}
	for _, w := range plan {
		if err := admin.Write(ctx, w); err != nil {
			return plan, fmt.Errorf("vault setup: %w", err)
		}
	}
	return plan, nil
}

// Write sends one write.
func (a Admin) Write(ctx context.Context, w Write) error {
	base, err := url.Parse(a.Address)
	if err != nil || base.Scheme != "https" || a.Roots == nil || !validToken(a.Token) {
		return errors.New("Admin needs an https address, roots and a token")
	}
	wire := newWire(&url.URL{Scheme: "https", Host: base.Host}, Config{Now: time.Now},
		&tls.Config{RootCAs: a.Roots, MinVersion: tls.VersionTLS12})
	defer wire.close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err = wire.send(ctx, call{method: w.Method, path: w.Path, token: a.Token, body: w.Data})
	if w.Exists && gone(err, "path is already in use") {
		return nil
	}
	if err != nil {
		return fmt.Errorf("writing %q: %w", w.Path, err)
	}
	return nil
}
