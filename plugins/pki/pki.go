// Package pki narrows a certificate from Vault's PKI engine to the names of one step. It checks that the issued
// certificate has exactly those names, and proves its revocation.
package pki

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Config configures a [Backend].
type Config struct {
	// Vault is required. Its policy must allow reading <mount>/cert/*, <mount>/issuer/*, <mount>/config/crl and
	// <mount>/crl/rotate. The list of authorities at <mount>/issuers and the responder at <mount>/ocsp need no
	// authentication.
	Vault Reader
	Now   func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend] and [broker.Prover]. It severs nothing: Vault alone revokes a certificate.
// Safe for concurrent use.
type Backend struct {
	vault    Reader
	now      func() time.Time
	rebuilds *rebuilds
	issuers  *issuers
}

// New checks the configuration and returns a Backend.
func New(cfg Config) (*Backend, error) {
	if cfg.Vault == nil {
		return nil, errors.New("pki: Vault is required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Backend{vault: cfg.Vault, now: cfg.Now,
		rebuilds: &rebuilds{vault: cfg.Vault, now: cfg.Now, state: map[string]rebuilt{}},
		issuers:  &issuers{vault: cfg.Vault, known: map[string]*x509.Certificate{}}}, nil
}

// names are the names requested for a certificate.
type names struct {
	common string
	dns    []string
	uris   []string
	ips    []string
}

// Load implements [broker.Backend]. The tool's Path is a mount and a role. The role must set generate_lease, or every
// mint is refused. Settings:
//
//	arg.<argument>  the fields that the argument fills: common_name, alt_names, uri_sans, ip_sans, joined by commas
//	common_name, alt_names, uri_sans, ip_sans   a fixed value (lists joined by commas)
//	usage           "client", "server" or "both": the extended key usage that the certificate must have; default client
//	revocation      how the servers learn that a certificate was revoked: "list" (the default), or "ocsp" if each of them
//	                asks Vault's responder at each handshake: the responder's answer alone then shows it dead
//	peers           the servers that accept the certificate: "handshake" (the default) if each connection is a new
//	                handshake; "resume 24h" if they resume sessions without a check, and have dropped every session at
//	                most 24h after the certificate's end; "resume-unlisted 24h" if they do so, but refuse the session of
//	                a certificate on their revocation list
//
// Each field has one source. Each argument fills at least one field. At least one name is required.
func (b *Backend) Load(t broker.Tool) error {
	_, err := load(t)
	return err
}

// Access returns the Vault path of the tool's mint, whether the mint is a write, and whether it yields a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return t.Path.Insert(1, "issue"), true, true
}

// Prepare implements [broker.Backend].
func (b *Backend) Prepare(_ context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	fields, err := load(t)
	if err != nil {
		return broker.Mint{}, "", err
	}
	want, err := fields.names(g.Args)
	if err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Malformed, "issue", "%s", err).With(broker.CodeArgumentOutside)
	}
	life := (g.Expires.Sub(b.now()) + time.Second - 1).Truncate(time.Second)
	path, _, _ := b.Access(t)
	return broker.Mint{
		Path: path, Leased: true, TTL: life, Absolute: true,
		Data: map[string]any{
			"common_name": want.common, "exclude_cn_from_sans": true, "ttl": fmt.Sprintf("%ds", int64(life/time.Second)),
			"alt_names": strings.Join(want.dns, ","), "uri_sans": strings.Join(want.uris, ","), "ip_sans": strings.Join(want.ips, ","),
		},
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			f, err := b.finish(answer, want, usages[fields["usage"].fixed], life)
			if err == nil {
				if fields.asked() {
					f.Ref += asks
				}
				servers, _ := parsePeers(fields["peers"].fixed) // load has parsed it
				servers.mark(&f)
			}
			return f, err
		},
	}, string(g.ID), nil
}

