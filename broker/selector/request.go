package selector

// RevokeRequest asks for a final revocation, or for a freeze.
type Request struct {
	Selector   Selector
	Reason     string // for the audit and the report; at most 256 bytes
	Plan       string // a plan's token: refuse when the set has grown since; empty: whatever is there
	IncludeNew bool   // with Plan: go on when the set has grown
	Freeze     bool   // no new secrets, but nothing is cut; may be lifted
}
