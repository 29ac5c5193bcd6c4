// Package broker has the words of Pawl and the ports that adapters implement.
//
// The words are Caller, Chain, Delegation, Grant, Tool, Secret, Decision, Revocation and what belongs to them. The ports
// are a [Ledger] that is the truth, a [Policy] that decides, a [Vault] that makes and ends tokens and secrets, and one
// [Backend] for each kind of target, which narrows, severs and proves. The procedures are in broker/engine.
package broker
