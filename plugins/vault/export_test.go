package vault

// The sentinels, for tests that compare errors.
var (
	ErrForbidden = errForbidden
	ErrWider     = errWider
	ErrNoSession = errNoSession
)

// CheckPath lets a test try paths without a mint.
func CheckPath(segments []string) error { return checkPath(segments) }

// TokenLogin lets a test log in with a token of its own instead of an SVID.
func TokenLogin(token string) Login { return Login{token: token} }

// DecodeAnswer gives the fuzzer access to the decoder.
func DecodeAnswer(raw []byte) (lease string, data map[string]any, err error) {
	a, err := decodeAnswer(raw)
	return a.LeaseID, a.Data, err
}
