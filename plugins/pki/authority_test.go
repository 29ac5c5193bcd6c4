package pki_test

import (
	"bytes"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/pki"
)

// openssl asks openssl whether a server that trusts the authority and holds its list accepts a certificate.
func openssl(t *testing.T, authority string, list []byte, certificate string) (accepted bool) {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		parts.Without(t, "openssl", "install the package openssl")
	}
	dir := t.TempDir()
	files := map[string][]byte{"ca.pem": []byte(authority), "cert.pem": []byte(certificate),
		"crl.pem": pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: list})}
	for name, raw := range files {
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), path, "verify", "-crl_check", "-CAfile", filepath.Join(dir, "ca.pem"),
		"-CRLfile", filepath.Join(dir, "crl.pem"), filepath.Join(dir, "cert.pem")).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil && bytes.Contains(out, []byte("OK")):
		return true
	case errors.As(err, &exit) && bytes.Contains(out, []byte("certificate revoked")):
		return false
	}
	t.Fatalf("openssl verify: %v\n%s", err, out)
	return false
}

// der fetches one path without a token, as relying parties do.
func (e *engine) der(t *testing.T, path string) []byte {
	t.Helper()
	anonymous, err := e.Clone()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := anonymous.Logical().ReadRawWithContext(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestRealDeletedIssuer deletes the authority of a live certificate and revokes the certificate. Vault books it on the
// list of the default authority. A server that trusts the deleted authority and holds its last list accepts the
// certificate, as openssl shows, so the certificate is not dead.
func TestRealDeletedIssuer(t *testing.T) {
	e := newEngine(t, role(nil))
	first := e.write(t, e.mount+"/root/generate/internal", map[string]any{"common_name": "First", "issuer_name": "first", "key_type": "ec", "ttl": "24h"})
	e.write(t, e.mount+"/root/generate/internal", map[string]any{"common_name": "Second", "issuer_name": "second", "key_type": "ec", "ttl": "24h"})
	e.write(t, e.mount+"/config/issuers", map[string]any{"default": "second"})
	e.write(t, e.mount+"/roles/agent", role(map[string]any{"issuer_ref": "first"}))
	b := newBackend(t, reader{e.Client})
	s, err := e.issue(t, b, "spiffe://example.org/a")
	if err != nil {
		t.Fatal(err)
	}
	last := e.der(t, e.mount+"/issuer/first/crl/der")
	if _, err := e.Logical().DeleteWithContext(t.Context(), e.mount+"/issuer/first"); err != nil {
		t.Fatal(err)
	}
	e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
	if !openssl(t, first.Data["certificate"].(string), last, s.Certificate) {
		t.Fatal("openssl refuses the certificate by the deleted authority's last list")
	}
	evidence, err := b.Prove(t.Context(), []broker.Grant{e.grantOf(s)})
	if err != nil || evidence[0].Outcome != broker.OutcomeUnknown || !strings.Contains(evidence[0].Answer, "its authority is gone from Vault") {
		t.Errorf("Prove() = %+v, %v, want unknown, since the certificate's authority is gone from Vault", evidence, err)
	}
}

// TestRealOtherIssuers proves certificates of two authorities of one engine, each by its own list, and also where the
// grant does not name the authority, as those of an earlier version.
func TestRealOtherIssuers(t *testing.T) {
	e := newEngine(t, role(nil))
	e.write(t, e.mount+"/root/generate/internal", map[string]any{"common_name": "Second", "issuer_name": "second", "key_type": "ec", "ttl": "24h"})
	b := newBackend(t, reader{e.Client})
	var grants []broker.Grant
	var secrets []issued
	for _, ref := range []string{"default", "second"} {
		e.write(t, e.mount+"/roles/agent", role(map[string]any{"issuer_ref": ref}))
		for range 2 {
			s, err := e.issue(t, b, "spiffe://example.org/a")
			if err != nil {
				t.Fatal(err)
			}
			secrets, grants = append(secrets, s), append(grants, e.grantOf(s))
			old := e.grantOf(s)
			old.Lease.Ref = s.Serial
			grants = append(grants, old)
		}
	}
	prove := func(n int, word string, want ...broker.Outcome) {
		t.Helper()
		evidence, err := b.Prove(t.Context(), grants)
		if err != nil {
			t.Fatalf("Prove() = %v", err)
		}
		for i, one := range evidence {
			if w := want[i/n]; one.Outcome != w || !strings.Contains(one.Answer, word) {
				t.Errorf("Prove(%d) = %s %q, want %s and %q", i, one.Outcome, one.Answer, w, word)
			}
		}
	}
	prove(8, "not revoked", broker.OutcomeAlive)
	for _, s := range secrets {
		e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
	}
	prove(8, "on the list of CN=", broker.OutcomeDead)
}

// TestRealOCSP proves certificates of an engine that makes no lists. The answers of its responder count. The list that
// Vault goes on serving is empty, and the broker does not ask for a new one.
func TestRealOCSP(t *testing.T) {
	e := newEngine(t, role(nil))
	v := &counting{reader: reader{e.Client}}
	b := newBackend(t, v)
	var grants []broker.Grant
	var leases []string
	for range 3 {
		s, err := e.issue(t, b, "spiffe://example.org/a")
		if err != nil {
			t.Fatal(err)
		}
		leases, grants = append(leases, s.lease), append(grants, e.grantOf(s))
	}
	e.write(t, e.mount+"/config/crl", map[string]any{"disable": true, "ocsp_disable": false})
	for _, lease := range leases[:2] {
		e.write(t, "sys/leases/revoke", map[string]any{"lease_id": lease, "sync": true})
	}
	prove := func(word string, want ...broker.Outcome) {
		t.Helper()
		evidence, err := b.Prove(t.Context(), grants)
		if err != nil {
			t.Fatalf("Prove() = %v", err)
		}
		for i, one := range evidence {
			if one.Outcome != want[i] || one.Outcome == broker.OutcomeDead && (!one.Listed || !strings.Contains(one.Check, "OCSP")) {
				t.Errorf("Prove() = %+v, want %s by OCSP", one, want[i])
			}
		}
		if !strings.Contains(evidence[0].Answer, word) {
			t.Errorf("Prove() = %q, want %q", evidence[0].Answer, word)
		}
	}
	dead, alive := broker.OutcomeDead, broker.OutcomeAlive
	prove("by the OCSP responder for CN=test", dead, dead, alive)
	if _, rotated := v.take(); rotated != 0 || len(e.served(t, e.mount+"/crl")) > 0 {
		t.Errorf("an engine that makes no lists was asked %d times for one, and serves %v", rotated, e.served(t, e.mount+"/crl"))
	}
	e.write(t, e.mount+"/config/crl", map[string]any{"ocsp_disable": true})
	prove("disables both its lists and its OCSP responder", alive, alive, alive)
}

// TestRealAsked proves certificates of servers that ask the responder of an engine whose list lags. A few are shown dead
// by the responder alone: no list is fetched or made, and nothing is read of the certificates. Many are shown dead by the
// list, and so is one of servers that check the list, although the responder calls it revoked.
func TestRealAsked(t *testing.T) {
	e := newEngine(t, role(nil))
	v := &counting{reader: reader{e.Client}}
	b := newBackend(t, v)
	e.write(t, e.mount+"/config/crl", map[string]any{"auto_rebuild": true})
	take := func(n int, revocation string) (grants []broker.Grant) {
		for range n {
			s, err := e.issueFor(t, b, "spiffe://example.org/a", revocation)
			if err != nil {
				t.Fatal(err)
			}
			grants = append(grants, e.grantOf(s))
			e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
		}
		return grants
	}
	prove := func(what string, grants []broker.Grant, by string, want broker.Outcome) {
		t.Helper()
		evidence, err := b.Prove(t.Context(), grants)
		if err != nil {
			t.Fatalf("Prove() = %v", err)
		}
		for _, one := range evidence {
			if one.Outcome != want || !strings.Contains(one.Check, by) || one.Listed != (want == broker.OutcomeDead) {
				t.Errorf("Prove(%s) = %+v, want %s by %s", what, one, want, by)
			}
		}
	}
	s, err := e.issueFor(t, b, "spiffe://example.org/a", "ocsp")
	if err != nil {
		t.Fatal(err)
	}
	v.take()
	prove("not revoked", []broker.Grant{e.grantOf(s)}, "OCSP", broker.OutcomeAlive)
	few := take(16, "ocsp")
	prove("a few", few, "OCSP", broker.OutcomeDead)
	if reads, rotated := v.take(); reads != 1 || rotated != 0 { // the authority's certificate
		t.Errorf("%d reads and %d new lists for certificates of servers that ask, want 1 and none", reads, rotated)
	}
	prove("one of servers that check the list", take(1, "list"), "list", broker.OutcomeDead)
	if _, rotated := v.take(); rotated != 1 {
		t.Errorf("%d new lists for one of servers that check it, want 1", rotated)
	}
	e.write(t, e.mount+"/config/crl", map[string]any{"auto_rebuild": false})
	prove("many", take(17, "ocsp"), "list", broker.OutcomeDead)
	e.write(t, e.mount+"/config/crl", map[string]any{"ocsp_disable": true})
	prove("without a responder", take(2, "ocsp"), "list", broker.OutcomeDead)
}

// TestRealRenewedIssuer renews an authority on the same key under the same name, so that both have the same lists, and
// then takes the right to sign lists from one. Certificates booked under it are on no list, and the evidence says why.
func TestRealRenewedIssuer(t *testing.T) {
	e := newEngine(t, role(nil))
	first := e.write(t, e.mount+"/root/generate/exported", map[string]any{"common_name": "Same", "issuer_name": "first", "key_type": "ec", "key_name": "same", "ttl": "24h"})
	e.write(t, e.mount+"/root/generate/existing", map[string]any{"common_name": "Same", "issuer_name": "second", "key_ref": "same", "ttl": "24h"})
	e.write(t, e.mount+"/roles/agent", role(map[string]any{"issuer_ref": "first"}))
	b := newBackend(t, reader{e.Client})
	var secrets []issued
	for range 16 {
		s, err := e.issue(t, b, "spiffe://example.org/a")
		if err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, s)
	}
	e.write(t, e.mount+"/issuer/first", map[string]any{"issuer_name": "first", "usage": "read-only,issuing-certificates,ocsp-signing"})
	var grants []broker.Grant
	for _, s := range secrets {
		e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
		grants = append(grants, e.grantOf(s))
	}
	evidence, err := b.Prove(t.Context(), grants)
	if err != nil {
		t.Fatal(err)
	}
	list := e.der(t, e.mount+"/issuer/second/crl/der")
	missing := 0
	for i, one := range evidence {
		accepted := openssl(t, first.Data["certificate"].(string), list, secrets[i].Certificate)
		if accepted != (one.Outcome == broker.OutcomeAlive) || accepted && !strings.Contains(one.Answer, "which may not sign lists: give its usage crl-signing") {
			t.Errorf("Prove() = %s %q, and openssl accepts: %v", one.Outcome, one.Answer, accepted)
		}
		if accepted {
			missing++
		}
	}
	t.Logf("%d of %d revoked certificates are on no list", missing, len(secrets))
}

// TestRealSurvey checks that the survey of an engine names each authority without a valid list, and no others.
func TestRealSurvey(t *testing.T) {
	e := newEngine(t, role(nil))
	imported := newAuthorityAs(t, "imported", 3)
	e.write(t, e.mount+"/issuers/import/cert", map[string]any{"pem_bundle": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: imported.cert.Raw}))})
	survey := func(later time.Duration) (string, error) {
		return pki.Survey(t.Context(), reader{e.Client}, e.mount, time.Now().Add(later))
	}
	want := func(found string, err error, ok bool, words ...string) {
		t.Helper()
		if err != nil {
			found = err.Error()
		}
		for _, word := range words {
			if (err == nil) != ok || !strings.Contains(found, word) {
				t.Errorf("Survey() = %q, %v; want ok %v and %q", found, err, ok, word)
			}
		}
	}
	found, err := survey(0)
	want(found, err, true, "1 authorities, each has a revocation list")
	found, err = survey(80 * time.Hour)
	want(found, err, false, "CN=test", "is not valid", "auto_rebuild")
	e.write(t, e.mount+"/root/generate/internal", map[string]any{"common_name": "Second", "issuer_name": "second", "key_type": "ec", "ttl": "24h"})
	found, err = survey(0)
	want(found, err, true, "2 authorities")
	e.write(t, e.mount+"/config/crl", map[string]any{"auto_rebuild": true, "enable_delta": true})
	found, err = survey(0)
	want(found, err, true, "enable_delta is on")
	e.write(t, e.mount+"/root/generate/internal", map[string]any{"common_name": "Third", "issuer_name": "third", "key_type": "ec", "ttl": "24h"})
	e.write(t, e.mount+"/issuer/third", map[string]any{"issuer_name": "third", "usage": "read-only,issuing-certificates"})
	found, err = survey(0)
	want(found, err, false, "CN=Third", "give its usage crl-signing")
	e.write(t, e.mount+"/config/crl", map[string]any{"auto_rebuild": false, "enable_delta": false, "disable": true})
	found, err = survey(0)
	want(found, err, true, "OCSP only")
	e.write(t, e.mount+"/config/crl", map[string]any{"ocsp_disable": true})
	found, err = survey(0)
	want(found, err, false, "no server can learn of a revocation")
	if found, err := pki.Survey(t.Context(), none{}, e.mount, time.Now()); err == nil {
		t.Errorf("Survey() with Vault down = %q, want an error", found)
	}
}
