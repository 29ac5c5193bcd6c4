package e2e_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/vault"
)

// brokerGroup gives a Unix group other than ours, by which SPIRE distinguishes the broker's process from this one. Only
// root can use any group; other users have only their own groups.
func brokerGroup(t *testing.T) int {
	t.Helper()
	if os.Getuid() == 0 {
		return 54321
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		if g != os.Getgid() {
			return g
		}
	}
	parts.Without(t, "spire", "it can tell the broker from its agent only for root, or for a user in two groups")
	return 0
}

// vaultAudience is the audience of the broker's JWT-SVID.
const vaultAudience = "vault"

// TestSPIRERotation uses a real SPIRE to identify broker and agents, with SVIDs that live for seconds. One agent uses
// its X.509-SVID and another one a JWT-SVID. Both take steps without a failed request while broker and agent each get
// two new SVIDs.
func TestSPIRERotation(t *testing.T) {
	t.Parallel()
	need(t, false)
	group := brokerGroup(t)
	spire := parts.OwnSPIRE(t, parts.SPIREConfig{TrustDomain: dev.TrustDomain, SVIDLifetime: 16 * time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for id, gid := range map[string]int{dev.BrokerID.String(): group, dev.Agent("planner").String(): os.Getgid()} {
		if err := spire.Entry(ctx, id, fmt.Sprintf("unix:gid:%d", gid)); err != nil {
			t.Fatal(err)
		}
	}
	address := workloadapi.WithAddr(spire.WorkloadAPI())
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(address))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close() //nolint:errcheck // closing only stops the watch
	tokens, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(address))
	if err != nil {
		t.Fatal(err)
	}
	defer tokens.Close() //nolint:errcheck // closing only stops the watch

	env := newEnv(t, dev.Config{NoPostgres: true})
	loginByJWT(t, env, tokens)
	w := newWorld(t, env, func(c *wire.Config) {
		c.WorkloadAPI, c.Vault.Auth, c.Vault.Audience = spire.WorkloadAPI(), "jwt", vaultAudience
	})
	p := startProcess(t, w.file, func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(os.Getuid()), Gid: uint32(group), NoSetGroups: os.Getuid() != 0}}
	})
	seen := &serials{source: source, ours: map[string]bool{}, brokers: map[string]bool{}}
	agents := map[string]*agent.Delegation{}
	for name, c := range map[string]*agent.Client{"X.509": seen.byCertificate(t, w), "JWT": seen.byToken(t, w, tokens)} {
		if agents[name], err = c.Open(ctx, agent.Chain{Task: "rotation", Rights: []agent.Right{{Tool: "tls.call", Use: true}}}); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, p.said())
		}
	}
	steps := 0
	if !within(time.Minute, func() bool {
		for name, d := range agents {
			if err := d.Step(ctx, agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}}, hasKey); err != nil {
				t.Fatalf("step %d by %s after %s: %v\n%s", steps, name, seen, err, p.said())
			}
			steps++
		}
		return seen.rotations(t) >= 2
	}) {
		t.Errorf("after a minute: %s", seen)
	}
	t.Logf("%d steps, %s", steps, seen)
	w.allClosed(2 * bound)
	w.oracle.untilNone(w.before, time.Second)
	p.end(t)
}

func hasKey(_ context.Context, s *agent.Secret) error {
	if block, _ := pem.Decode([]byte(s.Field("private_key"))); block == nil {
		return fmt.Errorf("the secret has no key")
	}
	return nil
}

// serials has the serial numbers of the SVIDs that were used.
type serials struct {
	source *workloadapi.X509Source

	mu            sync.Mutex // guards the fields below
	ours, brokers map[string]bool
}

func (s *serials) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("%d SVIDs of the agent and %d of the broker", len(s.ours), len(s.brokers))
}

// rotations gives the number of rotations that both sides have had.
func (s *serials) rotations(t *testing.T) int {
	t.Helper()
	svid, err := s.source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ours[svid.Certificates[0].SerialNumber.String()] = true
	return min(len(s.ours), len(s.brokers)) - 1
}

// verify records the broker's SVID on each new connection.
func (s *serials) verify(inner func([][]byte, [][]*x509.Certificate) error) func([][]byte, [][]*x509.Certificate) error {
	return func(raw [][]byte, chains [][]*x509.Certificate) error {
		if err := inner(raw, chains); err != nil {
			return err
		}
		cert, err := x509.ParseCertificate(raw[0])
		if err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.brokers[cert.SerialNumber.String()] = true
		return nil
	}
}

func (s *serials) byCertificate(t *testing.T, w *world) *agent.Client {
	t.Helper()
	config := tlsconfig.MTLSClientConfig(s.source, s.source, tlsconfig.AuthorizeID(dev.BrokerID))
	config.VerifyPeerCertificate = s.verify(config.VerifyPeerCertificate)
	return newAgent(t, agent.Config{Address: "https://" + w.config.Listen.Agents, TLS: config})
}

func (s *serials) byToken(t *testing.T, w *world, tokens *workloadapi.JWTSource) *agent.Client {
	t.Helper()
	config := tlsconfig.TLSClientConfig(s.source, tlsconfig.AuthorizeID(dev.BrokerID))
	config.VerifyPeerCertificate = s.verify(config.VerifyPeerCertificate)
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return newAgent(t, agent.Config{Address: "https://" + w.config.Listen.Agents, HTTPClient: &http.Client{Transport: bearing{transport, tokens}}})
}

// bearing sends the current JWT-SVID with each request.
type bearing struct {
	http.RoundTripper
	tokens *workloadapi.JWTSource
}

func (b bearing) RoundTrip(r *http.Request) (*http.Response, error) {
	svid, err := b.tokens.FetchJWTSVID(r.Context(), jwtsvid.Params{Audience: "pawl"})
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+svid.Marshal())
	return b.RoundTripper.RoundTrip(r)
}

// loginByJWT configures Vault to accept the broker's login with a JWT-SVID of SPIRE.
func loginByJWT(t *testing.T, env *dev.Env, tokens *workloadapi.JWTSource) {
	t.Helper()
	bundle, err := tokens.GetJWTBundleForTrustDomain(dev.BrokerID.TrustDomain())
	if err != nil {
		t.Fatal(err)
	}
	policy, err := wire.LoadPolicy(env.Config.Policy)
	if err != nil {
		t.Fatal(err)
	}
	tools, roots := policy.Current().Tools(), x509.NewCertPool()
	roots.AppendCertsFromPEM(env.Vault.CAPEM())
	reads, err := wire.Reads(tools, env.Config.Backends)
	if err != nil {
		t.Fatal(err)
	}
	c := vault.SetupConfig{BrokerID: dev.BrokerID, JWTAudience: vaultAudience,
		Tools: wire.Access(tools, env.Config.Backends), Reads: reads}
	for _, key := range bundle.JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		c.JWTKeysPEM = append(c.JWTKeysPEM, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	}
	if _, err := vault.Setup(t.Context(), vault.Admin{Address: env.Vault.Address(), Roots: roots, Token: env.Vault.RootToken()}, c); err != nil {
		t.Fatal(err)
	}
}
