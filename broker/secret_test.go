package broker_test

import (
	"bytes"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
)

const secretMarker = "secretMarker-s3cret"

// shows reports whether text contains secretMarker in any form of printing or encoding.
func shows(text string) bool {
	decimals := strings.Trim(fmt.Sprint([]byte(secretMarker)), "[]")
	hexes := fmt.Sprintf("%#v", []byte(secretMarker))
	hexes = hexes[len("[]byte{") : len(hexes)-1]
	for _, form := range []string{secretMarker, hex.EncodeToString([]byte(secretMarker)), decimals, hexes} {
		if strings.Contains(strings.ToLower(text), form) {
			return true
		}
	}
	return false
}

func TestSecretIsRedacted(t *testing.T) {
	secret := broker.NewSecret([]byte(secretMarker))
	issued := broker.Issued{Secret: secret}
	for name, v := range map[string]any{
		"itself": secret, "pointer": &secret, "struct": issued, "pointer to struct": &issued,
		"slice": []broker.Secret{secret}, "array": [1]broker.Secret{secret},
		"map": map[string]broker.Secret{"a": secret}, "any": []any{secret, &secret},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o"} {
			if got := fmt.Sprintf(verb, v); shows(got) {
				t.Errorf("%s of %s shows the secret", verb, name)
			}
		}
		raw, err := json.Marshal(v)
		if err != nil || shows(string(raw)) || !strings.Contains(string(raw), "[redacted]") {
			t.Errorf("JSON of %s: %v, or it shows the secret", name, err)
		}
		var log bytes.Buffer
		for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
			slog.New(h).Info("issued", "v", v, slog.Group("g", "v", v))
		}
		if shows(log.String()) {
			t.Errorf("slog of %s shows the secret", name)
		}
	}
	type hidden struct{ s broker.Secret } // fmt calls no methods here
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o"} {
		for _, v := range []any{hidden{secret}, &hidden{secret}, []hidden{{secret}}} {
			if got := fmt.Sprintf(verb, v); shows(got) {
				t.Errorf("%s of an unexported field shows the secret", verb)
			}
		}
	}
	type envelope struct{ S broker.Secret }
	var out bytes.Buffer
	if err := xml.NewEncoder(&out).Encode(envelope{secret}); err != nil || shows(out.String()) {
		t.Errorf("XML: %v, or it shows the secret", err)
	}
	if err := gob.NewEncoder(&out).Encode(envelope{secret}); err == nil || shows(out.String()) {
		t.Error("gob encodes the secret, or shows it")
	}
	err := fmt.Errorf("issuing %v: %w", secret, broker.Errorf(broker.Internal, "issue", "%s", secret))
	if shows(err.Error()) {
		t.Error("an error shows the secret")
	}
}

func TestSecretReveals(t *testing.T) {
	secret := broker.NewSecret([]byte(secretMarker))
	if secret.Empty() || string(secret.Reveal()) != secretMarker {
		t.Error("Reveal does not return the bytes of NewSecret")
	}
	secret.Wipe()
	if shows(string(secret.Reveal())) {
		t.Error("Wipe leaves the secret")
	}
	var zero broker.Secret
	zero.Wipe()
	if !zero.Empty() || len(zero.Reveal()) != 0 || zero.String() != "[redacted]" {
		t.Error("the zero Secret is not empty")
	}
}
