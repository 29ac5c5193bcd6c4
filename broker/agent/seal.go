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

// Seal has a step's secret kept at the broker, encrypted to a key, until it is collected, once. The
// step's own Secret is then empty.
type Seal struct {
	Key       []byte // the public half of a SealKey, as its Public gives it
	Collector string // the SPIFFE ID that collects it, in the agent's trust domain; empty: the agent itself
}

// SealKey opens what is sealed to its public half. It never leaves the process: make one for each
// step with [NewSealKey].
type SealKey struct{ private *ecdsa.PrivateKey }

// NewSealKey draws a key.
func NewSealKey() (*SealKey, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("drawing a seal key: %w", err)
	}
	return &SealKey{private}, nil
}

// Public is the public half as a JWK, for whoever takes the step.
func (k *SealKey) Public() []byte {
	raw, err := jose.JSONWebKey{Key: k.private.Public(), Algorithm: string(jose.ECDH_ES), Use: "enc"}.MarshalJSON()
	if err != nil {
		panic("a P-256 key always encodes")
	}
	return raw
}

// String tells nothing of the key.
func (*SealKey) String() string { return redacted }

// Format prints "[redacted]" for every verb.
func (k *SealKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) } // printing cannot be refused

// Collect gives the sealed secret of another's step, or of one's own, by the step's grant. The broker
// gives it once: a second time is an ErrConflict with the code "already_collected", and policy says
// what follows; by default the step is revoked. The secret wipes itself when its time is over; that
// it was revoked sooner is told to whoever took the step. It blocks for one request, which it never
// repeats: after ErrUnavailable with the code "no_answer" the secret is lost, and the step should
// be closed and taken again.
func (c *Client) Collect(ctx context.Context, grant GrantID, key *SealKey) (*Secret, error) {
	s, err := c.collect(ctx, grant, key)
	if err != nil {
		return nil, fmt.Errorf("collecting a sealed secret: %w", err)
	}
	return s, nil
}

func (c *Client) collect(ctx context.Context, grant GrantID, key *SealKey) (*Secret, error) {
	begun := time.Now()
	var out api.Collected
	if err := c.http.Call(ctx, http.MethodPost, "/v1/grants/"+segment(grant)+"/collect", nil, api.Nothing{}, &out); err != nil {
		return nil, err
	}
	raw, err := key.open(grant, out.JWE)
	if err != nil {
		return nil, api.NewProblem(ErrUnavailable, api.CodeNoAnswer, err.Error())
	}
	s := newSecret(raw)
	// What is left of its life by the broker's clock, counted from before the request.
	left := out.Grant.Expires.Sub(out.Grant.Collected)
	time.AfterFunc(left-time.Since(begun), s.Wipe)
	return s, nil
}

// open decrypts what must be sealed to this key, for this grant.
func (k *SealKey) open(grant GrantID, text string) ([]byte, error) {
	jwe, err := jose.ParseEncryptedCompact(text, []jose.KeyAlgorithm{jose.ECDH_ES}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		return nil, errors.New("the sealed secret is not what the broker sends")
	}
	raw, err := jwe.Decrypt(k.private)
	if err != nil {
		return nil, errors.New("the secret is not sealed to this key")
	}
	extra := jwe.Header.ExtraHeaders
	if extra[jose.HeaderType] != api.SealedType || extra["grant"] != string(grant) {
		clear(raw)
		return nil, errors.New("what is sealed is another grant's")
	}
	return raw, nil
}
