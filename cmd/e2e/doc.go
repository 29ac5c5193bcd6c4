// Package e2e holds the end-to-end tests over real servers: Vault, PostgreSQL, SPIRE, and the broker as it is wired for
// production. An oracle asks the backends themselves and shares no code with the broker.
package e2e
