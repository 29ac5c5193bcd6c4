package vault_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// authority is a trust domain's X.509 authority.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := newKey(t)
	cert := sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "example.org"},
		IsCA:    true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, key, key)
	return &authority{key, cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var serial atomic.Int64

func sign(t *testing.T, c, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	c.SerialNumber = big.NewInt(serial.Add(1))
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// svid makes an X.509-SVID with a new key.
func (a *authority) svid(t *testing.T, id, commonName string) *tls.Certificate {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	skid := sha256.Sum256([]byte(fmt.Sprint(serial.Load()))) // SPIRE sets a new one in each SVID
	cert := sign(t, &x509.Certificate{
		SubjectKeyId: skid[:20],
		Subject:      pkix.Name{Organization: []string{"SPIRE"}, CommonName: commonName}, URIs: []*url.URL{uri},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.cert, key, a.key)
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

const brokerID = "spiffe://example.org/pawl"

// site is a real Vault that was set up for a broker, with a pki engine for this test.
type site struct {
	*parts.VaultServer
	ca    *authority
	admin vault.Admin
	setup vault.SetupConfig
	pki   string                          // mount
	svid  atomic.Pointer[tls.Certificate] // the broker's current SVID
	made  []broker.Handle                 // tokens of steps, for a test that ends them
}

func newSite(t *testing.T, server *parts.VaultServer) *site {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(server.CAPEM())
	name := fmt.Sprintf("t%d-%d", serial.Add(1), time.Now().UnixNano()%1e6)
	s := &site{VaultServer: server, ca: newAuthority(t), pki: "pki-" + name,
		admin: vault.Admin{Address: server.Address(), Roots: roots, Token: server.RootToken()}}
	s.write(t, "sys/mounts/"+s.pki, map[string]any{"type": "pki", "config": map[string]any{"max_lease_ttl": "24h"}})
	s.write(t, s.pki+"/root/generate/internal", map[string]any{"common_name": "test", "key_type": "ec", "ttl": "24h"})
	role := map[string]any{"allow_any_name": true, "key_type": "ec", "generate_lease": true, "ttl": "60s", "max_ttl": "1h"}
	s.write(t, s.pki+"/roles/a", role)
	s.write(t, s.pki+"/roles/b", role)
	s.setup = vault.SetupConfig{
		BrokerID: spiffeid.RequireFromString(brokerID), TrustPEM: s.ca.pem, Role: "pawl-" + name, TokenRole: "chain-" + name,
		Tools: []vault.Access{
			{Policy: "pawl-tool-a-" + name, Path: brokertest.Path(s.pki + "/issue/a"), Write: true, Leased: true},
			{Policy: "pawl-tool-b-" + name, Path: brokertest.Path(s.pki + "/issue/b"), Write: true, Leased: true},
		},
	}
	for range 2 { // Setup may be repeated
		if _, err := vault.Setup(t.Context(), s.admin, s.setup); err != nil {
			t.Fatalf("Setup() = %v", err)
		}
	}
	s.svid.Store(s.ca.svid(t, brokerID, "pawl"))
	return s
}

func (s *site) write(t *testing.T, path string, data map[string]any) {
	t.Helper()
	if err := s.admin.Write(t.Context(), vault.Write{Method: "POST", Path: path, Data: data}); err != nil {
		t.Fatal(err)
	}
}

func (s *site) config() vault.Config {
	return vault.Config{Address: s.Address(), Roots: s.admin.Roots, TokenRole: s.setup.TokenRole, Login: vault.Login{
		CertRole:    s.setup.Role,
		Certificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return s.svid.Load(), nil },
	}}
}

func (s *site) a() string { return s.setup.Tools[0].Policy }
func (s *site) b() string { return s.setup.Tools[1].Policy }

// rootClient returns a client with Vault's root token, to inspect Vault.
func (s *site) rootClient(t *testing.T) *vault.Client {
	return newClient(t, vault.Config{Address: s.Address(), Roots: s.admin.Roots, Login: vault.TokenLogin(s.RootToken())})
}

func (s *site) mint(role string) broker.Mint {
	m := plainMint(brokertest.Path(s.pki + "/issue/" + role))
	m.Data = map[string]any{"common_name": "x.example.org", "ttl": "60s"}
	return m
}

func issue(t *testing.T, c *vault.Client, d broker.DelegationID, policy string, m broker.Mint) broker.Lease {
	t.Helper()
	lease, secret, err := c.Mint(t.Context(), child(t, c, d, time.Minute, policy), m)
	if err != nil || secret.Empty() {
		t.Fatalf("Mint(%v) = %v", m.Path, err)
	}
	return lease
}

func delegation(id, parent broker.DelegationID) broker.Delegation {
	return broker.Delegation{ID: id, Parent: parent, Chain: "ch000000000000000000000001",
		Expires: time.Now().Add(10 * time.Minute)}
}

func TestRealLogin(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	c := newClient(t, s.config())
	branch(t, c, delegation(rootID, ""), s.a()) // waits for the login
	if err := c.Ready(); err != nil {
		t.Errorf("Ready() = %v", err)
	}
	for name, svid := range map[string]*tls.Certificate{
		"another id":        s.ca.svid(t, brokerID+"/other", "pawl"),
		"another authority": newAuthority(t).svid(t, brokerID, "pawl"),
		"no common name":    s.ca.svid(t, brokerID, ""),
	} {
		s.svid.Store(svid)
		c := newClient(t, s.config())
		_, err := c.CreateDelegationToken(t.Context(), delegation(rootID, ""), []string{s.a()})
		if !errors.Is(err, vault.ErrNoSession) || c.Ready() == nil {
			t.Errorf("CreateDelegationToken() with an SVID of %s = %v, want ErrNoSession", name, err)
		}
		t.Logf("an SVID of %s: %v", name, err)
	}
}

// TestRealRotation renews with three SVIDs and then with one of a new authority. Vault treats the last as another
// client, so the broker logs in again and must branch its delegations again.
func TestRealRotation(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	trust := func(pem string) {
		s.write(t, "auth/cert/certs/"+s.setup.Role, map[string]any{
			"certificate": pem, "allowed_uri_sans": brokerID, "token_policies": s.setup.Role,
			"token_no_default_policy": true, "token_period": "2s",
		})
	}
	trust(s.ca.pem)
	c := newClient(t, s.config())
	branch(t, c, delegation(rootID, ""), s.a())
	for range 3 {
		s.svid.Store(s.ca.svid(t, brokerID, "pawl"))
		begun := time.Now()
		until(t, 4*time.Second, "a period", func() bool { return time.Since(begun) > 1500*time.Millisecond })
		if !c.HasToken(rootID) || c.Ready() != nil {
			t.Fatalf("after a rotation of the SVID: HasToken() = %v, Ready() = %v, want true, nil", c.HasToken(rootID), c.Ready())
		}
		issue(t, c, rootID, s.a(), s.mint("a"))
	}
	next := newAuthority(t)
	trust(s.ca.pem + next.pem)
	s.svid.Store(next.svid(t, brokerID, "pawl"))
	until(t, 5*time.Second, "a new login", func() bool {
		if err := c.Ready(); err != nil {
			t.Fatalf("Ready() before the new login = %v, want nil", err)
		}
		return !c.HasToken(rootID)
	})
	branch(t, c, delegation(rootID, ""), s.a())
	issue(t, c, rootID, s.a(), s.mint("a"))
}

// TestRealTrust sets Vault up again after a rotation of the authority: it no longer accepts the old one.
func TestRealTrust(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	next := newAuthority(t)
	s.setup.TrustPEM = next.pem
	if _, err := vault.Setup(t.Context(), s.admin, s.setup); err != nil {
		t.Fatalf("Setup() = %v", err)
	}
	_, err := newClient(t, s.config()).CreateDelegationToken(t.Context(), delegation(rootID, ""), []string{s.a()})
	if !errors.Is(err, vault.ErrNoSession) {
		t.Errorf("CreateDelegationToken() with an SVID of the old authority = %v, want ErrNoSession", err)
	}
	s.svid.Store(next.svid(t, brokerID, "pawl"))
	branch(t, newClient(t, s.config()), delegation(rootID, ""), s.a())
}

// TestRealJWT logs in with a JWT-SVID. Vault accepts only the audience and the subject of the role.
func TestRealJWT(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	key := newKey(t)
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	setup := s.setup
	setup.TrustPEM, setup.JWTAudience, setup.Mount = "", "vault", "jwt-"+s.setup.Role
	setup.JWTKeysPEM = []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}
	if _, err := vault.Setup(t.Context(), s.admin, setup); err != nil {
		t.Fatalf("Setup() = %v", err)
	}
	for _, row := range []struct {
		subject, audience string
		want              bool
	}{{brokerID, "vault", true}, {brokerID + "/x", "vault", false}, {brokerID, "other", false}} {
		cfg := s.config()
		cfg.Login = vault.Login{Mount: setup.Mount, JWTRole: s.setup.Role, JWT: func(context.Context) (string, error) {
			signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
			if err != nil {
				return "", err
			}
			return jwt.Signed(signer).Claims(jwt.Claims{Subject: row.subject, Audience: jwt.Audience{row.audience},
				IssuedAt: jwt.NewNumericDate(time.Now()), Expiry: jwt.NewNumericDate(time.Now().Add(time.Minute))}).Serialize()
		}}
		_, err := newClient(t, cfg).CreateDelegationToken(t.Context(), delegation(rootID, ""), []string{s.a()})
		if (err == nil) != row.want {
			t.Errorf("login as %s for %s = %v, want ok = %v", row.subject, row.audience, err, row.want)
		}
	}
}

func TestRealTree(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	c := newClient(t, s.config())
	root := branch(t, c, delegation(rootID, ""), s.a(), s.b())
	branch(t, c, delegation(childID, rootID), s.a())
	const (
		third   = broker.DelegationID("dl000000000000000000000003")
		unknown = broker.DelegationID("dl000000000000000000000004")
	)
	_, err := c.CreateDelegationToken(t.Context(), delegation(third, childID), []string{s.a(), s.b()})
	if !errors.Is(err, vault.ErrWider) || !errors.Is(err, broker.Denied) {
		t.Errorf("CreateDelegationToken() wider than its parent = %v, want ErrWider", err)
	}
	if _, err := c.CreateDelegationToken(t.Context(), delegation(third, ""), []string{s.setup.Role}); !errors.Is(err, vault.ErrWider) {
		t.Errorf("CreateDelegationToken() with the broker's own policy = %v, want ErrWider", err)
	}
	if _, err := c.CreateDelegationToken(t.Context(), delegation(third, unknown), []string{s.a()}); !errors.Is(err, broker.ErrNoParent) {
		t.Errorf("CreateDelegationToken() below an unknown parent = %v, want ErrNoParent", err)
	}
	g := broker.Grant{ID: grantID, Delegation: childID, Expires: time.Now().Add(time.Minute)}
	if _, err := c.CreateStepToken(t.Context(), g, "x", s.b()); !errors.Is(err, vault.ErrWider) {
		t.Errorf("CreateStepToken() outside its delegation = %v, want ErrWider", err)
	}
	for _, policy := range []string{"root", "default", "PAWL-TOOL-A", s.a() + " ", ""} {
		if _, err := c.CreateStepToken(t.Context(), g, "x", policy); err == nil {
			t.Errorf("CreateStepToken(%q) = nil, want an error", policy)
		}
	}
	// A step's token can mint at its tool's path only.
	_, _, err = c.Mint(t.Context(), child(t, c, childID, time.Minute, s.a()), s.mint("b"))
	if !errors.Is(err, broker.ErrNotMinted) || !errors.Is(err, vault.ErrForbidden) {
		t.Errorf("Mint() of another tool = %v, want ErrForbidden", err)
	}
	var leases []string
	for range 3 {
		leases = append(leases, issue(t, c, childID, s.a(), s.mint("a")).ID)
	}
	for i := range 10 {
		leases = append(leases, issue(t, c, rootID, []string{s.a(), s.b()}[i%2], s.mint(string("ab"[i%2]))).ID)
	}
	gone, err := c.LeasesGone(t.Context(), append(leases, s.pki+"/issue/a/unknown"))
	if err != nil || countTrue(gone) != 1 || !gone[13] {
		t.Errorf("LeasesGone() = %v, %v, want only the last one gone", gone, err)
	}
	for role, want := range map[string]int{"a": 8, "b": 5} {
		ids, err := c.Leases(t.Context(), brokertest.Path(s.pki+"/issue/"+role))
		if err != nil || len(ids) != want {
			t.Errorf("Leases(%s) = %v, %v, want %d", role, ids, err, want)
		}
		found, err := c.LookUpLeases(t.Context(), append(ids, s.pki+"/issue/a/unknown"))
		if err != nil || len(found) != want || time.Since(found[0].Issued) > time.Minute {
			t.Errorf("LookUpLeases() = %v, %v, want the %d that exist, issued just now", found, err, want)
		}
	}
	if err := c.Revoke(t.Context(), leases[0]); err != nil {
		t.Errorf("Revoke() = %v", err)
	}
	if err := c.Revoke(t.Context(), leases[0]); err != nil {
		t.Errorf("Revoke() again = %v", err)
	}
	if gone, err := c.LeasesGone(t.Context(), leases[:1]); err != nil || !gone[0] {
		t.Errorf("LeasesGone() after Revoke() = %v, %v, want true", gone, err)
	}
	if ids, err := c.Irrevocable(t.Context()); err != nil || len(ids) != 0 {
		t.Errorf("Irrevocable() = %v, %v, want none", ids, err)
	}
	for range 2 {
		if err := c.Kill(t.Context(), root.Accessor); err != nil {
			t.Errorf("Kill() = %v", err)
		}
	}
	if err := c.Kill(t.Context(), "unknown"); err != nil {
		t.Errorf("Kill(unknown) = %v", err)
	}
	if c.HasToken(rootID) || c.HasToken(childID) {
		t.Error("HasToken() after Kill() of the root = true, want false for the root and its child")
	}
	until(t, 20*time.Second, "all leases gone", func() bool {
		gone, err := c.LeasesGone(t.Context(), leases)
		return err == nil && countTrue(gone) == len(leases)
	})
}

func countTrue(list []bool) (n int) {
	for _, b := range list {
		if b {
			n++
		}
	}
	return n
}

// TestRealLeastRights checks that Vault refuses requests with the broker's own token beyond its policy.
func TestRealLeastRights(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	other := newSite(t, parts.NeedVault(t))
	c := newClient(t, s.config())
	theirs := newClient(t, other.config())
	branch(t, theirs, delegation(rootID, ""), other.a())
	lease := issue(t, theirs, rootID, other.a(), other.mint("a"))
	if err := c.Revoke(t.Context(), lease.ID); !errors.Is(err, vault.ErrForbidden) {
		t.Errorf("Revoke() of another broker's lease = %v, want ErrForbidden", err)
	}
	if _, err := c.LeasesGone(t.Context(), []string{lease.ID}); !errors.Is(err, vault.ErrForbidden) {
		t.Errorf("LeasesGone() of another broker's lease = %v, want ErrForbidden", err)
	}
	if _, err := c.Leases(t.Context(), brokertest.Path(other.pki+"/issue/a")); !errors.Is(err, vault.ErrForbidden) {
		t.Errorf("Leases() of another mount = %v, want ErrForbidden", err)
	}
	for _, path := range []string{"sys/mounts", "sys/policies/acl/root", "auth/token/accessors", s.pki + "/roles/a"} {
		if _, err := c.Read(t.Context(), brokertest.Path(path)); !errors.Is(err, vault.ErrForbidden) {
			t.Errorf("Read(%q) = %v, want ErrForbidden", path, err)
		}
	}
	if err := c.Ready(); err != nil {
		t.Errorf("Ready() after refusals = %v", err)
	}
}

// TestRealDeadMan checks that the client renews the token of a chain in use. Once the broker is gone, the token expires
// and Vault revokes the leases below it.
func TestRealDeadMan(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	cfg := s.config()
	cfg.DeadMan = 2 * time.Second
	c := newClient(t, cfg)
	branch(t, c, delegation(rootID, ""), s.a())
	branch(t, c, delegation(childID, rootID), s.a())
	begun := time.Now()
	until(t, 8*time.Second, "twice the token's TTL", func() bool { return time.Since(begun) > 4500*time.Millisecond })
	if !c.HasToken(childID) {
		t.Fatal("HasToken() after twice the token's TTL = false, want true: the client renews it")
	}
	lease := issue(t, c, childID, s.a(), s.mint("a"))
	root := s.rootClient(t)
	c.Close()
	until(t, 10*time.Second, "the lease gone after the broker stopped", func() bool {
		gone, err := root.LeasesGone(t.Context(), []string{lease.ID})
		return err == nil && gone[0]
	})
	// Use of a child counts as use of its parent: the client renews both.
	cfg.Idle = 3 * time.Second
	busy := newClient(t, cfg)
	branch(t, busy, delegation(rootID, ""), s.a())
	branch(t, busy, delegation(childID, rootID), s.a())
	begun = time.Now()
	until(t, 10*time.Second, "use for twice the idle time", func() bool {
		child(t, busy, childID, time.Minute, s.a())
		return time.Since(begun) > 6500*time.Millisecond
	})
	// Renewal stops without use.
	cfg.Idle = time.Second
	idle := newClient(t, cfg)
	branch(t, idle, delegation(rootID, ""), s.a())
	until(t, 10*time.Second, "expiry of an idle delegation's token", func() bool { return !idle.HasToken(rootID) })
}

// TestRealRestart restarts a Vault that keeps its state in memory. The client must log in again by itself.
func TestRealRestart(t *testing.T) {
	server := parts.OwnVault(t, parts.VaultConfig{})
	s := newSite(t, server)
	c := newClient(t, s.config())
	h := branch(t, c, delegation(rootID, ""), s.a())
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(t.Context(), h.Accessor); err == nil {
		t.Error("Kill() with Vault down = nil, want an error")
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.admin.Token = server.RootToken()
	if _, err := vault.Setup(t.Context(), s.admin, s.setup); err != nil {
		t.Fatalf("Setup() = %v", err)
	}
	until(t, 20*time.Second, "a new login", func() bool {
		_, err := c.CreateDelegationToken(t.Context(), delegation(rootID, ""), []string{s.a()})
		return err == nil
	})
}
