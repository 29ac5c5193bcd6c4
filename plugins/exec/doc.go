// Package exec runs backend plugins in any language: one program, one JSON request on its
// standard input, one JSON answer on its standard output, for each thing that is asked of it.
//
// A plugin narrows, severs and proves. It never mints and never sees a secret: it names what
// Vault is to be asked for and which members of Vault's answer the agent gets, and the broker
// does the rest with a token whose Vault policy opens the tool's path alone.
//
// What runs is a sealed copy of a file whose checksum was verified on this start. Its environment
// is empty unless configured, its time and output are limited, its process group is killed at the
// end, and what it writes to standard error is counted and never kept: it may hold secrets.
//
// PROTOCOL.md, next to this file, is what an author of plugins reads.
package exec
