package attest_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha256" // for crypto.Hash
	_ "crypto/sha512"
	"encoding/base64"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func b64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// compact signs a header and claims by the rules of RFC 7518. The texts may be malformed.
func compact(t testing.TB, key crypto.Signer, alg, header, claims string) string {
	t.Helper()
	signed := b64(header) + "." + b64(claims)
	hash := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[alg[2:]]
	h := hash.New()
	h.Write([]byte(signed))
	var sig []byte
	var err error
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		r, s, e := ecdsa.Sign(rand.Reader, key, h.Sum(nil))
		// The length that the algorithm requires, even if the curve's is another.
		size := max((key.Curve.Params().BitSize+7)/8, map[string]int{"ES384": 48, "ES512": 66}[alg])
		err, sig = e, append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
	case *rsa.PrivateKey:
		if alg[0] == 'P' {
			sig, err = rsa.SignPSS(rand.Reader, key, hash, h.Sum(nil), &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			sig, err = rsa.SignPKCS1v15(rand.Reader, key, hash, h.Sum(nil))
		}
	}
	if err != nil {
		t.Fatalf("signing = %v", err)
	}
	return signed + "." + b64(string(sig))
}

// malleate returns an ES256 token with its other valid signature, s -> n-s.
func malleate(t testing.TB, token string) string {
	t.Helper()
	end := strings.LastIndexByte(token, '.') + 1
	sig, err := base64.RawURLEncoding.DecodeString(token[end:])
	if err != nil || len(sig) != 64 {
		t.Fatalf("not an ES256 token")
	}
	s := new(big.Int).SetBytes(sig[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(sig[32:])
	return token[:end] + base64.RawURLEncoding.EncodeToString(sig)
}

// keys holds one key of each kind, by kid. An ECDSA key's kid is its alg.
type keys map[string]crypto.Signer

func newKeys(t testing.TB) keys {
	k := keys{}
	for alg, curve := range map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatalf("GenerateKey = %v", err)
		}
		k[alg] = key
	}
	for kid, bits := range map[string]int{"RSA": 2048, "weak": 1536} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatalf("GenerateKey = %v", err)
		}
		k[kid] = key
	}
	return k
}

// attestor trusts the keys for example.org, and ES384 as "theirs" for example.com.
func (k keys) attestor(t testing.TB, c *clock, change func(*attest.Config)) *attest.Attestor {
	t.Helper()
	public := map[string]crypto.PublicKey{}
	for kid, key := range k {
		public[kid] = key.Public()
	}
	org, com := spiffeid.RequireTrustDomainFromString("example.org"), spiffeid.RequireTrustDomainFromString("example.com")
	conf := attest.Config{
		TrustDomains: []string{"example.org", "example.com"}, Source: newIssuer(t).source(), Audience: audience, Now: c.now,
		JWT: jwtbundle.NewSet(jwtbundle.FromJWTAuthorities(org, public),
			jwtbundle.FromJWTAuthorities(com, map[string]crypto.PublicKey{"theirs": k["ES384"].Public()})),
	}
	if change != nil {
		change(&conf)
	}
	return newAttestor(t, conf)
}

// es256 is the header of a good token.
const es256 = `{"alg":"ES256","kid":"ES256","typ":"JWT"}`

// claims returns the claims of a good token. The given members are added, or replace those of the same name.
func claims(members string) string {
	all := ""
	for _, own := range []string{
		`"sub":"spiffe://example.org/a"`, `"aud":["` + audience + `"]`, `"exp":` + at(time.Minute), `"iat":` + at(0),
	} {
		if name, _, _ := strings.Cut(own, ":"); !strings.Contains(members, name+":") {
			all += "," + own
		}
	}
	return "{" + strings.Trim(members+all, ",") + "}"
}

// without returns the claims of a good token without one member.
func without(name string) string {
	return strings.Replace(claims(""), `"`+name+`":`, `"no":`, 1)
}

func at(d time.Duration) string { return fmt.Sprint(start.Add(d).Unix()) }

func TestJWTAlgorithms(t *testing.T) {
	k, c := newKeys(t), &clock{start}
	a := k.attestor(t, c, nil)
	for kid, key := range k {
		for _, alg := range []string{"ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"} {
			jwt := compact(t, key, alg, fmt.Sprintf(`{"alg":%q,"kid":%q}`, alg, kid), claims(""))
			_, err := a.Identify(request(nil, "Bearer "+jwt))
			what := alg + " with the key " + kid
			if alg == kid || kid == "RSA" && alg[0] != 'E' {
				if err != nil {
					t.Errorf("%s: Identify = %v, want accepted", what, err)
				}
				continue
			}
			refused(t, what, err, broker.Unauthenticated, jwt)
		}
	}
}

