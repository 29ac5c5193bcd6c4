package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxJWT is the size limit of a token in bytes.
const maxJWT = 8 << 10

// jwtHeader has the members that a JWT-SVID may have (JWT-SVID standard, section 2). Every other member, such as jku,
// x5c or crit, is refused.
type jwtHeader struct {
	Alg string         `json:"alg"`
	Kid string         `json:"kid"`
	Typ jsontext.Value `json:"typ"`
}

// jwtClaims are the claims that are checked. All others are ignored.
type jwtClaims struct {
	Sub string         `json:"sub"`
	Aud jsontext.Value `json:"aud"`
	Exp *int64         `json:"exp"`
	Iat *int64         `json:"iat"`
	Nbf *int64         `json:"nbf"`
}

// parsedJWT is a parsed token with an unverified signature.
type parsedJWT struct {
	text   string
	signed string // header.payload
	header jwtHeader
	claims jwtClaims
	id     spiffeid.ID
}

// token verifies a JWT-SVID.
func (a *Attestor) token(text string) (broker.Caller, error) {
	if a.config.JWT == nil {
		return broker.Caller{}, refuse("tokens are not accepted here: use a client certificate")
	}
	t, err := parseJWT(text)
	if err != nil {
		return broker.Caller{}, refuse("the token is not an acceptable JWT-SVID: %v", err)
	}
	if err := a.admit(t.id); err != nil {
		return broker.Caller{}, err
	}
	bundle, err := a.config.JWT.GetJWTBundleForTrustDomain(t.id.TrustDomain())
	if err != nil {
		return broker.Caller{}, noBundle(t.id.TrustDomain(), err)
	}
	key, ok := bundle.FindJWTAuthority(t.header.Kid)
	if !ok {
		return broker.Caller{}, refuse("the token is not signed by a current authority of %q", t.id.TrustDomain().Name())
	}
	if !permits(key, t.header.Alg) {
		return broker.Caller{}, refuse("the token's algorithm does not match its key")
	}
	return a.vouchJWT(t, key)
}

// vouchJWT does the checks that depend on the key and the time. The key is a pointer, because permits accepts nothing
// else. So it can be compared with the key of a cached entry.
func (a *Attestor) vouchJWT(t parsedJWT, key crypto.PublicKey) (broker.Caller, error) {
	digest, now := sha256.Sum256([]byte(t.text)), a.config.Now()
	v, ok := a.seen.get(digest, key, now)
	if !ok {
		var err error
		if v, err = a.verifyJWT(t, key, now); err != nil {
			return broker.Caller{}, err
		}
		a.seen.put(digest, v)
	}
	return v.caller, nil
}

func (a *Attestor) verifyJWT(t parsedJWT, key crypto.PublicKey, now time.Time) (vouched, error) {
	v := vouched{by: key, caller: broker.Caller{
		ID: t.id, Proof: broker.ProofJWT, Key: sha256.Sum256([]byte(t.signed)),
	}}
	if err := a.claims(t.claims, &v, now); err != nil {
		return vouched{}, err
	}
	// The algorithm is the header's. permits has checked it against the key.
	jws, err := jose.ParseSignedCompact(t.text, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(t.header.Alg)})
	if err != nil {
		return vouched{}, refuse("the token is not an acceptable JWT-SVID").Because(err)
	}
	if _, err := jws.Verify(key); err != nil {
		return vouched{}, refuse("the token's signature does not verify").Because(err)
	}
	return v, nil
}

// claims checks the audience and the times, and sets the validity period of v.
func (a *Attestor) claims(c jwtClaims, v *vouched, now time.Time) error {
	if err := a.checkAudience(c.Aud); err != nil {
		return err
	}
	if c.Exp == nil {
		return refuse("the token has no expiry")
	}
	exp := time.Unix(*c.Exp, 0).UTC()
	v.caller.NotAfter, v.until = exp, exp.Add(a.config.Leeway)
	if !now.Before(v.until) {
		return refuse("the token has expired").With(broker.CodeExpired)
	}
	if exp.After(now.Add(a.config.MaxJWTLife)) {
		return refuse("the token expires more than %v from now", a.config.MaxJWTLife)
	}
	for _, start := range []*int64{c.Iat, c.Nbf} {
		if start != nil {
			v.from = later(v.from, time.Unix(*start, 0).Add(-a.config.Leeway))
		}
	}
	if now.Before(v.from) {
		return refuse("the token is not valid yet")
	}
	return nil
}

