package selector

// Request asks for a final revocation, or for a freeze.
type Request struct {
	Selector   Selector
	Reason     string // for the audit and the report; 1 to broker.MaxTask bytes
	Plan       string // a plan's token: refuse if the set has grown since; empty: no check
	IncludeNew bool   // with Plan: revoke even if the set has grown
	Freeze     bool   // no new secrets, but nothing is severed; may be lifted
}
