// Package rules has no code: its tests hold what is true of the tree as a whole. Which package may
// import which, and why not the others; where a secret is opened and the clock is read; and that the
// pages in README.md and docs/ say what the programs do.
package rules
