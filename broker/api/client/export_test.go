package client

import "io"

// NewEvents returns a function that reads the next event in r.
func NewEvents(r io.Reader) func() (Event, error) { return newEvents(r).next }
