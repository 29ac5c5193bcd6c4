package policy_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/pawlsec/pawl/broker/policy"
)

func TestKeys(t *testing.T) {
	private, public, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if !public.IsPublic() || private.IsPublic() || private.KeyID != public.KeyID {
		t.Fatal("GenerateKey returned halves that do not match")
	}
	raw, err := json.Marshal(public)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := policy.ParseKey(raw); err != nil || got.KeyID != public.KeyID || got.Algorithm != "EdDSA" {
		t.Errorf("ParseKey of the public half = %v, %v", got.KeyID, err)
	}
	set, err := policy.ParseKeySet(fmt.Appendf(nil, `{"keys":[%s]}`, raw))
	if err != nil || len(set) != 1 || set[0].KeyID != public.KeyID {
		t.Errorf("ParseKeySet = %d keys, %v", len(set), err)
	}
	secret, err := json.Marshal(private)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := policy.ParseKeySet(fmt.Appendf(nil, `{"keys":[%s]}`, secret)); err == nil || !strings.Contains(err.Error(), "private") {
		t.Errorf("ParseKeySet with a private key = %v", err)
	}
}

func TestParseKeyRefuses(t *testing.T) {
	_, public, _ := policy.GenerateKey(rand.Reader)
	with := func(from, to string) string {
		raw, _ := json.Marshal(public)
		return strings.Replace(string(raw), from, to, 1)
	}
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	wrongCurve, _ := json.Marshal(jose.JSONWebKey{Key: p384.Public()})
	for _, tt := range []struct{ name, raw, want string }{
		{"empty", "", "not one JSON object"},
		{"two keys", with("", "") + with("", ""), "not one JSON object"},
		{"repeated member", with(`{`, `{"kty":"OKP",`), "not one JSON object"},
		{"other alg", with(`"EdDSA"`, `"ES256"`), "alg"},
		{"other use", with(`"sig"`, `"enc"`), "use"},
		{"other kid", with(public.KeyID, "mine"), "thumbprint"},
		{"symmetric", `{"kty":"oct","k":"AAAA"}`, "not valid"},
		{"other curve", string(wrongCurve), "P-256"},
	} {
		if _, err := policy.ParseKey([]byte(tt.raw)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: ParseKey = %v, want %q", tt.name, err, tt.want)
		}
	}
}
