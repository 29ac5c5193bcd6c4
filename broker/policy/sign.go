package policy

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
)

const (
	bundleType    = "pawl-bundle+jws"
	maxSignatures = 16
)

// Reasons to refuse a signed bundle. The error that wraps one has the details.
var (
	ErrOversized   = errors.New("bundle is too large")
	ErrMalformed   = errors.New("not a signed bundle")
	ErrTampered    = errors.New("signature does not fit the bundle")
	ErrUnderSigned = errors.New("bundle is not signed by enough trusted keys")
)

// signedJSON is a JWS in general JSON serialisation, RFC 7515 section 7.2.1, without unprotected
// headers.
type signedJSON struct {
	Payload    string      `json:"payload"`
	Signatures []signature `json:"signatures"`
}

type signature struct {
	Protected string `json:"protected"`
	Signature string `json:"signature"`
}

// header lists the only members that a signature's protected header may have. Others, such as crit, jwk and x5c, are
// unknown members and refused.
type header struct {
	Alg string `json:"alg"`
	Kid string `json:"kid"`
	Typ string `json:"typ"`
}

// Sign signs the source with each of the private keys, unless [Load] refuses it.
func Sign(s Source, keys ...jose.JSONWebKey) ([]byte, error) {
	if _, err := Load(s.Unsigned()); err != nil {
		return nil, fmt.Errorf("signing bundle: %w", err)
	}
	return addSignatures(signedJSON{Payload: encode(s.payload)}, keys)
}

// Cosign adds signatures to a signed bundle, so that the holders of several keys can sign separately. It keeps the
// earlier signatures without checking them; [Verify] does that. It refuses what [Load] refuses.
func Cosign(jws []byte, keys ...jose.JSONWebKey) ([]byte, error) {
	e, _, err := open(jws)
	if err != nil {
		return nil, err
	}
	payload, err := broker.DecodeBase64URL(e.Payload)
	if err != nil {
		return nil, fmt.Errorf("%w: payload is not base64url", ErrMalformed)
	}
	s, err := parsePayload(payload)
	if err != nil {
		return nil, err
	}
	if _, err := Load(s.Unsigned()); err != nil {
		return nil, fmt.Errorf("signing bundle: %w", err)
	}
	return addSignatures(e, keys)
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func addSignatures(e signedJSON, keys []jose.JSONWebKey) ([]byte, error) {
	if len(keys) == 0 {
		return nil, errors.New("signing bundle: no key")
	}
	payload, err := broker.DecodeBase64URL(e.Payload)
	if err != nil {
		return nil, fmt.Errorf("signing bundle: %w", err)
	}
	for i, k := range keys {
		k, err := bind(k)
		if err != nil {
			return nil, fmt.Errorf("signing key %d: %w", i+1, err)
		}
		if k.IsPublic() {
			return nil, fmt.Errorf("signing key %d is a public key", i+1)
		}
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(k.Algorithm), Key: k},
			(&jose.SignerOptions{}).WithType(bundleType))
		if err != nil {
			return nil, fmt.Errorf("signing key %d: %w", i+1, err)
		}
		signed, err := signer.Sign(payload)
		if err != nil {
			return nil, fmt.Errorf("signing with key %d: %w", i+1, err)
		}
		compact, err := signed.CompactSerialize()
		if err != nil {
			return nil, fmt.Errorf("signing with key %d: %w", i+1, err)
		}
		parts := strings.Split(compact, ".")
		e.Signatures = append(e.Signatures, signature{parts[0], parts[2]})
	}
	return json.Marshal(e)
}

// Trust lists the keys that may sign a bundle and how many of them must. The zero Trust accepts no bundle.
type Trust struct {
	Keys []jose.JSONWebKey // public platform keys
	Need int               // the number of different keys that must have signed, at least 1
}

