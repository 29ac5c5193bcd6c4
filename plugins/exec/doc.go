// Package exec runs backend plugins in any language. Each operation is one start of a program, with one JSON request on
// its standard input and one JSON response on its standard output.
//
// A plugin narrows, severs and proves. It never mints and never sees a secret. It defines the request to Vault and
// selects the members of Vault's response that the agent gets. The broker sends that request, with a token that has
// only the tool's Vault policy.
//
// The process runs a sealed copy of the file, verified by its checksum at this start. Its environment is empty unless
// configured, its time and output are limited, and its process group is killed at the end. Its standard error is
// counted and discarded, because it may contain secrets.
//
// PROTOCOL.md, next to this file, is the documentation for authors of plugins.
package exec
