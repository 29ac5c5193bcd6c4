package envelope_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/envelope"
	"github.com/pawlsec/pawl/broker/jws"
)

type object = map[string]any

var (
	now     = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)
	planner = spiffeid.RequireFromString("spiffe://example.org/planner")
)

// rig has two issuers with a key each, both under the kid "one".
type rig struct {
	envelope.Issuers
	desk, other ed25519.PrivateKey
	ec          *ecdsa.PrivateKey // a second key of the desk
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{}
	var err error
	if _, r.desk, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	if _, r.other, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	if r.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	r.Issuers, err = envelope.New(
		envelope.Issuer{Name: "https://desk.example", Audience: "pawl.example", MaxAge: time.Hour,
			Keys: parse(t, jose.JSONWebKey{Key: r.desk.Public(), KeyID: "one"}, jose.JSONWebKey{Key: r.ec.Public(), KeyID: "two"})},
		envelope.Issuer{Name: "https://other.example", Audience: "pawl.example",
			Keys: parse(t, jose.JSONWebKey{Key: r.other.Public(), KeyID: "one"})})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func parse(t testing.TB, keys ...jose.JSONWebKey) []jose.JSONWebKey {
	t.Helper()
	raw, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	list, err := jws.ParseKeys(raw)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func head() object { return object{"alg": "EdDSA", "kid": "one", "typ": envelope.Type} }

func claims() object {
	return object{"iss": "https://desk.example", "aud": "pawl.example", "sub": planner.String(), "jti": "j-1",
		"iat": now.Unix() - 60, "exp": now.Unix() + 600, "task": "ticket 17", "labels": object{"team": "payments"},
		"on_behalf_of": "ana"}
}

func seal(t testing.TB, header, payload []byte, sign func([]byte) []byte) string {
	t.Helper()
	signed := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	return signed + "." + base64.RawURLEncoding.EncodeToString(sign([]byte(signed)))
}

func (r *rig) by(key ed25519.PrivateKey) func([]byte) []byte {
	return func(signed []byte) []byte { return ed25519.Sign(key, signed) }
}

func encode(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestVerify(t *testing.T) {
	r := newRig(t)
	token := seal(t, encode(t, head()), encode(t, claims()), r.by(r.desk))
	got, err := r.Verify(token, planner, now)
	if err != nil {
		t.Fatalf("Verify = %v, want the envelope", err)
	}
	if len(got.Digest) != len("sha256:")+64 {
		t.Errorf("Digest = %q", got.Digest)
	}
	got.Digest = ""
	if want := (broker.Envelope{Issuer: "https://desk.example", ID: "j-1", Task: "ticket 17", Labels: map[string]string{"team": "payments"},
		Behalf: "ana", Issued: now.Add(-time.Minute), Expires: now.Add(10 * time.Minute)}); !reflect.DeepEqual(got, want) {
		t.Errorf("Verify = %+v, want %+v", got, want)
	}
	for _, change := range []object{
		{"aud": []string{"pawl.example"}}, {"on_behalf_of": "spiffe://example.org/people/ana"}, {"on_behalf_of": nil, "task": nil, "labels": nil},
		{"nbf": now.Unix() + 29}, {"iat": now.Unix() + 29}, {"iat": now.Unix() - 3600}, {"exp": now.Unix() + 1},
	} {
		c := claims()
		maps.Copy(c, change)
		if _, err := r.Verify(seal(t, encode(t, head()), encode(t, c), r.by(r.desk)), planner, now); err != nil {
			t.Errorf("Verify with %v = %v, want the envelope", change, err)
		}
	}
}

// TestRefused walks the ways round an envelope. Each token differs in one respect from one that is accepted.
func TestRefused(t *testing.T) {
	r := newRig(t)
	plain := func(h, c object) string { return seal(t, encode(t, h), encode(t, c), r.by(r.desk)) }
	claim := func(name string, value any) string { c := claims(); c[name] = value; return plain(head(), c) }
	header := func(name string, value any) string { h := head(); h[name] = value; return plain(h, claims()) }
	raw := func(payload string) string { return seal(t, encode(t, head()), []byte(payload), r.by(r.desk)) }
	without := func(name string) string { c := claims(); delete(c, name); return plain(head(), c) }
	good := plain(head(), claims())
	parts := strings.Split(good, ".")
	text := string(encode(t, claims()))
	hmacWithPublicKey := func(signed []byte) []byte {
		m := hmac.New(sha256.New, r.desk.Public().(ed25519.PublicKey))
		m.Write(signed)
		return m.Sum(nil)
	}
	for _, row := range []struct{ name, token, want string }{
		{"empty", "", "not a compact JWS"},
		{"alg none", seal(t, []byte(`{"alg":"none","kid":"one","typ":"`+envelope.Type+`"}`), encode(t, claims()), func([]byte) []byte { return nil }), "no key of its issuer"},
		{"alg HS256 with the public key as the secret", seal(t, []byte(`{"alg":"HS256","kid":"one","typ":"`+envelope.Type+`"}`), encode(t, claims()), hmacWithPublicKey), "no key of its issuer"},
		{"alg of another key", header("alg", "ES256"), "no key of its issuer"},
		{"alg in other case", header("alg", "eddsa"), "no key of its issuer"},
		{"kid of no key", header("kid", "three"), "no key of its issuer"},
		{"kid of another key", header("kid", "two"), "no key of its issuer"},
		{"kid that is a path", header("kid", "../one"), "no key of its issuer"},
		{"no kid", plain(object{"alg": "EdDSA", "typ": envelope.Type}, claims()), "no key of its issuer"},
		{"a key in the header", header("jwk", object{"kty": "OKP"}), "alg, kid and typ alone"},
		{"a key's address in the header", header("jku", "https://thief.example"), "alg, kid and typ alone"},
		{"crit", header("crit", []string{"exp"}), "alg, kid and typ alone"},
		{"alg twice", seal(t, []byte(`{"alg":"EdDSA","alg":"EdDSA","kid":"one","typ":"`+envelope.Type+`"}`), encode(t, claims()), r.by(r.desk)), "alg, kid and typ alone"},
		{"another type", header("typ", "JWT"), "typ is not"},
		{"another type's case", header("typ", "PAWL-ENVELOPE+JWT"), "typ is not"},
		{"the key of another issuer", seal(t, encode(t, head()), encode(t, claims()), r.by(r.other)), "no key of its issuer"},
		{"in the name of another issuer", claim("iss", "https://other.example"), "no key of its issuer"},
		{"an unknown issuer", claim("iss", "https://desk.example/"), "does not name its issuer"},
		{"a changed claim", parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(text, "ana", "bob", 1))) + "." + parts[2], "no key of its issuer"},
		{"an empty signature", parts[0] + "." + parts[1] + ".", "no key of its issuer"},
		{"padding", good + "=", "base64url"},
		{"a line break", parts[0] + "." + parts[1][:4] + "\n" + parts[1][4:] + "." + parts[2], "base64url"},
		{"two tokens", good + "." + parts[2], "compact JWS"},
		{"long", good + strings.Repeat("A", jws.MaxToken), "longer than"},

		{"a claim twice", raw(strings.Replace(text, `"jti"`, `"jti":"j-0","jti"`, 1)), "at most once"},
		{"a label twice", raw(strings.Replace(text, `"team"`, `"team":"x","team"`, 1)), "at most once"},
		{"a claim that differs in case", raw(strings.Replace(text, `"task"`, `"Task"`, 1)), "at most once"},
		{"an escaped name of a claim", raw(strings.Replace(text, `"sub"`, `"\u0073ub":"spiffe://example.org/thief","sub"`, 1)), "at most once"},
		{"a claim that is not known", claim("lables", object{}), "at most once"},
		{"claims after the claims", raw(text + text), "at most once"},
		{"a list", raw("[" + text + "]"), "at most once"},

		{"another caller", claim("sub", "spiffe://example.org/planner/x"), "another caller"},
		{"another spelling of the caller", claim("sub", "SPIFFE://example.org/planner"), "another caller"},
		{"no caller", without("sub"), "another caller"},
		{"another broker", claim("aud", "pawl.other"), "not this broker alone"},
		{"another broker too", claim("aud", []string{"pawl.example", "pawl.other"}), "not this broker alone"},
		{"no audience", claim("aud", []string{}), "not this broker alone"},

		{"expired", claim("exp", now.Unix()), "expired"},
		{"no end", without("exp"), "no iat or no exp"},
		{"no begin", without("iat"), "no iat or no exp"},
		{"an end that is null", claim("exp", nil), "no iat or no exp"},
		{"an end that is text", claim("exp", "9999999999"), "at most once"},
		{"an end with a fraction", raw(strings.Replace(text, `"exp":`, `"exp":1.5e9,"nbf":`, 1)), "at most once"},
		{"an end beyond all time", claim("exp", int64(1)<<62), "not a time"},
		{"a begin before all time", claim("iat", -1), "not a time"},
		{"from the future", claim("iat", now.Unix()+31), "from the future"},
		{"not valid yet", claim("nbf", now.Unix()+31), "from the future"},
		{"old", claim("iat", now.Unix()-3601), "more than 1h0m0s ago"},
		{"for a year", claim("exp", now.Unix()+365*24*3600), "lives longer"},

		{"no id", without("jti"), "jti"},
		{"a task of two lines", claim("task", "a\nb"), "task"},
		{"a long task", claim("task", strings.Repeat("a", broker.MaxTask+1)), "task"},
		{"a label's name in upper case", claim("labels", object{"Team": "x"}), "label"},
		{"a label's long value", claim("labels", object{"team": strings.Repeat("x", broker.MaxLabel+1)}), "label"},
		{"a label that is a number", claim("labels", object{"team": 1}), "at most once"},
		{"many labels", raw(strings.Replace(text, `"team":"payments"`, manyLabels(), 1)), "labels"},
		{"a subject in another spelling", claim("on_behalf_of", "Spiffe://example.org/ana"), "SPIFFE ID"},
		{"a trust domain as the subject", claim("on_behalf_of", "spiffe://example.org"), "SPIFFE ID"},
		{"a subject with a tab", claim("on_behalf_of", "ana\t"), "on_behalf_of"},
		{"a subject with a space at its end", claim("on_behalf_of", "ana "), "on_behalf_of"},
		{"a subject that reads from right to left", claim("on_behalf_of", "\u202eana"), "on_behalf_of"},
	} {
		e, err := r.Verify(row.token, planner, now)
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: Verify = %+v, %v, want %q", row.name, e, err, row.want)
		} else if len(parts[2]) > 0 && strings.Contains(err.Error(), parts[2]) {
			t.Errorf("%s: the error has a part of the token", row.name)
		}
	}
	if _, err := r.Verify(good, spiffeid.ID{}, now); err == nil {
		t.Error("Verify for no caller = nil, want a refusal")
	}
	if _, err := (envelope.Issuers{}).Verify(good, planner, now); err == nil {
		t.Error("Verify without issuers = nil, want a refusal")
	}
	if _, err := r.Verify(good, planner, now.Add(10*time.Minute)); err == nil {
		t.Error("Verify of a replay after the end = nil, want a refusal")
	}
}

