package pki_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/pki"
)

// counting is a reader that counts its requests. While refuse is set, it refuses to rotate.
type counting struct {
	reader
	mu      sync.Mutex // guards the fields below
	reads   int        // of paths and lists
	rotated int
	refuse  bool
}

func (c *counting) Read(ctx context.Context, path broker.VaultPath) (map[string]any, error) {
	c.mu.Lock()
	c.reads++
	c.mu.Unlock()
	return c.reader.Read(ctx, path)
}

func (c *counting) Fetch(ctx context.Context, path broker.VaultPath, limit int64) ([]byte, error) {
	c.mu.Lock()
	c.reads++
	rotate := strings.HasSuffix(path.String(), "/rotate")
	if rotate {
		c.rotated++
	}
	refuse := rotate && c.refuse
	c.mu.Unlock()
	if refuse {
		return nil, errors.New("permission denied")
	}
	return c.reader.Fetch(ctx, path, limit)
}

// take returns the counts and resets them.
func (c *counting) take() (reads, rotated int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reads, rotated, c.reads, c.rotated = c.reads, c.rotated, 0, 0
	return reads, rotated
}

// served returns the serial numbers on a list, in hexadecimal. It fetches the list without a token, as relying parties
// do.
func (e *engine) served(t *testing.T, path string) map[string]bool {
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
	crl, err := x509.ParseRevocationList(raw)
	if err != nil {
		t.Fatalf("the list at %s: %v", path, err)
	}
	on := map[string]bool{}
	for _, entry := range crl.RevokedCertificateEntries {
		on[entry.SerialNumber.Text(16)] = true
	}
	return on
}

func (e *engine) grantOf(s issued) broker.Grant {
	return broker.Grant{ID: "gr1", Path: brokertest.Path(e.mount + "/agent"), Expires: time.Now().Add(time.Minute), Lease: broker.Lease{Ref: s.finished.Ref, Expires: s.finished.Expires}}
}

// serialOf returns the serial number in a grant's name for its certificate, in hexadecimal.
func serialOf(g broker.Grant) string {
	serial, _, _ := strings.Cut(g.Lease.Ref, " by ")
	return strings.TrimLeft(strings.ReplaceAll(serial, ":", ""), "0")
}

// TestRealServedList checks that dead means listed where relying parties read. With auto_rebuild Vault records a
// revocation hours before its list shows it. Prove then requests one rebuild for all certificates. If Vault refuses
// that, the certificates count as alive. The number of requests does not grow with the number of certificates.
func TestRealServedList(t *testing.T) {
	reads := map[int]int{}
	for _, n := range []int{40, 320} {
		reads[n] = proveServed(t, n)
	}
	if reads[320] != reads[40] {
		t.Errorf("the proof of 40 certificates took %d requests to Vault, that of 320 took %d; want the same",
			reads[40], reads[320])
	}
}

