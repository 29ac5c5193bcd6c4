// Package brokertest is the kit for testing against the real engine: a ledger in memory that
// fails on request, a clock that is moved by hand, chains drawn as text, and the suites that
// every ledger and every backend must pass.
package brokertest