func manyLabels() string {
	var list []string
	for i := range broker.MaxLabels + 1 {
		list = append(list, `"l`+string(rune('a'+i))+`":"x"`)
	}
	return strings.Join(list, ",")
}

// TestSecondKey checks that each of an issuer's keys signs with its own algorithm.
func TestSecondKey(t *testing.T) {
	r := newRig(t)
	h := head()
	h["alg"], h["kid"] = "ES256", "two"
	token := seal(t, encode(t, h), encode(t, claims()), func(signed []byte) []byte {
		sum := sha256.Sum256(signed)
		a, b, err := ecdsa.Sign(rand.Reader, r.ec, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return append(a.FillBytes(make([]byte, 32)), b.FillBytes(make([]byte, 32))...)
	})
	if _, err := r.Verify(token, planner, now); err != nil {
		t.Errorf("Verify = %v, want the envelope", err)
	}
	var _ crypto.Signer = r.ec
}

func TestIssuers(t *testing.T) {
	r := newRig(t)
	good := envelope.Issuer{Name: "i", Audience: "a", Keys: parse(t, jose.JSONWebKey{Key: r.desk.Public(), KeyID: "k"})}
	change := func(f func(*envelope.Issuer)) envelope.Issuer { i := good; f(&i); return i }
	for name, list := range map[string][]envelope.Issuer{
		"twice":       {good, good},
		"no name":     {change(func(i *envelope.Issuer) { i.Name = "" })},
		"a space":     {change(func(i *envelope.Issuer) { i.Name = "a b" })},
		"no audience": {change(func(i *envelope.Issuer) { i.Audience = "" })},
		"no key":      {change(func(i *envelope.Issuer) { i.Keys = nil })},
		"long age":    {change(func(i *envelope.Issuer) { i.MaxAge = envelope.MaxLife + 1 })},
	} {
		if _, err := envelope.New(list...); err == nil {
			t.Errorf("New with %s = nil, want an error", name)
		}
	}
}

// FuzzVerify checks that no input panics, and that everything that is accepted was signed, is for the caller, and is
// within its bounds. The input is a token, and in a second try a payload under a good signature.
func FuzzVerify(f *testing.F) {
	r := newRig(f)
	f.Add([]byte(seal(f, encode(f, head()), encode(f, claims()), r.by(r.desk))))
	f.Add(encode(f, claims()))
	f.Add([]byte(`{"iss":"https://desk.example","aud":["pawl.example"],"sub":"spiffe://example.org/planner","jti":"1","iat":1772625600,"exp":1772625700}`))
	f.Fuzz(func(t *testing.T, input []byte) {
		for _, token := range []string{string(input), seal(t, encode(t, head()), input, r.by(r.desk))} {
			e, err := r.Verify(token, planner, now)
			if err != nil {
				continue
			}
			var read struct {
				Sub string `json:"sub"`
				Exp int64  `json:"exp"`
			}
			payload, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
			if err != nil || json.Unmarshal(payload, &read) != nil {
				t.Fatalf("accepted %q, which another reader cannot read", token)
			}
			if read.Sub != planner.String() || read.Exp != e.Expires.Unix() || !now.Before(e.Expires) || len(e.Labels) > broker.MaxLabels {
				t.Errorf("accepted %+v of %s", e, payload)
			}
			if e.Issuer == "" || e.ID == "" || !broker.PlainText(e.Task+e.Behalf+e.ID) {
				t.Errorf("accepted %+v", e)
			}
		}
	})
}