// proveServed returns the number of requests to Vault for a proof of n certificates that are on no list yet.
func proveServed(t *testing.T, n int) (reads int) {
	e := newEngine(t, role(nil))
	e.write(t, e.mount+"/config/crl", map[string]any{"auto_rebuild": true, "auto_rebuild_grace_period": "12h", "expiry": "72h"})
	v := &counting{reader: reader{e.Client}, refuse: true}
	b := newBackend(t, v)
	var grants []broker.Grant
	for range n {
		s, err := e.issue(t, b, "spiffe://example.org/a")
		if err != nil {
			t.Fatal(err)
		}
		e.write(t, "sys/leases/revoke", map[string]any{"lease_id": s.lease, "sync": true})
		grants = append(grants, e.grantOf(s))
	}
	prove := func(want broker.Outcome, text string, all bool) {
		t.Helper()
		evidence, err := b.Prove(t.Context(), grants)
		if err != nil {
			t.Fatalf("Prove() = %v", err)
		}
		served, matched := e.served(t, e.mount+"/crl"), 0
		for i, one := range evidence {
			onList := served[serialOf(grants[i])]
			if one.Outcome != want || onList != (want == broker.OutcomeDead) {
				t.Fatalf("certificate %d: %s %q, on the list: %v; want %s", i, one.Outcome, one.Answer, onList, want)
			}
			if strings.Contains(one.Answer, text) {
				matched++
			}
		}
		if matched == 0 || all && matched < n {
			t.Errorf("%d of %d certificates are %q, want more", matched, n, text)
		}
	}
	prove(broker.OutcomeAlive, "Vault does not rebuild the list on request", false)
	v.take()
	v.refuse = false
	prove(broker.OutcomeDead, "on the list of CN=test, issued at ", true)
	reads, rotated := v.take()
	if rotated != 1 {
		t.Errorf("the list was rebuilt %d times for %d certificates, want once", rotated, n)
	}
	prove(broker.OutcomeDead, "on the list of CN=test, issued at ", true)
	if again, rotated := v.take(); again != 1 || rotated != 0 {
		t.Errorf("%d certificates on the list took %d reads and %d rebuilds, want 1 and 0", n, again, rotated)
	}
	return reads
}

// TestRealIssuers checks that each certificate is checked against its own authority's list.
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
	if err != nil || evidence[0].Outcome != broker.OutcomeDead ||
		!strings.Contains(evidence[0].Answer, "on the list of CN=other, issued at ") {
		t.Errorf("Prove() = %v, %v, want dead by the other authority's list", evidence, err)
	}
	number := serialOf(g)
	if e.served(t, e.mount+"/crl")[number] || !e.served(t, e.mount+"/issuer/"+other.Data["issuer_id"].(string)+"/crl/der")[number] {
		t.Error("the certificate is on the wrong authority's list")
	}
}

// authority signs lists.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) authority { return newAuthorityAs(t, "ca", 1) }

func newAuthorityAs(t testing.TB, name string, keyID byte) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, SubjectKeyId: []byte{keyID},
		KeyUsage: x509.KeyUsageCRLSign | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func (a authority) sign(t testing.TB, next time.Time, entries ...x509.RevocationListEntry) []byte {
	t.Helper()
	return a.signWith(t, next, nil, entries...)
}

func (a authority) signWith(t testing.TB, next time.Time, more []pkix.Extension, entries ...x509.RevocationListEntry) []byte {
	t.Helper()
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: next.Add(-2 * time.Hour), NextUpdate: next,
		RevokedCertificateEntries: entries, ExtraExtensions: more}, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func entry(number int64, reason int) x509.RevocationListEntry {
	return x509.RevocationListEntry{SerialNumber: big.NewInt(number), RevocationTime: time.Now(), ReasonCode: reason}
}

// grant258 returns a grant of a certificate with serial number 258, by the authority.
func (a authority) grant258() broker.Grant {
	end := time.Now().Add(time.Minute)
	return broker.Grant{ID: "gr1", Path: brokertest.Path("pki/agent"), Expires: end, Lease: broker.Lease{Ref: pki.RefOf("01:02", a.cert), Expires: end}}
}