func TestJWT(t *testing.T) {
	k, c := newKeys(t), &clock{start}
	a := k.attestor(t, c, nil)
	type row struct {
		header, claims string
		ok             bool
	}
	for what, row := range map[string]row{
		"plain":                {es256, claims(""), true},
		"no typ":               {`{"alg":"ES256","kid":"ES256"}`, claims(""), true},
		"typ JOSE":             {`{"alg":"ES256","kid":"ES256","typ":"JOSE"}`, claims(""), true},
		"aud as a string":      {es256, claims(`"aud":"` + audience + `"`), true},
		"other claims":         {es256, claims(`"jti":"x","iss":"y","deep":{"a":[1]}`), true},
		"no iat":               {es256, without("iat"), true},
		"nbf now":              {es256, claims(`"nbf":` + at(0)), true},
		"exp 4 s ago":          {es256, claims(`"exp":` + at(-4*time.Second)), true},
		"exp 5 s ago":          {es256, claims(`"exp":` + at(-5*time.Second)), false},
		"exp in 10 min":        {es256, claims(`"exp":` + at(10*time.Minute)), true},
		"exp in 10 min 1 s":    {es256, claims(`"exp":` + at(10*time.Minute+time.Second)), false},
		"exp in the year 9999": {es256, claims(`"exp":253402300799`), false},
		"exp overflows":        {es256, claims(`"exp":9223372036854775807`), false},
		"exp too big":          {es256, claims(`"exp":18446744073709551616`), false},
		"exp negative":         {es256, claims(`"exp":-1`), false},
		"exp a fraction":       {es256, claims(`"exp":` + at(time.Minute) + `.5`), false},
		"exp a string":         {es256, claims(`"exp":"` + at(time.Minute) + `"`), false},
		"exp null":             {es256, claims(`"exp":null`), false},
		"no exp":               {es256, without("exp"), false},
		"EXP":                  {es256, claims(`"EXP":` + at(time.Minute) + `,"exp":null`), false},
		"iat in 5 s":           {es256, claims(`"iat":` + at(5*time.Second)), true},
		"iat in 6 s":           {es256, claims(`"iat":` + at(6*time.Second)), false},
		"nbf in 5 s":           {es256, claims(`"nbf":` + at(5*time.Second)), true},
		"nbf in 6 s":           {es256, claims(`"nbf":` + at(6*time.Second)), false},
		"no aud":               {es256, without("aud"), false},
		"aud empty":            {es256, claims(`"aud":[]`), false},
		"aud null":             {es256, claims(`"aud":null`), false},
		"aud wrong":            {es256, claims(`"aud":["vault"]`), false},
		"aud a prefix":         {es256, claims(`"aud":["spiffe://example.org/paw"]`), false},
		"aud two":              {es256, claims(`"aud":["` + audience + `","vault"]`), false},
		"aud ours twice":       {es256, claims(`"aud":["` + audience + `","` + audience + `"]`), false},
		"aud a number":         {es256, claims(`"aud":[1]`), false},
		"aud an object":        {es256, claims(`"aud":{"a":"` + audience + `"}`), false},
		"no sub":               {es256, without("sub"), false},
		"sub empty":            {es256, claims(`"sub":""`), false},
		"sub a list":           {es256, claims(`"sub":["spiffe://example.org/a"]`), false},
		"sub no ID":            {es256, claims(`"sub":"agent"`), false},
		"sub without path":     {es256, claims(`"sub":"spiffe://example.org"`), false},
		"sub longest":          {es256, claims(`"sub":"` + sized(attest.MaxID) + `"`), true},
		"sub longer":           {es256, claims(`"sub":"` + sized(attest.MaxID+1) + `"`), false},
		"sub other domain":     {es256, claims(`"sub":"spiffe://example.net/a"`), false},
		"sub of theirs":        {es256, claims(`"sub":"spiffe://example.com/a"`), false}, // their bundle has no kid ES256
		"duplicate sub":        {es256, claims(`"sub":"spiffe://example.org/b","sub":"spiffe://example.org/a"`), false},
		"duplicate other":      {es256, claims(`"x":1,"x":1`), false},
		"claims a list":        {es256, `[]`, false},
		"claims null":          {es256, `null`, false},
		"claims twice":         {es256, claims("") + claims(""), false},
		"claims not UTF-8":     {es256, claims("\"x\":\"\xff\""), false},
		"claims not JSON":      {es256, `{`, false},
		"claims too deep":      {es256, claims(`"x":` + strings.Repeat("[", 5000)), false},
		"alg none":             {`{"alg":"none","kid":"ES256"}`, claims(""), false},
		"alg HS256":            {`{"alg":"HS256","kid":"ES256"}`, claims(""), false},
		"alg EdDSA":            {`{"alg":"EdDSA","kid":"ES256"}`, claims(""), false},
		"alg lower-case":       {`{"alg":"es256","kid":"ES256"}`, claims(""), false},
		"alg missing":          {`{"kid":"ES256"}`, claims(""), false},
		"alg of another key":   {`{"alg":"ES256","kid":"ES384"}`, claims(""), false},
		"ALG":                  {`{"ALG":"ES256","kid":"ES256"}`, claims(""), false},
		"duplicate alg":        {`{"alg":"none","alg":"ES256","kid":"ES256"}`, claims(""), false},
		"no kid":               {`{"alg":"ES256"}`, claims(""), false},
		"kid empty":            {`{"alg":"ES256","kid":""}`, claims(""), false},
		"kid null":             {`{"alg":"ES256","kid":null}`, claims(""), false},
		"kid unknown":          {`{"alg":"ES256","kid":"es256"}`, claims(""), false},
		"kid of theirs":        {`{"alg":"ES256","kid":"theirs"}`, claims(""), false},
		"typ other":            {`{"alg":"ES256","kid":"ES256","typ":"at+jwt"}`, claims(""), false},
		"typ lower-case":       {`{"alg":"ES256","kid":"ES256","typ":"jwt"}`, claims(""), false},
		"typ null":             {`{"alg":"ES256","kid":"ES256","typ":null}`, claims(""), false},
		"crit":                 {`{"alg":"ES256","kid":"ES256","crit":["exp"]}`, claims(""), false},
		"jku":                  {`{"alg":"ES256","kid":"ES256","jku":"https://example.org"}`, claims(""), false},
		"x5u":                  {`{"alg":"ES256","kid":"ES256","x5u":"https://example.org"}`, claims(""), false},
		"jwk":                  {`{"alg":"ES256","kid":"ES256","jwk":{}}`, claims(""), false},
		"x5c":                  {`{"alg":"ES256","kid":"ES256","x5c":[]}`, claims(""), false},
		"b64":                  {`{"alg":"ES256","kid":"ES256","b64":false}`, claims(""), false},
		"zip":                  {`{"alg":"ES256","kid":"ES256","zip":"DEF"}`, claims(""), false},
		"header null":          {`null`, claims(""), false},
		"header trailing":      {es256 + "{}", claims(""), false},
	} {
		jwt := compact(t, k["ES256"], "ES256", row.header, row.claims)
		for range 2 {
			_, err := a.Identify(request(nil, "Bearer "+jwt))
			if !row.ok {
				refused(t, what, err, broker.Unauthenticated, jwt)
			} else if err != nil {
				t.Errorf("%s: Identify = %v, want accepted", what, err)
			}
		}
	}
}

