package vault

// Sentinels for tests that compare errors.
var (
	ErrForbidden = errForbidden
	ErrWider     = errWider
	ErrNoSession = errNoSession
)

// TokenLogin lets a test log in with a token of its own instead of an SVID.
func TokenLogin(token string) Login { return Login{token: token} }

// DecodeResponse gives the fuzzer access to the decoder.
func DecodeResponse(raw []byte) (lease string, data map[string]any, err error) {
	r, err := decodeResponse(raw)
	return r.LeaseID, r.Data, err
}