// TestLists checks that only a single, well-formed and unexpired list proves a certificate dead.
func TestLists(t *testing.T) {
	a, later := newAuthority(t), time.Now().Add(time.Hour)
	good := a.sign(t, later, entry(258, 0))
	foreign := entry(258, 0)
	foreign.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 29}, Critical: true, Value: []byte{0x30, 0}}}
	for name, row := range map[string]struct {
		list []byte
		want broker.Outcome
		fail bool
	}{
		"good":             {good, broker.OutcomeDead, false},
		"with a reason":    {a.sign(t, later, entry(7, 1), entry(258, 4)), broker.OutcomeDead, false},
		"without it":       {a.sign(t, later, entry(2, 0), entry(1<<40+258, 0)), broker.OutcomeAlive, false},
		"empty":            {a.sign(t, later), broker.OutcomeAlive, false},
		"expired":          {a.sign(t, time.Now().Add(-time.Second), entry(258, 0)), broker.OutcomeAlive, false},
		"taken off":        {a.sign(t, later, entry(258, 8)), broker.OutcomeAlive, false},
		"none":             {nil, broker.OutcomeAlive, false},
		"two":              {append(bytes.Clone(good), good...), "", true},
		"text":             {[]byte("x"), "", true},
		"truncated":        {good[:len(good)/2], "", true},
		"in PEM":           {pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: good}), "", true},
		"half of one more": {append(bytes.Clone(good), good[:20]...), "", true},
		// Two authorities differ by key id or by name. A list with a critical extension is not complete.
		"another key's":  {newAuthorityAs(t, "ca", 2).sign(t, later, entry(258, 0)), broker.OutcomeAlive, false},
		"another name's": {newAuthorityAs(t, "cb", 1).sign(t, later, entry(258, 0)), broker.OutcomeAlive, false},
		"a delta": {a.signWith(t, later, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}},
			entry(258, 0)), broker.OutcomeAlive, false},
		"of another issuer's certificates": {a.sign(t, later, foreign), broker.OutcomeAlive, false},
	} {
		evidence, err := newBackend(t, vaultOf(a, row.list)).Prove(t.Context(), []broker.Grant{a.grant258()})
		if (err != nil) != row.fail || err == nil && evidence[0].Outcome != row.want {
			t.Errorf("Prove() with a list that is %s = %v, %v, want %q", name, evidence, err, row.want)
		}
	}
}

// TestUnrecorded holds that a certificate whose record a crash may have lost is not called expired before its latest end.
func TestUnrecorded(t *testing.T) {
	a := newAuthority(t)
	lost := a.grant258()
	lost.Lease, lost.State, lost.Longest = broker.Lease{}, broker.StateHandle, 5*time.Minute
	lost.Expires = time.Now().Add(-2 * time.Minute)
	lost.Created = lost.Expires.Add(-time.Minute)
	ended := lost
	lost.MintDeadline, ended.MintDeadline = time.Now().Add(-time.Minute), time.Now().Add(-10*time.Minute)
	e, err := newBackend(t, vaultOf(a, a.sign(t, time.Now().Add(time.Hour)))).Prove(t.Context(), []broker.Grant{lost, ended})
	if err != nil || e[0].Outcome == broker.OutcomeDead || e[1].Outcome != broker.OutcomeDead {
		t.Errorf("Prove() = %+v, %v, want only the second dead", e, err)
	}
}

// TestLongList checks that a list of several megabytes proves its certificates dead, and no others.
func TestLongList(t *testing.T) {
	entries := make([]x509.RevocationListEntry, 200_000)
	for i := range entries {
		entries[i] = entry(1<<40+int64(i), 0)
	}
	entries[150_000] = entry(258, 0)
	a := newAuthority(t)
	long := a.sign(t, time.Now().Add(time.Hour), entries...)
	other := a.grant258()
	other.Lease.Ref = pki.RefOf("01:03", a.cert)
	evidence, err := newBackend(t, vaultOf(a, long)).Prove(t.Context(), []broker.Grant{a.grant258(), other})
	if err != nil || evidence[0].Outcome != broker.OutcomeDead || evidence[1].Outcome != broker.OutcomeAlive {
		t.Errorf("Prove() with a list of %d bytes = %v, %v, want the first dead, the other alive", len(long), evidence, err)
	}
}

