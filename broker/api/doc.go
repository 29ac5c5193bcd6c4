// Package api defines the data that travels between Pawl and its clients. It holds the wire types, the closed list of
// problem codes, the strict decoder of request bodies and the OpenAPI document.
//
// Times are RFC 3339 in UTC. Durations that a client gives are whole seconds (ttl_seconds). Delays that the broker
// asks for are milliseconds (retry_after_ms). Members are added over time and never change their meaning. Clients
// ignore unknown members; the broker refuses them. Everything here exists since version 1.
package api
