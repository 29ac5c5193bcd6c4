// Package brokertest is the kit for tests against the real engine. It has a ledger in memory that fails on request, a
// clock that is moved by hand, and chains drawn as text. It also has the suites for every ledger and every backend.
package brokertest