// FuzzList compares the parser with the standard library's, which keeps the whole list in memory and ignores trailing
// data. Ours rejects trailing data.
func FuzzList(f *testing.F) {
	a, later := newAuthority(f), time.Now().Add(time.Hour)
	f.Add(a.sign(f, later, entry(258, 0), entry(3, 1)))
	f.Add(a.sign(f, later, entry(258, 8)))
	f.Add(a.sign(f, later))
	f.Fuzz(func(t *testing.T, der []byte) {
		if len(der) == 0 {
			return
		}
		crl, wrong := x509.ParseRevocationList(der)
		evidence, err := newBackend(t, vaultOf(a, der)).Prove(t.Context(), []broker.Grant{a.grant258()})
		if err != nil || wrong != nil {
			return // each parser is stricter than the other somewhere
		}
		on, own := false, bytes.Equal(crl.AuthorityKeyId, a.cert.SubjectKeyId) && bytes.Equal(crl.RawIssuer, a.cert.RawSubject)
		for _, e := range crl.Extensions {
			own = own && !e.Critical
		}
		for _, e := range crl.RevokedCertificateEntries {
			foreign := slices.ContainsFunc(e.Extensions, func(x pkix.Extension) bool {
				return x.Critical && !x.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 21})
			})
			on = on || e.SerialNumber.Cmp(big.NewInt(258)) == 0 && e.ReasonCode != 8 && !foreign
		}
		if want := on && own && time.Now().Before(crl.NextUpdate); want != (evidence[0].Outcome == broker.OutcomeDead) {
			t.Errorf("Prove() = %v, on the list: %v", evidence, on)
		}
	})
}

// lists is a Vault with one authority that serves one list and reports every certificate as revoked.
type lists struct {
	list      []byte
	authority []byte // its certificate
}

func vaultOf(a authority, list []byte) lists { return lists{list, a.cert.Raw} }

func (l lists) Read(context.Context, broker.VaultPath) (map[string]any, error) {
	return map[string]any{"revocation_time": json.Number("1700000000")}, nil
}

func (l lists) Fetch(_ context.Context, path broker.VaultPath, limit int64) ([]byte, error) {
	if s := path.Segments(); len(s) == 4 && s[3] == "der" {
		return l.authority, nil
	}
	if int64(len(l.list)) > limit {
		return nil, errors.New("longer than the limit")
	}
	return l.list, nil
}

func (l lists) List(context.Context, broker.VaultPath) (map[string]map[string]any, error) {
	return map[string]map[string]any{"only": {"key_id": "k"}}, nil
}

func (l lists) OCSP(context.Context, string, []byte) ([]byte, error) { return nil, errors.New("off") }

var _ pki.Reader = lists{}

// slow is a Vault that takes a second to rebuild a list.
type slow struct {
	lists
	now     time.Time
	rotated int
}

func (s *slow) Fetch(ctx context.Context, path broker.VaultPath, limit int64) ([]byte, error) {
	if strings.HasSuffix(path.String(), "/rotate") {
		s.rotated++
		s.now = s.now.Add(time.Second)
		return nil, nil
	}
	return s.lists.Fetch(ctx, path, limit)
}

// TestRenewals checks that rebuilds leave Vault most of its time. Vault revokes nothing during a rebuild.
func TestRenewals(t *testing.T) {
	a := newAuthority(t)
	s := &slow{lists: vaultOf(a, a.sign(t, time.Now().Add(time.Hour))), now: time.Now()}
	b, err := pki.New(pki.Config{Vault: s, Now: func() time.Time { return s.now }})
	if err != nil {
		t.Fatal(err)
	}
	g := a.grant258()
	for _, row := range []struct {
		later time.Duration
		want  int
		text  string
	}{
		{0, 1, "not on the list"},
		{0, 1, "a rebuild of the list was requested a moment ago"},
		{1900 * time.Millisecond, 1, "a rebuild of the list was requested a moment ago"},
		{200 * time.Millisecond, 2, "not on the list"},
	} {
		s.now = s.now.Add(row.later)
		evidence, err := b.Prove(t.Context(), []broker.Grant{g})
		if err != nil || evidence[0].Outcome != broker.OutcomeAlive || !strings.Contains(evidence[0].Answer, row.text) || s.rotated != row.want {
			t.Errorf("%v later: Prove() = %v, %v after %d rebuilds, want alive, %q and %d",
				row.later, evidence, err, s.rotated, row.text, row.want)
		}
	}
}
