package broker

import "time"

// Limits of a chain. A request beyond one of them is malformed, or denied with the limit's name.
const (
	MaxDepth    = 8              // delegations below the root
	MaxChainTTL = 24 * time.Hour // lifetime of a delegation
	MaxTask     = 256            // bytes of the text of a task or a purpose
	MaxLabels   = 16             // labels of a chain; each name has at most 64 bytes
	MaxLabel    = 64             // bytes of the value of a label
	MaxRights   = 128            // rights of a delegation, at most one for each tool
)

// MaxOpenChains is how many chains of one opener may be open at a time, where the configuration has no other number.
const MaxOpenChains = 1000

// MaxWindow is the longest time over which the steps of a caller are counted.
const MaxWindow = 168 * time.Hour

// DefaultChainTTL is the lifetime of a chain if the request to open it sets none.
const DefaultChainTTL = time.Hour

// MinHeartbeat is the shortest heartbeat interval that a holder can promise.
const MinHeartbeat = time.Second

// DefaultTTL is the lifetime of a secret if the tool, the request and the policy set no shorter one.
const DefaultTTL = time.Minute

// MaxTTL is the longest lifetime that a tool may give a secret.
const MaxTTL = 15 * time.Minute

// Leeway is the greatest accepted lag of the clock of a target. A secret whose end a target checks by its own clock, such
// as a certificate or a token, counts as ended that long after its end.
const Leeway = time.Minute

// EndTolerance is how much later than requested a target may end a secret. Clocks differ, and Vault adds some
// seconds to the end of a database login.
const EndTolerance = 10 * time.Second

// MaxSkew is the greatest difference between the clocks of the broker and of Vault with which certificates are issued.
// Such a secret may end that much later than its step, by the clocks of its verifiers.
const MaxSkew = 3 * time.Second

// Limits of names and texts, in bytes.
const (
	MaxSPIFFEID  = 2048 // a SPIFFE ID (SPIFFE-ID section 2.3)
	MaxToolName  = 48
	MaxRemedy    = 512 // the text of a policy that says how to ask for a permission
	MaxVaultName = 128 // a name in Vault: one segment of a path
)

// MaxVaultSegments is the number of segments that a parsed path in Vault can have.
const MaxVaultSegments = 16

// Sizes of the pages of lists, in items.
const (
	DefaultPage = 100
	MaxPage     = 1000
)

// MaxPlannedTasks is the number of tasks that a plan lists.
const MaxPlannedTasks = 20

// Limits of sealed secrets that wait to be collected, over all chains.
const (
	MaxWaiting     = 4096     // deliveries
	MaxWaitingEach = 256      // deliveries that one caller asked for
	MaxSealed      = 64 << 10 // bytes of one
	MaxSealedBytes = 64 << 20 // bytes of all
)
