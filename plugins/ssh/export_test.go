package ssh

// EncodeKRL and DecodeKRL are opened to tests.
var (
	EncodeKRL = encodeKRL
	DecodeKRL = decodeKRL
)
