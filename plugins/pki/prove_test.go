package pki_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/plugins/pki"
)

// counting is a reader that counts, and refuses to rotate while it is told to.
type counting struct {
	reader
	mu      sync.Mutex // guards what follows
	reads   int
	rotated int
	refuse  bool
}

func (c *counting) Read(ctx context.Context, path []string) (map[string]any, error) {
	c.mu.Lock()
	c.reads++
	rotate := path[len(path)-1] == "rotate"
	if rotate {
		c.rotated++
	}
	refuse := rotate && c.refuse
	c.mu.Unlock()
	if refuse {
		return nil, errors.New("permission denied")
	}
	return c.reader.Read(ctx, path)
}

// take gives the counts and begins anew.
func (c *counting) take() (reads, rotated int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reads, rotated, c.reads, c.rotated = c.reads, c.rotated, 0, 0
	return reads, rotated
}

// served says whether the list that relying parties fetch has the certificate: without a token, as
// they do.
func (e *engine) served(t *testing.T, path, number string) bool {
	t.Helper()
	anybody, err := e.Clone()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := anybody.Logical().ReadRawWithContext(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	crl, err := x509.ParseRevocationList(raw)
	if err != nil {
		t.Fatalf("the list at %s: %v", path, err)
	}
	for _, entry := range crl.RevokedCertificateEntries {
		if fmt.Sprintf("%x", entry.SerialNumber) == strings.TrimLeft(strings.ReplaceAll(number, ":", ""), "0") {
			return true
		}
	}
	return false
}

func (e *engine) grantOf(s issued) broker.Grant {
	return broker.Grant{ID: "gr1", Path: e.mount + "/agent", Expires: time.Now().Add(time.Minute), Lease: broker.Lease{Ref: s.finished.Ref, Expires: s.finished.Expires}}
}

// TestRealServedList holds that dead is what relying parties can read. With auto_rebuild Vault says
// revoked hours before its list does: then it is asked for a new list, once for all, and where it
// refuses that the certificates count as alive.
func TestRealServedList(t *testing.T) {
	e := newEngine(t, role(nil))
	e.write(t, e.mount+"/config/crl", map[string]any{"auto_rebuild": true, "auto_rebuild_grace_period": "12h", "expiry": "72h"})
	v := &counting{reader: reader{e.Client}, refuse: true}
	b := newBackend(t, v)
	var grants []broker.Grant
	for range 40 {
		s, err := e.issue(t, b, "spiffe://example.org/a")
		if err != nil {
			t.Fatal(err)
		}
		e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
		grants = append(grants, e.grantOf(s))
	}
	prove := func(want broker.Outcome, text string) {
		t.Helper()
		evidence, err := b.Prove(t.Context(), grants)
		if err != nil {
			t.Fatalf("Prove() = %v", err)
		}
		for i, one := range evidence {
			onList := e.served(t, e.mount+"/crl", grants[i].Lease.Ref)
			if one.Outcome != want || !strings.Contains(one.Answer, text) || onList != (want == broker.OutcomeDead) {
				t.Fatalf("certificate %d: %s %q, and it is on the list %v; want %s %q", i, one.Outcome, one.Answer, onList, want, text)
			}
		}
	}
	prove(broker.OutcomeAlive, "Vault makes no other when asked")
	v.take()
	v.refuse = false
	prove(broker.OutcomeDead, "on the list of CN=test of ")
	if _, rotated := v.take(); rotated != 1 {
		t.Errorf("the list was made anew %d times for 40 certificates, want once", rotated)
	}
	prove(broker.OutcomeDead, "on the list of CN=test of ")
	if reads, rotated := v.take(); reads != 1 || rotated != 0 {
		t.Errorf("40 certificates on the list took %d reads and %d new lists, want 1 and 0", reads, rotated)
	}
}

// TestRealIssuers holds that each certificate is looked for on its own authority's list.
func TestRealIssuers(t *testing.T) {
	e := newEngine(t, role(nil))
	other := e.write(t, e.mount+"/root/generate/internal", map[string]any{"common_name": "other", "issuer_name": "other", "key_type": "ec", "ttl": "24h"})
	e.write(t, e.mount+"/roles/agent", role(map[string]any{"issuer_ref": "other"}))
	b := newBackend(t, reader{e.Client})
	s, err := e.issue(t, b, "spiffe://example.org/a")
	if err != nil {
		t.Fatal(err)
	}
	g := e.grantOf(s)
	e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
	evidence, err := b.Prove(t.Context(), []broker.Grant{g})
	if err != nil || evidence[0].Outcome != broker.OutcomeDead || !strings.Contains(evidence[0].Answer, "on the list of CN=other of ") {
		t.Errorf("Prove() = %v, %v, want dead by the other authority's list", evidence, err)
	}
	if e.served(t, e.mount+"/crl", g.Lease.Ref) || !e.served(t, e.mount+"/issuer/"+other.Data["issuer_id"].(string)+"/crl/der", g.Lease.Ref) {
		t.Error("the certificate is on the wrong authority's list")
	}
}

// TestLists holds what is taken for a list: one that is in force.
func TestLists(t *testing.T) {
	now := time.Now()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, SubjectKeyId: []byte{1}, KeyUsage: x509.KeyUsageCRLSign}
	crl := func(next time.Time, reason int) string {
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now.Add(-time.Hour), NextUpdate: next,
			RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(258), RevocationTime: now, ReasonCode: reason}}}, ca, key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
	}
	good := crl(now.Add(time.Hour), 0)
	g := broker.Grant{ID: "gr1", Path: "pki/agent", Expires: now.Add(time.Minute), Lease: broker.Lease{Ref: "01:02", Expires: now.Add(time.Minute)}}
	for name, row := range map[string]struct {
		list string
		want broker.Outcome
		fail bool
	}{
		"good":        {good, broker.OutcomeDead, false},
		"expired":     {crl(now.Add(-time.Second), 0), broker.OutcomeAlive, false},
		"taken off":   {crl(now.Add(time.Hour), 8), broker.OutcomeAlive, false},
		"none":        {"", broker.OutcomeAlive, false},
		"two":         {good + good, "", true},
		"no PEM":      {"x", "", true},
		"another PEM": {strings.ReplaceAll(good, "X509 CRL", "CERTIFICATE"), "", true},
		"cut":         {good[:len(good)/2] + "\n-----END X509 CRL-----\n", "", true},
	} {
		evidence, err := newBackend(t, lists(row.list)).Prove(t.Context(), []broker.Grant{g})
		if (err != nil) != row.fail || err == nil && evidence[0].Outcome != row.want {
			t.Errorf("Prove() with a list that is %s = %v, %v, want %q", name, evidence, err, row.want)
		}
	}
}

// lists is a Vault that serves a list and knows no certificate otherwise than as revoked.
type lists string

func (l lists) Read(_ context.Context, path []string) (map[string]any, error) {
	if path[len(path)-1] == "crl" {
		return map[string]any{"certificate": string(l), "crl": string(l)}, nil
	}
	return map[string]any{"revocation_time": json.Number("1700000000")}, nil
}

var _ pki.Reader = lists("")
