package attest

// MaxID, MaxTrustDomain and MaxJWT are size limits in bytes.
const (
	MaxID          = maxID
	MaxTrustDomain = maxTrustDomain
	MaxJWT         = maxJWT
)

// URINames is the parser of a certificate's names.
var URINames = uriNames
