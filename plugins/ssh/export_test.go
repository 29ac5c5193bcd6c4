package ssh

// EncodeKRL and DecodeKRL are the codec of revocation lists.
var (
	EncodeKRL = encodeKRL
	DecodeKRL = decodeKRL
)
