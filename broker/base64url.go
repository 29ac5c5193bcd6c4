package broker

import (
	"encoding/base64"
	"errors"
	"strings"
)

var errBase64URL = errors.New("not base64url in its one spelling: without padding, line breaks and bits beyond the end")

// DecodeBase64URL decodes base64url without padding, as JOSE uses it (RFC 7515 section 2). It takes one spelling of a
// value: the decoder of encoding/base64 ignores line breaks, so that different texts would be the same signed bytes.
func DecodeBase64URL(text string) ([]byte, error) {
	if strings.ContainsAny(text, "\r\n") {
		return nil, errBase64URL
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, errBase64URL
	}
	return raw, nil
}
