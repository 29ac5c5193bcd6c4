package archive

import (
	"bytes"

	"github.com/pawlsec/pawl/broker"
)

// Stage is a point of an Add.
type Stage = stage

// The stages.
const (
	Written = written
	Renamed = renamed
	Listed  = listed
)

// WithFault adds f, which returns the error to inject at a stage.
func WithFault(c Config, f func(Stage) error) Config {
	c.fault = f
	return c
}

// Make returns a segment of records and entries.
func Make(number uint64, records []broker.Archived, entries []broker.Entry) ([]byte, error) {
	var out bytes.Buffer
	_, _, err := content{number: number, records: records, entries: func(add func(broker.Entry) error) error {
		for _, e := range entries {
			if err := add(e); err != nil {
				return err
			}
		}
		return nil
	}}.writeTo(&out, footer{})
	return out.Bytes(), err
}

// Check reads a segment whole.
func Check(raw []byte) error {
	f, err := parse(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		return err
	}
	return f.verify()
}

// DigestOf returns the digest of a segment; empty if it has none.
func DigestOf(raw []byte) string {
	f, err := parse(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		return ""
	}
	return string(f.digest)
}
