package e2e_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker/envelope"
)

// helpDesk is an issuer of envelopes that say which ticket an agent works on.
type helpDesk struct{ key ed25519.PrivateKey }

const helpDeskName = "https://desk.acme.example"

func newHelpDesk(t *testing.T) helpDesk {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return helpDesk{key}
}

// names adds the help desk to the bundle of an author's directory.
func (d helpDesk) names(t *testing.T, path string) fs.FS {
	t.Helper()
	dir := os.DirFS(path)
	files := map[string]string{"issuers.yaml": fmt.Sprintf(
		"issuers:\n  - iss: %s\n    audience: pawl.acme.example\n    keys: [{kty: OKP, crv: Ed25519, kid: k1, alg: EdDSA, x: %s}]\n",
		helpDeskName, base64.RawURLEncoding.EncodeToString(d.key.Public().(ed25519.PublicKey)))}
	names, err := fs.Glob(dir, "*")
	for _, name := range names {
		text, readErr := fs.ReadFile(dir, name)
		if err == nil {
			err = readErr
		}
		files[name] = string(text)
	}
	if err != nil {
		t.Fatal(err)
	}
	return authors(files)
}

// ticket signs an envelope about a ticket for one agent.
func (d helpDesk) ticket(t *testing.T, agent, ticket string) string {
	t.Helper()
	return d.seal(t, agent, map[string]any{"jti": ticket, "labels": map[string]string{"ticket": ticket}})
}

// seal signs an envelope with further claims for one agent.
func (d helpDesk) seal(t *testing.T, agent string, more map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: jose.JSONWebKey{Key: d.key, KeyID: "k1"}},
		(&jose.SignerOptions{}).WithType(envelope.Type))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	all := map[string]any{"iss": helpDeskName, "aud": "pawl.acme.example", "sub": agent, "jti": "E-1",
		"iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
	maps.Copy(all, more)
	claims, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}
