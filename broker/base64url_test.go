package broker_test

import (
	"encoding/base64"
	"testing"

	"github.com/pawlsec/pawl/broker"
)

func TestDecodeBase64URL(t *testing.T) {
	for text, want := range map[string]string{"": "", "YQ": "a", "YWI": "ab", "YWJj": "abc", "-_8": "\xfb\xff"} {
		if got, err := broker.DecodeBase64URL(text); err != nil || string(got) != want {
			t.Errorf("DecodeBase64URL(%q) = %q, %v, want %q", text, got, err, want)
		}
	}
	for _, text := range []string{"YQ==", "YR", "Y", "+/8", "YW\nI", "YW\rI", "YWI\n", "\r\nYWI", "YW I", "YWI.", "YWÍ"} {
		if got, err := broker.DecodeBase64URL(text); err == nil {
			t.Errorf("DecodeBase64URL(%q) = %q, want an error", text, got)
		}
	}
}

// FuzzDecodeBase64URL checks that a text that is taken is the one spelling of its bytes.
func FuzzDecodeBase64URL(f *testing.F) {
	f.Add("YWI")
	f.Fuzz(func(t *testing.T, text string) {
		raw, err := broker.DecodeBase64URL(text)
		if spelled := base64.RawURLEncoding.EncodeToString(raw); err == nil && spelled != text {
			t.Errorf("DecodeBase64URL(%q) = %q, whose spelling is %q", text, raw, spelled)
		}
	})
}