// Verify opens a signed bundle. Each signature that claims a trusted key must be valid. Signatures of unknown keys
// are ignored, and a key counts once. The error wraps one of the Err values of this package, or names the fault in
// the content.
func Verify(jws []byte, t Trust) (Bundle, error) {
	trusted, err := t.byID()
	if err != nil {
		return Bundle{}, err
	}
	e, headers, err := open(jws)
	if err != nil {
		return Bundle{}, err
	}
	var b Bundle
	var unknown []string
	seen := map[string]bool{}
	for i, h := range headers {
		k, ok := trusted[h.Kid]
		switch {
		case !ok:
			unknown = append(unknown, fmt.Sprintf("%.43q", h.Kid))
			continue
		case h.Alg != k.Algorithm: // go-jose accepts every algorithm that the key type can do
			return Bundle{}, fmt.Errorf("%w: key %s signs with %s, not %.20q", ErrTampered, h.Kid, k.Algorithm, h.Alg)
		case !e.verified(i, k):
			return Bundle{}, fmt.Errorf("%w: key %s", ErrTampered, h.Kid)
		case !seen[h.Kid]:
			seen[h.Kid] = true
			b.Signers = append(b.Signers, h.Kid)
		}
	}
	if len(b.Signers) < t.Need {
		return Bundle{}, underSigned(t.Need, len(b.Signers), unknown)
	}
	payload, err := broker.DecodeBase64URL(e.Payload)
	if err != nil {
		return Bundle{}, fmt.Errorf("%w: payload is not base64url", ErrMalformed)
	}
	if b.Source, err = parsePayload(payload); err != nil {
		return Bundle{}, err
	}
	return b, nil
}

func underSigned(need, valid int, unknown []string) error {
	err := fmt.Errorf("%w: %d needed, %d valid", ErrUnderSigned, need, valid)
	if len(unknown) > 0 {
		err = fmt.Errorf("%w; not trusted: %s", err, strings.Join(unknown, ", "))
	}
	return err
}

func (t Trust) byID() (map[string]jose.JSONWebKey, error) {
	keys := make(map[string]jose.JSONWebKey, len(t.Keys))
	for i, k := range t.Keys {
		k, err := bind(k)
		if err != nil {
			return nil, fmt.Errorf("trusted key %d: %w", i+1, err)
		}
		keys[k.KeyID] = k.Public()
	}
	if t.Need < 1 || t.Need > len(keys) {
		return nil, fmt.Errorf("trust: %d signatures needed of %d different keys", t.Need, len(keys))
	}
	return keys, nil
}

// open decodes the envelope and checks only its form.
func open(jws []byte) (signedJSON, []header, error) {
	var e signedJSON
	if len(jws) > MaxBundle {
		return e, nil, fmt.Errorf("%w: %d bytes, at most %d", ErrOversized, len(jws), MaxBundle)
	}
	if err := json.Unmarshal(jws, &e, json.RejectUnknownMembers(true)); err != nil {
		return e, nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if e.Payload == "" || len(e.Signatures) == 0 || len(e.Signatures) > maxSignatures {
		return e, nil, fmt.Errorf("%w: a payload and 1 to %d signatures are needed", ErrMalformed, maxSignatures)
	}
	headers := make([]header, len(e.Signatures))
	for i, s := range e.Signatures {
		raw, err := broker.DecodeBase64URL(s.Protected)
		if err != nil || len(raw) > 1024 {
			return e, nil, fmt.Errorf("%w: header of signature %d is not base64url or too long", ErrMalformed, i+1)
		}
		if err := json.Unmarshal(raw, &headers[i], json.RejectUnknownMembers(true)); err != nil {
			return e, nil, fmt.Errorf("%w: header of signature %d: %w", ErrMalformed, i+1, err)
		}
		if headers[i].Typ != bundleType {
			return e, nil, fmt.Errorf("%w: signature %d is for typ %.40q, not %q", ErrMalformed, i+1, headers[i].Typ, bundleType)
		}
	}
	return e, headers, nil
}

// verified reports whether one signature is valid under the one algorithm of its key.
func (e signedJSON) verified(i int, k jose.JSONWebKey) bool {
	s := e.Signatures[i]
	if _, err := broker.DecodeBase64URL(s.Signature); err != nil {
		return false
	}
	signed, err := jose.ParseSignedCompact(s.Protected+"."+e.Payload+"."+s.Signature,
		[]jose.SignatureAlgorithm{jose.SignatureAlgorithm(k.Algorithm)})
	if err != nil {
		return false
	}
	_, err = signed.Verify(k)
	return err == nil
}
