package jwt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker"
)

// Token is the content of a token. Nothing in it is trustworthy before [Backend.Verify].
type Token struct {
	Grant    broker.GrantID
	Tool     broker.ToolName
	Issuer   string
	Subject  string
	Audience string
	Scope    string
	Issued   int64 // seconds since 1970
	Expires  int64
}

// maxToken is the size limit of a token in bytes.
const maxToken = 8 << 10

// Read parses a token without verifying it.
func Read(token string) (Token, error) {
	parts := strings.Split(token, ".")
	if len(token) > maxToken || len(parts) != 3 {
		return Token{}, errors.New("jwt: not a token")
	}
	for _, part := range parts {
		if _, err := broker.DecodeBase64URL(part); err != nil {
			return Token{}, errors.New("jwt: not a token")
		}
	}
	signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Token{}, errors.New("jwt: not a token of ours")
	}
	var c claims
	if err := json.Unmarshal(signed.UnsafePayloadWithoutVerification(), &c); err != nil {
		return Token{}, errors.New("jwt: not a token of ours")
	}
	id, err := broker.ParseGrantID(c.ID)
	if err != nil {
		return Token{}, errors.New("jwt: not a token of ours")
	}
	tool, err := broker.ParseToolName(c.Tool)
	if err != nil {
		return Token{}, errors.New("jwt: not a token of ours")
	}
	return Token{Grant: id, Tool: tool, Issuer: c.Issuer, Subject: c.Subject, Audience: c.Audience, Scope: c.Scope,
		Issued: c.Issued, Expires: c.Expires}, nil
}

// Verify checks that the token is from this issuer, and signed by a version of the tool's key that Vault still lists.
// It does not check whether the token is still active: only the ledger knows that.
func (b *Backend) Verify(ctx context.Context, t broker.Tool, token string) (Token, error) {
	read, err := Read(token)
	if err != nil {
		return Token{}, err
	}
	key, err := b.key(ctx, t.Path)
	if err != nil {
		return Token{}, err
	}
	signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Token{}, errors.New("jwt: not a token of ours")
	}
	name, text, _ := strings.Cut(signed.Signatures[0].Header.KeyID, ":")
	version, err := strconv.Atoi(text)
	public := key.versions[version]
	if name != t.Path.Segments()[1] || err != nil || public == nil {
		return Token{}, errors.New("jwt: not signed by the tool's key")
	}
	if _, err := signed.Verify(public); err != nil {
		return Token{}, errors.New("jwt: the signature does not verify")
	}
	if read.Issuer != b.cfg.Issuer || read.Tool != t.Name {
		return Token{}, fmt.Errorf("jwt: the token is for another tool, or its issuer is not %q", b.cfg.Issuer)
	}
	return read, nil
}
