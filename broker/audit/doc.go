// Package audit makes the contents of the ledger verifiable for readers who do not trust the broker. It provides a
// signed report of a revocation, and signed checkpoints of the audit log. Both are verified offline with the public
// key alone.
//
// A checkpoint is a note (c2sp.org/signed-note, tlog-checkpoint) over the root of a Merkle tree (RFC 6962) of the
// log's entries. A reader who kept one detects later that an entry before it was changed, inserted or removed. A
// checkpoint that only the broker keeps proves nothing.
package audit
