// Package broker defines the terms of Pawl and the ports that adapters implement.
//
// The terms are Caller, Chain, Delegation, Grant, Tool, Secret, Decision and Revocation, with the types that belong
// to them. The ports are in ports.go: the [Ledger], the [Policy], [Vault], and one [Backend] for each kind of target.
// Every limit is in limits.go, and every code in errors.go. The procedures are in broker/engine.
package broker