// TestJWTKeyOfAnotherDomain signs a foreign subject with our key, and our subject with a foreign key.
func TestJWTKeyOfAnotherDomain(t *testing.T) {
	k, c := newKeys(t), &clock{start}
	a := k.attestor(t, c, nil)
	theirs := `{"alg":"ES384","kid":"theirs"}`
	good := compact(t, k["ES384"], "ES384", theirs, claims(`"sub":"spiffe://example.com/a"`))
	if _, err := a.Identify(request(nil, "Bearer "+good)); err != nil {
		t.Errorf("their subject, their key: Identify = %v, want accepted", err)
	}
	_, err := a.Identify(request(nil, "Bearer "+compact(t, k["ES384"], "ES384", theirs, claims(""))))
	refused(t, "our subject, their key", err, broker.Unauthenticated)
	_, err = a.Identify(request(nil, "Bearer "+compact(t, k["ES256"], "ES256", es256, claims(`"sub":"spiffe://example.com/a"`))))
	refused(t, "their subject, our key", err, broker.Unauthenticated)
}

func TestJWTSpelling(t *testing.T) {
	k, c := newKeys(t), &clock{start}
	a := k.attestor(t, c, nil)
	good := compact(t, k["ES256"], "ES256", es256, claims(""))
	if _, err := a.Identify(request(nil, "Bearer "+good)); err != nil {
		t.Fatalf("Identify = %v, want accepted", err)
	}
	parts := strings.Split(good, ".")
	last := parts[2][:85] + string(parts[2][85]+1) // 86 characters hold 4 bits more than 64 bytes
	for what, jwt := range map[string]string{
		"empty":               "",
		"dots":                "..",
		"megabyte of dots":    strings.Repeat(".", 1<<20),
		"two parts":           parts[0] + "." + parts[1],
		"four parts":          good + "." + parts[2],
		"five parts, JWE":     good + "." + parts[2] + "." + parts[2],
		"no signature":        parts[0] + "." + parts[1] + ".",
		"no header":           "." + parts[1] + "." + parts[2],
		"padding":             good + "==",
		"newline in it":       parts[0] + "." + parts[1] + "\n." + parts[2],
		"return in it":        parts[0] + "\r." + parts[1] + "." + parts[2],
		"space after":         good + " ",
		"tab before":          "\t" + good,
		"plain base64":        strings.NewReplacer("-", "+", "_", "/").Replace(good + "-"),
		"bits beyond the end": parts[0] + "." + parts[1] + "." + last,
		"signature of zeros":  parts[0] + "." + parts[1] + "." + b64(strings.Repeat("\x00", 64)),
		"signature too long":  parts[0] + "." + parts[1] + "." + b64(strings.Repeat("\x01", 66)),
		"other claims":        parts[0] + "." + b64(claims(`"sub":"spiffe://example.org/root"`)) + "." + parts[2],
		"other key":           compact(t, p256(t), "ES256", es256, claims("")),
		"JSON serialization":  `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`,
	} {
		_, err := a.Identify(request(nil, "Bearer "+jwt))
		refused(t, what, err, broker.Unauthenticated, good)
	}
}

