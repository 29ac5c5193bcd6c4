package wire_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/envelope"
)

// desk is an issuer of envelopes.
type desk struct {
	t   *testing.T
	key ed25519.PrivateKey
}

const deskName = "https://desk.example.org"

func newDesk(t *testing.T) desk {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return desk{t, key}
}

// issuers is the bundle's file about the desk.
func (d desk) issuers() string {
	return "issuers:\n  - iss: " + deskName + "\n    audience: pawl.example.org\n    keys: [{kty: OKP, crv: Ed25519, kid: k1, alg: EdDSA, x: " +
		base64.RawURLEncoding.EncodeToString(d.key.Public().(ed25519.PublicKey)) + "}]\n"
}

// seal signs an envelope for one caller, for ten minutes from then on. More claims replace these.
func (d desk) seal(sub string, from time.Time, more map[string]any) string {
	d.t.Helper()
	claims := map[string]any{"iss": deskName, "aud": "pawl.example.org", "sub": sub, "jti": "ticket-17", "iat": from.Unix(),
		"exp": from.Add(10 * time.Minute).Unix()}
	for name, value := range more {
		claims[name] = value
	}
	var parts []string
	for _, v := range []any{map[string]string{"alg": "EdDSA", "kid": "k1", "typ": envelope.Type}, claims} {
		raw, err := json.Marshal(v)
		if err != nil {
			d.t.Fatal(err)
		}
		parts = append(parts, base64.RawURLEncoding.EncodeToString(raw))
	}
	signed := strings.Join(parts, ".")
	return signed + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(d.key, []byte(signed)))
}

// TestEnvelopeThroughTheBroker opens chains over the network, with the SDK and real SVIDs. The signed bundle names an
// issuer, and permits to open only with its word.
func TestEnvelopeThroughTheBroker(t *testing.T) {
	s, d := newSite(t, "example.org"), newDesk(t)
	s.config.Policy.Bundle = s.bundle(map[string]string{"issuers.yaml": d.issuers(), "main.cedar": `
		@id("urgent") @max_ttl("1h") @requires_labels("team")
		permit (principal in TrustDomain::"example.org", action == Action::"open", resource == Tool::"notes.read")
		when { context has task && context.task == "urgent" && context.issuer == "` + deskName + `" };`})
	s.identify()
	s.start()
	c, me := s.agent(), s.identities.ID("/agent").String()
	open := func(task, token string) (*agent.Delegation, error) {
		return c.Open(t.Context(), agent.Chain{Task: task, Rights: []agent.Right{{Tool: "notes.read", Use: true}}, Envelope: token})
	}
	urgent := map[string]any{"task": "urgent", "labels": map[string]string{"team": "payments"}, "on_behalf_of": "spiffe://example.org/people/ana"}
	for name, row := range map[string]struct{ token, code string }{
		"the agent's own word":   {"", string(broker.CodePolicyDenied)},
		"another task":           {d.seal(me, time.Now(), map[string]any{"task": "idle"}), string(broker.CodePolicyDenied)},
		"no label":               {d.seal(me, time.Now(), map[string]any{"task": "urgent"}), string(broker.CodeChainOverCap)},
		"another agent's":        {d.seal(me+"/x", time.Now(), urgent), string(broker.CodeEnvelopeRefused)},
		"a replay after its end": {d.seal(me, time.Now().Add(-time.Hour), urgent), string(broker.CodeEnvelopeRefused)},
		"another issuer's":       {newDesk(t).seal(me, time.Now(), urgent), string(broker.CodeEnvelopeRefused)},
	} {
		var problem *agent.Error
		if _, err := open("urgent", row.token); !errors.As(err, &problem) || string(problem.Code) != row.code {
			t.Errorf("%s: Open = %v, want %s", name, err, row.code)
		}
	}
	token := d.seal(me, time.Now(), urgent)
	root, err := open("some work", token)
	if err != nil {
		t.Fatal(err)
	}
	if life := time.Until(root.Info().Expires); life > 10*time.Minute {
		t.Errorf("the chain lives %v, want no longer than its envelope", life)
	}
	view, err := s.operator().Chain(t.Context(), string(root.Info().Chain))
	if err != nil {
		t.Fatal(err)
	}
	if e := view.Chain.Envelope; e == nil || e.Issuer != deskName || e.ID != "ticket-17" || e.Task != "urgent" || e.Labels["team"] != "payments" ||
		e.OnBehalfOf != "spiffe://example.org/people/ana" || view.Chain.Task != "some work" {
		t.Errorf("operators see %+v with %+v, want the envelope's statements beside the claims", view.Chain, e)
	}
	ledger, err := os.ReadFile(s.config.Ledger)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split(token, ".")[1:] {
		if bytes.Contains(ledger, []byte(part)) {
			t.Error("the ledger has a part of the token")
		}
	}
}
