package policy_test

import (
	"encoding/json"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/pawlsec/pawl/broker/policy"
)

// FuzzKeySet checks that every trusted key is public, tied to one algorithm and named by its thumbprint. It must also
// survive writing and reading.
func FuzzKeySet(f *testing.F) {
	private, public := keys(f, 2)
	write := func(list ...jose.JSONWebKey) []byte {
		raw, err := json.Marshal(jose.JSONWebKeySet{Keys: list})
		if err != nil {
			f.Fatal(err)
		}
		return raw
	}
	f.Add(write(public...))
	f.Add(write(private[0]))
	f.Add([]byte(`{"keys":[]}`))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AA"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA","use":"enc"}],"keys":[]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		set, err := policy.ParseKeySet(raw)
		if err != nil {
			if len(set) != 0 {
				t.Errorf("ParseKeySet(%q) gives keys with %v", raw, err)
			}
			return
		}
		for _, k := range set {
			if !k.IsPublic() || !k.Valid() || k.KeyID == "" || k.Algorithm == "" || k.Use != "sig" {
				t.Errorf("ParseKeySet(%q) = a key %q of %q for %q, public %v", raw, k.KeyID, k.Algorithm, k.Use, k.IsPublic())
			}
			one, err := json.Marshal(k)
			if err != nil {
				t.Fatal(err)
			}
			again, err := policy.ParseKey(one)
			if err != nil || again.KeyID != k.KeyID || again.Algorithm != k.Algorithm {
				t.Errorf("ParseKey(%s) = %q %q, %v, want %q %q", one, again.KeyID, again.Algorithm, err, k.KeyID, k.Algorithm)
			}
		}
	})
}
