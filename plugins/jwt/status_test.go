package jwt_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/pawlsec/pawl/broker"
	pawljwt "github.com/pawlsec/pawl/plugins/jwt"
)

const listURI = "https://pawl.example.org/v1/status-lists/tokens"

// transit responds to reads like Vault's transit engine with one key.
type transit struct{ key *ecdsa.PrivateKey }

func (t transit) Read(context.Context, broker.VaultPath) (map[string]any, error) {
	der, err := x509.MarshalPKIXPublicKey(t.key.Public())
	return map[string]any{"type": "ecdsa-p256", "latest_version": json.Number("1"), "keys": map[string]any{
		"1": map[string]any{"public_key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}}}, err
}

// lister is a backend with a status list. Its clock is fixed and its ledger is a map.
type lister struct {
	*pawljwt.Backend
	t       *testing.T
	now     time.Time
	revoked map[broker.GrantID]bool
	signed  int
	public  ed25519.PublicKey
	down    error
}

func newLister(t *testing.T) *lister {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	l := &lister{t: t, now: time.Now(), revoked: map[broker.GrantID]bool{}, public: public}
	l.Backend, err = pawljwt.New(pawljwt.Config{Vault: transit{key}, Issuer: issuer, StatusURI: listURI, Now: func() time.Time { return l.now },
		Active: func(_ context.Context, id broker.GrantID) (bool, error) { return !l.revoked[id], nil },
		Sign: func(typ string, payload []byte) ([]byte, error) {
			l.signed++
			signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: private}, (&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
			if err != nil {
				return nil, err
			}
			signed, err := signer.Sign(payload)
			if err != nil {
				return nil, err
			}
			text, err := signed.CompactSerialize()
			return []byte(text), errors.Join(err, l.down)
		}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// issue returns a grant that records its token's index like the ledger, and the index that the token itself names.
func (l *lister) issue(n int) (broker.Grant, int) {
	l.t.Helper()
	g := grant(l.t, nil)
	g.ID, g.Expires = broker.GrantID(fmt.Sprintf("gr%024d", n)), l.now.Add(time.Minute)
	m, _, err := l.Prepare(l.t.Context(), tool("transit", map[string]string{"audience": "orders"}), g)
	if err != nil {
		l.t.Fatal(err)
	}
	input, err := base64.StdEncoding.DecodeString(m.Data["input"].(string))
	if err != nil {
		l.t.Fatal(err)
	}
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(string(input), ".")[1])
	if err != nil {
		l.t.Fatal(err)
	}
	var claims struct {
		Status struct {
			List struct {
				Index *int   `json:"idx"`
				URI   string `json:"uri"`
			} `json:"status_list"`
		} `json:"status"`
	}
	if err := json.Unmarshal(raw, &claims); err != nil || claims.Status.List.Index == nil || claims.Status.List.URI != listURI {
		l.t.Fatalf("the token's claims are %s, want its place in the status list", raw)
	}
	g.Lease.Ref = fmt.Sprintf("%s#%d", g.ID, *claims.Status.List.Index)
	return g, *claims.Status.List.Index
}

// status does the work of a verifier: fetch the list, verify it, unpack it, read the bit.
func (l *lister) status(index int) byte {
	l.t.Helper()
	raw, err := l.StatusList()
	if err != nil {
		l.t.Fatal(err)
	}
	signed, err := jwt.ParseSigned(string(raw), []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		l.t.Fatal(err)
	}
	var list struct {
		jwt.Claims
		TTL  int64 `json:"ttl"`
		List struct {
			Bits int    `json:"bits"`
			List string `json:"lst"`
		} `json:"status_list"`
	}
	if err := signed.Claims(l.public, &list); err != nil {
		l.t.Fatal(err)
	}
	typ := signed.Headers[0].ExtraHeaders[jose.HeaderType]
	if err := list.ValidateWithLeeway(jwt.Expected{Issuer: issuer, Subject: listURI, Time: l.now}, 0); err != nil ||
		typ != "statuslist+jwt" || list.TTL <= 0 || list.List.Bits != 1 || list.IssuedAt == nil || list.Expiry == nil {
		l.t.Fatalf("the list is %+v of type %v, %v", list.Claims, typ, err)
	}
	packed, err := base64.RawURLEncoding.DecodeString(list.List.List)
	if err != nil {
		l.t.Fatal(err)
	}
	z, err := zlib.NewReader(bytes.NewReader(packed))
	if err != nil {
		l.t.Fatal(err)
	}
	bits, err := io.ReadAll(z)
	if err != nil || len(bits)*8 <= index {
		l.t.Fatalf("the list has %d bits, and no bit %d; %v", len(bits)*8, index, err)
	}
	return bits[index/8] >> (index % 8) & 1
}

func (l *lister) sever(g broker.Grant) {
	l.t.Helper()
	l.revoked[g.ID] = true
	if err := l.Sever(l.t.Context(), []broker.Grant{g}); err != nil {
		l.t.Fatal(err)
	}
}

// TestStatusList checks that Sever sets the token's bit and no other, and that the evidence follows the list.
func TestStatusList(t *testing.T) {
	l := newLister(t)
	live, liveAt := l.issue(1)
	severed, severedAt := l.issue(2)
	if got := l.status(liveAt) + l.status(severedAt); got != 0 {
		t.Errorf("%d bits are set at first", got)
	}
	l.revoked[severed.ID] = true
	if e, err := l.Prove(t.Context(), []broker.Grant{severed}); err != nil || e[0].Outcome != broker.OutcomeAlive {
		t.Errorf("Prove() before Sever() = %+v, %v; want alive, like the list", e, err)
	}
	l.sever(severed)
	if l.status(liveAt) != 0 || l.status(severedAt) != 1 {
		t.Errorf("the bits are %d of the live token and %d of the other, want 0 and 1", l.status(liveAt), l.status(severedAt))
	}
	if e, err := l.Prove(t.Context(), []broker.Grant{live, severed}); err != nil ||
		e[0].Outcome != broker.OutcomeAlive || e[1].Outcome != broker.OutcomeDead ||
		!strings.Contains(e[1].Check, "status list") {
		t.Errorf("Prove() = %+v, %v; want alive and dead by the list", e, err)
	}
}

// TestStatusListIsSignedSeldom checks that the list is signed only after a change or at half of its life. Anonymous
// clients may request it, so a request must not cost a signature.
func TestStatusListIsSignedSeldom(t *testing.T) {
	l := newLister(t)
	g, at := l.issue(1)
	for range 100 {
		l.status(at)
	}
	other, _ := l.issue(2)
	l.status(at)
	if l.signed != 1 {
		t.Errorf("%d signatures for a list that did not change, want 1", l.signed)
	}
	l.sever(g)
	l.sever(g)
	for range 100 {
		l.status(at)
	}
	l.now = l.now.Add(pawljwt.HalfLife)
	l.status(at)
	if l.signed != 3 {
		t.Errorf("%d signatures after a change and half a life, want one each", l.signed)
	}
	l.sever(other)
	l.down = errors.New("no key")
	if raw, err := l.StatusList(); err == nil {
		t.Errorf("StatusList() that cannot be signed = %q, want an error and not the previous list", raw)
	}
}

// TestIndexes checks that no two live tokens share an index, and that the number of indexes is bounded. A freed index
// must not confuse a verifier.
func TestIndexes(t *testing.T) {
	l := newLister(t)
	taken := map[int]bool{}
	ordered := true
	last := -1
	var severed broker.Grant
	var severedAt int
	for n := range 2000 {
		g, at := l.issue(n)
		if taken[at] {
			t.Fatalf("token %d shares index %d with a live token", n, at)
		}
		ordered = ordered && at > last
		taken[at], last, severed, severedAt = true, at, g, at
	}
	if ordered {
		t.Error("indexes ascend, and reveal the order of tokens")
	}
	l.sever(severed)
	l.SetCapacity(2000)
	refused := func() bool {
		g := grant(t, nil)
		g.ID, g.Expires = "gr999999999999999999999999", l.now.Add(time.Minute)
		_, _, err := l.Prepare(t.Context(), tool("transit", map[string]string{"audience": "orders"}), g)
		if err != nil && !errors.Is(err, broker.Unavailable) {
			t.Fatalf("Prepare() = %v, want Unavailable", err)
		}
		return err != nil
	}
	if !refused() {
		t.Error("a full list accepted one more token")
	}
	l.now = l.now.Add(time.Minute + pawljwt.Retention)
	if l.status(severedAt) != 1 || !refused() {
		t.Error("an index was freed while a verifier may still read it")
	}
	l.now = l.now.Add(time.Second)
	if refused() || l.status(severedAt) != 0 {
		t.Error("an index was not freed after its token's time")
	}
}

// TestRestore checks that the next process has the same bits, and allocates no index that is in use.
func TestRestore(t *testing.T) {
	before := newLister(t)
	live, liveAt := before.issue(1)
	revoked, revokedAt := before.issue(2)
	none := grant(t, nil) // issued before there was a status list
	none.Lease.Ref = string(none.ID)
	l := newLister(t)
	broken := revoked
	broken.Lease.Ref = string(revoked.ID) + "#4294967295"
	active := func(id broker.GrantID) (bool, error) { return id != revoked.ID, nil }
	if err := l.Restore([]broker.Grant{live, revoked, none, broken}, active); err != nil {
		t.Fatal(err)
	}
	if l.status(liveAt) != 0 || l.status(revokedAt) != 1 {
		t.Errorf("after a restart the bits are %d and %d, want 0 and 1", l.status(liveAt), l.status(revokedAt))
	}
	l.sever(live)
	if l.status(liveAt) != 1 {
		t.Error("a token from before the restart was severed, and its bit is not set")
	}
	down := errors.New("down")
	if err := newLister(t).Restore([]broker.Grant{live}, func(broker.GrantID) (bool, error) { return false, down }); !errors.Is(err, down) {
		t.Errorf("Restore() without a ledger = %v, want its error", err)
	}
}

func TestStatusURI(t *testing.T) {
	sign := func(string, []byte) ([]byte, error) { return nil, nil }
	for _, cfg := range []pawljwt.Config{{StatusURI: "http://a/x", Sign: sign}, {StatusURI: "https://a/x"}, {StatusURI: "https:///x", Sign: sign}, {StatusURI: "https://a/#x", Sign: sign}} {
		cfg.Vault, cfg.Issuer, cfg.Active = nothing{}, issuer, always
		if _, err := pawljwt.New(cfg); err == nil {
			t.Errorf("New() accepted the status list %q", cfg.StatusURI)
		}
	}
	if _, err := newBackend(t, nothing{}, nil).StatusList(); err == nil {
		t.Error("StatusList() without one succeeded")
	}
}
