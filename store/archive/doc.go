// Package archive keeps records that a ledger needs no more in segments: signed files in a directory beside it, which are
// written once.
//
// A segment has records of the ledger and a part of its audit log. The ledger lists each with its digest, so that one
// that is missing, changed or in the place of another is noticed and named. It is durable before the ledger lists it,
// and only records of a listed segment are removed from the ledger. So a crash leaves the records in the ledger, or in both.
//
// Whatever decides about authority reads the ledger alone: see [Archive.History].
package archive
