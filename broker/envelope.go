package broker

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Envelope has the statements about a chain that an issuer signed, an issuer that the policy bundle names. Policy may
// trust them. The task and the labels of the request to open are only claims of the opener.
type Envelope struct {
	Issuer  string            `json:"issuer"`           // its iss
	ID      string            `json:"id"`               // its jti
	Digest  string            `json:"digest"`           // "sha256:" and the hex digest of the token; the token is not kept
	Task    string            `json:"task,omitempty"`   // empty: not stated
	Labels  map[string]string `json:"labels,omitempty"` // nil: none
	Behalf  string            `json:"on_behalf_of,omitempty"`
	Issued  time.Time         `json:"issued"`
	Expires time.Time         `json:"expires"` // no chain that was opened with it lives longer
}

// IsSPIFFE reports whether a text is a SPIFFE ID of a workload, in its one spelling.
func IsSPIFFE(text string) bool {
	id, err := spiffeid.FromString(text)
	return err == nil && id.Path() != "" && id.String() == text
}

// PlainText reports whether s is UTF-8 without characters that could forge a line of a log or terminal.
func PlainText(s string) bool {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == 0xfffd || r >= 0x80 && r < 0xa0 ||
			r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return false
		}
	}
	return true
}
