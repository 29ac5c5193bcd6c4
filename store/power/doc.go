// Package power plays the loss of power under the files of a directory, and failing writes, for tests.
//
// The code under test runs unchanged, its libraries included. Each call of the process that writes, syncs, names or
// removes a file waits for a supervisor, by the user notification of seccomp. It needs Linux.
//
// The disk keeps synced writes. A sync of a file makes its content and size durable, a sync of the directory its names.
// Of the rest any part may have reached the disk, in any order: each sector of 512 bytes, each size, each name. A part
// of a file that did not reach it is as it was before; where nothing was before, zeros.
package power
