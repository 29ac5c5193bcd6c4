package broker

import "time"

// Mint is one request to Vault that makes a secret.
type Mint struct {
	Path   VaultPath
	Data   map[string]any // body; nil means that the path is read
	Leased bool           // an answer without a lease id is then refused
	Auth   bool           // the answer is a token: Finish gets its "auth" member for data
	Wrap   bool           // with Auth: asked for wrapped; Finish gets "wrap_info", whose "auth" is what Vault says of the token inside
	TTL    time.Duration  // the longest life accepted; an answer with more is refused
	// Finish turns the answer's data into what the agent gets, and gives the name by which the
	// backend knows it. expires is the end that Vault's lease gave, zero without a lease.
	Finish func(answer map[string]any, expires time.Time) (Finished, error)
}

// Finished is a secret ready for delivery.
type Finished struct {
	Secret  Secret
	Ref     string    // the backend's name for it; empty when it has none
	Expires time.Time // its end; zero: the lease's

	Outlives time.Time // when the target lets it in no more by itself; zero: at its end

	// Digests are of the members of Secret that give access and that a machine drew, see
	// [ValueDigest]; none for a value that a person may have chosen.
	Digests []ValueDigest
}

// FoundLease is a lease that Vault lists.
type FoundLease struct {
	ID     string
	Issued time.Time
}
