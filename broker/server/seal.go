package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
)

// sealKey is a public key that a seal may have: one curve, no private member, no unknown member.
type sealKey struct {
	Kty string `json:"kty"`
	Crv string `json:"crv"`
	X   string `json:"x"`
	Y   string `json:"y"`
	Alg string `json:"alg,omitzero"`
	Use string `json:"use,omitzero"`
	Kid string `json:"kid,omitzero"`
}

// maxKey is the largest JWK in bytes; one with all its members takes about 300.
const maxKey = 1 << 10

// parseSealKey accepts one spelling of each key, so that a thumbprint identifies one key.
func parseSealKey(raw []byte) (key *ecdsa.PublicKey, thumbprint string, err error) {
	var k sealKey
	if len(raw) > maxKey {
		return nil, "", malformed("the seal's key is longer than %d bytes", maxKey)
	}
	if err := api.Decode(raw, &k); err != nil {
		return nil, "", malformed("the seal's key is not a public JWK with kty, crv, x and y: %v", err)
	}
	if k.Kty != "EC" || k.Crv != "P-256" || k.Alg != "" && k.Alg != string(jose.ECDH_ES) || k.Use != "" && k.Use != "enc" {
		return nil, "", malformed("the seal's key must be for ECDH-ES on P-256")
	}
	point := []byte{4} // uncompressed
	for _, text := range []string{k.X, k.Y} {
		part, err := broker.DecodeBase64URL(text)
		if err != nil || len(part) != 32 {
			return nil, "", malformed("the seal's key is not a point on P-256")
		}
		point = append(point, part...)
	}
	if key, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point); err != nil {
		return nil, "", malformed("the seal's key is not a point on P-256")
	}
	digest := sha256.Sum256(fmt.Appendf(nil, `{"crv":"P-256","kty":"EC","x":"%s","y":"%s"}`, k.X, k.Y)) // RFC 7638
	return key, base64.RawURLEncoding.EncodeToString(digest[:]), nil
}

// sealOf converts the seal of a request to the broker's form.
func sealOf(in api.Seal) (*broker.Seal, error) {
	key, thumbprint, err := parseSealKey(in.Key)
	if err != nil {
		return nil, err
	}
	seal := &broker.Seal{Thumbprint: thumbprint}
	if in.Collector != "" {
		if len(in.Collector) > maxSPIFFEID {
			return nil, malformed("collector is longer than %d bytes", maxSPIFFEID)
		}
		if seal.Collector, err = spiffeid.FromString(in.Collector); err != nil || seal.Collector.Path() == "" {
			return nil, malformed("collector is not the SPIFFE ID of a workload")
		}
	}
	seal.Encrypt = func(g broker.Grant, s broker.Secret) ([]byte, error) {
		options := (&jose.EncrypterOptions{}).WithType(api.SealedType).WithHeader("grant", string(g.ID))
		e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.ECDH_ES, Key: key, KeyID: thumbprint}, options)
		if err != nil {
			return nil, fmt.Errorf("sealing: %w", err)
		}
		jwe, err := e.Encrypt(s.Reveal())
		if err != nil {
			return nil, fmt.Errorf("sealing: %w", err)
		}
		text, err := jwe.CompactSerialize()
		return []byte(text), err
	}
	return seal, nil
}

// collect returns a sealed secret, once. The broker can no longer read it, so it is not wiped.
func (s *Server) collect(x *exchange, c broker.Caller, _ api.Nothing) (answer, error) {
	id, err := pathID(x, "grant", broker.ParseGrantID)
	if err != nil {
		return answer{}, err
	}
	g, sealed, err := s.cfg.Broker.Collect(x.Context(), c, id)
	x.note(slog.String("chain", string(g.Chain)))
	return answer{status: http.StatusOK, body: api.Collected{Grant: wireGrant(g), JWE: string(sealed)}}, err
}
