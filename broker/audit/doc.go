// Package audit makes what the ledger holds checkable by those who do not trust the broker: a
// signed report of a revocation, and signed checkpoints of the audit log, both verified offline
// with the public key alone.
//
// A checkpoint is a note (c2sp.org/signed-note, tlog-checkpoint) over the root of a Merkle tree
// (RFC 6962) of the log's entries. Whoever kept one finds out later that an entry before it was
// changed, put in or taken away. A checkpoint that nobody outside the broker keeps proves nothing.
package audit