// checkAudience requires our audience, once, and beside it none but the configured ones. A service that the token is for
// too could present it here, in the agent's name.
func (a *Attestor) checkAudience(raw jsontext.Value) error {
	list, ours := audiences(raw), 0
	for i, aud := range list {
		switch {
		case aud == a.config.Audience:
			ours++
		case !slices.Contains(a.config.Companions, aud):
			return refuse("the token is for audience %.100q too, whose service could present it here: "+
				"fetch one for %q alone, or name the other in jwt_companions", aud, a.config.Audience)
		case slices.Contains(list[:i], aud):
			ours = -len(list) // twice
		}
	}
	if ours != 1 {
		return refuse("the token is not for audience %q, once", a.config.Audience)
	}
	return nil
}

// audiences returns the audiences of a string or of a list. It is empty for anything else.
func audiences(raw jsontext.Value) (list []string) {
	var one string
	if raw.Kind() == '"' && json.Unmarshal(raw, &one) == nil {
		return []string{one}
	}
	if raw.Kind() != '[' || json.Unmarshal(raw, &list) != nil {
		return nil
	}
	return list
}

// parseJWT parses a token strictly: every token has exactly one accepted spelling. The errors contain nothing of the
// token.
func parseJWT(text string) (parsedJWT, error) {
	if len(text) > maxJWT {
		return parsedJWT{}, fmt.Errorf("longer than %d bytes", maxJWT)
	}
	if strings.Count(text, ".") != 2 {
		return parsedJWT{}, errors.New("not three parts separated by dots")
	}
	t := parsedJWT{text: text, signed: text[:strings.LastIndexByte(text, '.')]}
	var raw [3][]byte
	for i, part := range strings.Split(text, ".") {
		var err error
		if raw[i], err = broker.DecodeBase64URL(part); err != nil || part == "" {
			return parsedJWT{}, errors.New("not canonical base64url without padding")
		}
	}
	if err := json.Unmarshal(raw[0], &t.header, json.RejectUnknownMembers(true)); err != nil {
		return parsedJWT{}, errors.New("its header is not one object of alg, kid and typ")
	}
	if err := t.header.check(); err != nil {
		return parsedJWT{}, err
	}
	if err := json.Unmarshal(raw[1], &t.claims); err != nil || !t.claims.sane() {
		return parsedJWT{}, errors.New("its claims are not one object, or a claim has the wrong type")
	}
	var err error
	if t.id, err = ParseID(t.claims.Sub); err != nil {
		return parsedJWT{}, fmt.Errorf("its subject is not a workload's SPIFFE ID: %w", err)
	}
	return t, nil
}

func (h jwtHeader) check() error {
	switch {
	case h.Kid == "":
		return errors.New("its kid is missing")
	case len(h.Typ) > 0 && string(h.Typ) != `"JWT"` && string(h.Typ) != `"JOSE"`:
		return errors.New("its typ is neither JWT nor JOSE")
	}
	return nil
}

// sane limits times to a range in which time.Time can add and subtract.
func (c jwtClaims) sane() bool {
	for _, t := range []*int64{c.Exp, c.Iat, c.Nbf} {
		if t != nil && (*t < 0 || *t > math.MaxInt32*1000) {
			return false
		}
	}
	return true
}

// permits reports whether an algorithm fits the key's type and curve, because a bundle does not keep the alg of a JWK.
// This is the only list of algorithms: go-jose accepts the algorithm of the header.
func permits(key crypto.PublicKey, alg string) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return alg != "" && alg == map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[k.Curve.Params().BitSize]
	case *rsa.PublicKey:
		return goodKey(k) && slices.Contains([]string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}, alg)
	}
	return false
}
