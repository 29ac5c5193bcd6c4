// Package signals receives security event tokens (RFC 8417) by push (RFC 8935), and revokes their subjects through
// the engine. It also pushes such tokens to subscribers, about revocations made here.
//
// Only its signature authenticates a received token. A key of a configured transmitter must have signed it, with the
// one algorithm of that key, for exactly our audience. It is accepted once, and only soon after it was issued. Two
// CAEP events have an effect: session-revoked, and credential-change if the credential was revoked or deleted. A
// created or updated credential is accepted without effect, because identities rotate all the time.
//
// The received tokens are remembered in memory. The revocation that a token caused is in the ledger under the token's
// name, so a restart does not repeat it. A token that caused none may be processed again after a restart. Its subject
// did not exist when it was first received.
package signals
