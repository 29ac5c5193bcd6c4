// Package e2e holds the tests of the whole, over real parts: a real Vault, PostgreSQL and SPIRE,
// the broker as it is wired for production, and an oracle that asks the backends themselves and
// shares no code with the broker.
package e2e
