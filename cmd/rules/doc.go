// Package rules has no code: its tests check the tree as a whole. Its tables list which package may import which, and
// where a secret may be opened or the clock read. The pages, README.md and docs/, must agree with the programs.
//
// The programs below it check the tree too, in make lint: structure holds each package to limits of size, and english
// holds the prose to bounds on some phrases.
package rules