var usages = map[string][]x509.ExtKeyUsage{
	"":       {x509.ExtKeyUsageClientAuth},
	"client": {x509.ExtKeyUsageClientAuth},
	"server": {x509.ExtKeyUsageServerAuth},
	"both":   {x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
}

// secret is the document that the agent receives.
type secret struct {
	Certificate string   `json:"certificate"`
	PrivateKey  string   `json:"private_key"`
	CAChain     []string `json:"ca_chain"`
	Serial      string   `json:"serial_number"`
}

// finish rejects a certificate that differs from the request. A role may add names, usages or lifetime, and then the
// secret could do more than the step.
func (b *Backend) finish(answer map[string]any, want names, usage []x509.ExtKeyUsage, life time.Duration) (broker.Finished, error) {
	var s secret
	s.Certificate, _ = answer["certificate"].(string)
	s.PrivateKey, _ = answer["private_key"].(string)
	s.Serial, _ = answer["serial_number"].(string)
	block, rest := pem.Decode([]byte(s.Certificate))
	if block == nil || len(strings.TrimSpace(string(rest))) > 0 || s.PrivateKey == "" {
		return broker.Finished{}, errors.New("pki: the response is not a certificate with its key")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return broker.Finished{}, errors.New("pki: the certificate cannot be parsed")
	}
	if s.Serial != serial(cert) {
		return broker.Finished{}, errors.New("pki: the serial number is not the certificate's")
	}
	if err := exact(cert, want, usage); err != nil {
		return broker.Finished{}, err
	}
	if cert.NotAfter.After(b.now().Add(life + time.Second + broker.MaxSkew)) {
		return broker.Finished{}, errors.New("pki: the certificate outlives the step")
	}
	chain, _ := answer["ca_chain"].([]any)
	for _, c := range chain {
		if text, ok := c.(string); ok {
			s.CAChain = append(s.CAChain, text)
		}
	}
	raw, err := json.Marshal(s)
	if err != nil {
		return broker.Finished{}, errors.New("pki: encoding the secret")
	}
	return broker.Finished{Secret: broker.NewSecret(raw), Ref: refOf(s.Serial, issuerOf(cert)), Expires: cert.NotAfter.UTC(),
		Digests: []broker.ValueDigest{broker.DigestValue(s.Certificate), broker.DigestValue(s.PrivateKey)}}, nil
}

func exact(cert *x509.Certificate, want names, usage []x509.ExtKeyUsage) error {
	var uris, ips []string
	for _, u := range cert.URIs {
		uris = append(uris, u.String())
	}
	for _, ip := range cert.IPAddresses {
		ips = append(ips, ip.String())
	}
	switch {
	case cert.IsCA || cert.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("pki: the certificate can sign others")
	case cert.Subject.CommonName != want.common || !same(cert.DNSNames, want.dns) || !same(uris, want.uris) ||
		!same(ips, want.ips) || len(cert.EmailAddresses) > 0:
		return errors.New("pki: the certificate's names are not exactly those of the step")
	case !slices.Equal(slices.Sorted(slices.Values(cert.ExtKeyUsage)), slices.Sorted(slices.Values(usage))) || len(cert.UnknownExtKeyUsage) > 0:
		return errors.New("pki: the certificate's extended key usage is not the tool's: " +
			"set client_flag, server_flag and ext_key_usage on the role")
	}
	return nil
}

func same(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// serial returns the certificate's serial number in Vault's notation.
func serial(cert *x509.Certificate) string { return number(cert.SerialNumber) }

func number(n *big.Int) string {
	var parts []string
	for _, b := range n.Bytes() {
		parts = append(parts, fmt.Sprintf("%02x", b))
	}
	return strings.Join(parts, ":")
}

// checkDNS, checkURI and checkIP reject a value that is not exactly one name. Vault splits lists at commas.
func checkDNS(s string) error {
	ok := s != "" && len(s) <= 253 && s[0] != '.' && s[0] != '-' && !strings.Contains(s, "..")
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.'
	}
	if !ok {
		return errors.New("is not a lower-case DNS name without wildcards")
	}
	return nil
}

func checkURI(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme == "" || u.String() != s || strings.ContainsAny(s, ",* ") || len(s) > 2048 {
		return errors.New("is not a URI in canonical form without commas, stars or spaces")
	}
	return nil
}

func checkIP(s string) error {
	if ip := net.ParseIP(s); ip == nil || ip.String() != s {
		return errors.New("is not an IP address in canonical form")
	}
	return nil
}
