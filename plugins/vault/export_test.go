package vault

// TokenLogin lets a test act with a token of its own in place of an SVID.
func TokenLogin(token string) Login { return Login{token: token} }

// DecodeAnswer opens the decoder to the fuzzer.
func DecodeAnswer(raw []byte) (lease string, data map[string]any, err error) {
	a, err := decodeAnswer(raw)
	return a.LeaseID, a.Data, err
}
