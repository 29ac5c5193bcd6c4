package broker

import "time"

// Limits of a chain. A request beyond them is malformed or denied with the limit's name.
const (
	MaxDepth    = 8              // delegations below the root
	MaxChainTTL = 24 * time.Hour // a delegation's life
	MaxTask     = 256            // bytes of a task's or purpose's text
	MaxLabels   = 16             // labels of a chain, each name and value at most 64 bytes
)

// DefaultChainTTL is a chain's life where the opener does not ask for less or more.
const DefaultChainTTL = time.Hour

// MinHeartbeat is the shortest interval at which a holder may be asked to be heard.
const MinHeartbeat = time.Second

// MaxRights is the most rights a delegation holds, at most one for each tool.
const MaxRights = 128

// MaxRemedy is the longest text of how to ask, in bytes.
const MaxRemedy = 512

// MaxToolName is the longest tool name in bytes.
const MaxToolName = 48

// DefaultTTL is a secret's life where neither tool nor request nor policy says less.
const DefaultTTL = time.Minute

// MaxTTL is the longest a tool may let a secret live.
const MaxTTL = 15 * time.Minute

// EndTolerance is how much later than asked a target may count the end of what was minted: clocks differ,
// and Vault adds some seconds to the end of a database login.
const EndTolerance = 10 * time.Second

// MaxSPIFFEID is the longest SPIFFE ID in bytes (SPIFFE-ID section 2.3).
const MaxSPIFFEID = 2048

// MaxPlannedTasks is how many tasks a plan names.
const MaxPlannedTasks = 20

// Limits of sealed secrets that wait to be collected, over all chains.
const (
	MaxWaiting     = 4096     // deliveries
	MaxWaitingEach = 256      // of them, asked for by one caller
	MaxSealed      = 64 << 10 // bytes of one
	MaxSealedBytes = 64 << 20 // bytes of all
)

// Limits of a path in Vault.
const (
	MaxVaultName     = 128 // bytes of a segment
	MaxVaultSegments = 16  // segments of a path that is parsed
)
