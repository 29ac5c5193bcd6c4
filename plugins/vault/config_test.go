package vault_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/vault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestConfig(t *testing.T) {
	good := vault.Config{Address: "https://127.0.0.1:1", Roots: x509.NewCertPool(), Login: vault.Login{CertRole: "pawl",
		Certificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }}}
	newClient(t, good)
	for name, change := range map[string]func(*vault.Config){
		"plain http": func(c *vault.Config) { c.Address = "http://127.0.0.1:1" },
		"a path":     func(c *vault.Config) { c.Address += "/v1/x" },
		"a user":     func(c *vault.Config) { c.Address = "https://a:b@127.0.0.1:1" },
		"no roots":   func(c *vault.Config) { c.Roots = nil },
		"no login":   func(c *vault.Config) { c.Login = vault.Login{} },
		"two logins": func(c *vault.Config) {
			c.Login.JWTRole, c.Login.JWT = "a", func(context.Context) (string, error) { return "", nil }
		},
		"half a login":   func(c *vault.Config) { c.Login.Certificate = nil },
		"a mount":        func(c *vault.Config) { c.Login.Mount = "../sys" },
		"a role":         func(c *vault.Config) { c.Login.CertRole = "a/b" },
		"a token role":   func(c *vault.Config) { c.TokenRole = ".." },
		"root":           func(c *vault.Config) { c.Delegation = "root" },
		"a namespace":    func(c *vault.Config) { c.Namespace = "a/../b" },
		"negative times": func(c *vault.Config) { c.Idle = -1 },
		"a short life":   func(c *vault.Config) { c.DeadMan = time.Millisecond },
	} {
		cfg := good
		change(&cfg)
		if c, err := vault.New(cfg); err == nil {
			c.Close()
			t.Errorf("New() with %s = nil, want an error", name)
		}
	}
}

func TestPlan(t *testing.T) {
	good := vault.SetupConfig{BrokerID: spiffeid.RequireFromString(brokerID), TrustPEM: newAuthority(t).pem,
		Reads: []vault.ReadAccess{{Path: brokertest.Path("pki/cert"), Below: true}, {Path: brokertest.Path("pki/crl/rotate")}},
		Tools: []vault.Access{{Policy: "pawl-tool-a", Path: brokertest.Path("pki/issue/a"), Write: true, Leased: true},
			{Policy: "pawl-tool-kv", Path: brokertest.Path("secret/data/x")}}}
	plan, err := good.Plan()
	if err != nil {
		t.Fatalf("Plan() = %v", err)
	}
	var all strings.Builder
	for _, w := range plan {
		if w.Why == "" {
			t.Errorf("%s %s has no reason", w.Method, w.Path)
		}
		if text, ok := w.Data["policy"].(string); ok {
			all.WriteString(w.Path + "\n" + text)
		}
	}
	for _, want := range []string{
		`path "secret/data/x" { capabilities = ["read"] }`,
		`path "pki/cert/*" { capabilities = ["read"] }`,
		`path "pki/crl/rotate" { capabilities = ["read"] }`,
		`"lease_id" = ["pki/issue/a/*"]`,
	} {
		if !strings.Contains(all.String(), want) {
			t.Errorf("Plan() lacks %s in:\n%s", want, all.String())
		}
	}
	for name, change := range map[string]func(*vault.SetupConfig){
		"no id":          func(s *vault.SetupConfig) { s.BrokerID = spiffeid.ID{} },
		"no tools":       func(s *vault.SetupConfig) { s.Tools = nil },
		"no proof":       func(s *vault.SetupConfig) { s.TrustPEM = "" },
		"empty trust":    func(s *vault.SetupConfig) { s.TrustPEM = "x" },
		"no audience":    func(s *vault.SetupConfig) { s.JWKSURL = "https://a" },
		"a lone aud":     func(s *vault.SetupConfig) { s.JWTAudience = "vault" },
		"another policy": func(s *vault.SetupConfig) { s.Tools = []vault.Access{{Policy: "admin", Path: brokertest.Path("a")}} },
		"no path":        func(s *vault.SetupConfig) { s.Tools = []vault.Access{{Policy: "pawl-tool-a"}} },
		"no read path":   func(s *vault.SetupConfig) { s.Reads = []vault.ReadAccess{{Below: true}} },
		"a short login":  func(s *vault.SetupConfig) { s.LoginTTL = time.Second },
	} {
		s := good
		change(&s)
		if _, err := s.Plan(); err == nil {
			t.Errorf("Plan() with %s = nil, want an error", name)
		}
	}
}