// TestJWTSize checks a token at the size limit and one that is a byte longer.
func TestJWTSize(t *testing.T) {
	k, c := newKeys(t), &clock{start}
	a := k.attestor(t, c, nil)
	headers := []string{es256, `{"alg":"ES256","kid":"ES256"}`, `{"alg":"ES256", "kid":"ES256"}`}
	sized := func(n int) string {
		for pad := 5500; pad < 6500; pad++ { // the length of a base64 text is never 4k+1
			for _, header := range headers {
				body := claims(`"pad":"` + strings.Repeat("x", pad) + `"`)
				if len(b64(header))+len(b64(body))+86+2 == n {
					return compact(t, k["ES256"], "ES256", header, body)
				}
			}
		}
		t.Fatalf("no token of %d bytes", n)
		return ""
	}
	if _, err := a.Identify(request(nil, "Bearer "+sized(attest.MaxJWT))); err != nil {
		t.Errorf("%d bytes: Identify = %v, want accepted", attest.MaxJWT, err)
	}
	_, err := a.Identify(request(nil, "Bearer "+sized(attest.MaxJWT+1)))
	refused(t, "one byte more", err, broker.Unauthenticated)
}

func TestMaxJWTLifeAndLeeway(t *testing.T) {
	k, c := newKeys(t), &clock{start}
	a := k.attestor(t, c, func(c *attest.Config) { c.MaxJWTLife, c.Leeway = time.Hour, time.Second })
	for exp, ok := range map[time.Duration]bool{
		time.Hour: true, time.Hour + time.Second: false, 0: true, -time.Second: false,
	} {
		_, err := a.Identify(request(nil, "Bearer "+compact(t, k["ES256"], "ES256", es256, claims(`"exp":`+at(exp)))))
		if (err == nil) != ok {
			t.Errorf("exp in %v: Identify = %v, want accepted %v", exp, err, ok)
		}
	}
}

// FuzzJWT changes good tokens. A token is accepted only with its signed content unchanged.
func FuzzJWT(f *testing.F) {
	k, c := newKeys(f), &clock{start}
	a := k.attestor(f, c, nil)
	var signed []string
	for _, header := range []string{es256, `{"alg":"ES256","kid":"ES256"}`, `{"alg":"none"}`} {
		jwt := compact(f, k["ES256"], "ES256", header, claims(""))
		signed = append(signed, jwt[:strings.LastIndexByte(jwt, '.')])
		f.Add(jwt)
		f.Add(malleate(f, jwt))
		f.Add(jwt + "=")
		f.Add(strings.Replace(jwt, ".", "..", 1))
	}
	f.Fuzz(func(t *testing.T, jwt string) {
		caller, err := a.Identify(request(nil, "Bearer "+jwt))
		if err != nil {
			if kind := broker.KindOf(err); kind != broker.Unauthenticated {
				t.Errorf("kind = %v, want unauthenticated", kind)
			}
			return
		}
		if !slices.Contains(signed[:2], jwt[:max(strings.LastIndexByte(jwt, '.'), 0)]) || caller.ID.String() != "spiffe://example.org/a" {
			t.Errorf("a token without a valid signature is accepted as %v", caller.ID)
		}
	})
}
