package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker/api"
)

// Seal asks the broker to hold a step's secret, encrypted to a key, until it is collected, once. The
// step's own Secret is then empty.
type Seal struct {
	Key       []byte // the public half of a SealKey, as its Public returns it
	Collector string // the SPIFFE ID that collects it, in the agent's trust domain; empty: the agent itself
}

// SealKey opens a secret that is sealed to its public half. The private half never leaves the process.
// Make a key for each step with [NewSealKey].
type SealKey struct{ private *ecdsa.PrivateKey }

// NewSealKey generates a key.
func NewSealKey() (*SealKey, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generating a seal key: %w", err)
	}
	return &SealKey{private}, nil
}

// Public is the public half as a JWK. It goes to the agent that takes the step.
func (k *SealKey) Public() []byte {
	jwk := jose.JSONWebKey{Key: k.private.Public(), Algorithm: string(jose.ECDH_ES), Use: "enc"}
	raw, err := jwk.MarshalJSON()
	if err != nil {
		panic("a P-256 key always encodes")
	}
	return raw
}

// String does not show the key.
func (*SealKey) String() string { return redacted }

// Format prints "[redacted]" for every verb.
func (k *SealKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) } // Format has no error to return

// Collect returns the sealed secret of a step by the id of its grant. The step may be the agent's own
// or another agent's that names this one as its collector.
//
// The broker delivers the secret once. A second request is an ErrConflict with the code
// "already_collected". Policy decides its consequence; by default the step is revoked. The secret wipes
// itself when it expires. An earlier revocation is reported to the agent that took the step.
//
// Collect blocks for one request, which it never retries. After ErrUnavailable with the code
// "no_answer" the secret is lost: close the step and take another.
func (c *Client) Collect(ctx context.Context, grant GrantID, key *SealKey) (*Secret, error) {
	s, err := c.collect(ctx, grant, key)
	if err != nil {
		return nil, fmt.Errorf("collecting a sealed secret: %w", err)
	}
	return s, nil
}

func (c *Client) collect(ctx context.Context, grant GrantID, key *SealKey) (*Secret, error) {
	asked := time.Now()
	var out api.Collected
	err := c.http.Call(ctx, http.MethodPost, "/v1/grants/"+segment(grant)+"/collect", nil, api.Nothing{}, &out)
	if err != nil {
		return nil, err
	}
	raw, err := key.open(grant, out.JWE)
	if err != nil {
		return nil, api.NewProblem(ErrUnavailable, api.CodeNoAnswer, err.Error())
	}
	s := newSecret(raw)
	// The rest of its lifetime by the broker's clock, counted from before the request.
	left := out.Grant.Expires.Sub(out.Grant.Collected)
	time.AfterFunc(left-time.Since(asked), s.Wipe)
	return s, nil
}

// open decrypts a secret that must be sealed to this key, for this grant.
func (k *SealKey) open(grant GrantID, text string) ([]byte, error) {
	keys, contents := []jose.KeyAlgorithm{jose.ECDH_ES}, []jose.ContentEncryption{jose.A256GCM}
	jwe, err := jose.ParseEncryptedCompact(text, keys, contents)
	if err != nil {
		return nil, errors.New("the sealed secret does not have the broker's form")
	}
	raw, err := jwe.Decrypt(k.private)
	if err != nil {
		return nil, errors.New("the secret is not sealed to this key")
	}
	extra := jwe.Header.ExtraHeaders
	if extra[jose.HeaderType] != api.SealedType || extra["grant"] != string(grant) {
		clear(raw)
		return nil, errors.New("the sealed secret belongs to another grant")
	}
	return raw, nil
}
