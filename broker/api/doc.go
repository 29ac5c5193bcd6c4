// Package api holds what travels between Pawl and its clients: the wire types, the closed
// list of problem codes, the strict decoder of request bodies and the OpenAPI document.
//
// Times are RFC 3339 in UTC. Lengths of time are whole seconds where a client gives them
// (ttl_seconds) and milliseconds where the broker asks for patience (retry_after_ms). Members
// are added over time and never given another meaning: clients ignore what they do not know,
// the broker refuses it. Everything here is there since version 1.
package api
