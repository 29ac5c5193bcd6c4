// Package journal keeps records in a file, each durable before it counts.
package journal

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

var (
	// ErrDamaged reports a record that was changed.
	ErrDamaged = errors.New("a record of the journal is damaged")
	// ErrUnsynced reports a failed sync: whether the record is durable is unknown.
	ErrUnsynced = errors.New("syncing the journal")
)

// header is the length of a record, u64, and its SHA-256.
const header = 8 + sha256.Size

// File is a journal. It exists on disk from the first record until Remove.
type File struct {
	path string
	file *os.File // nil: there is no file yet
	size int64    // of the records that count
}

// Open returns a journal and its records. An incomplete record at the end was not acknowledged, and is dropped.
func Open(path string) (j *File, records [][]byte, err error) {
	j = &File{path: path}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return j, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	raw, err := io.ReadAll(f)
	for err == nil && len(raw) > 0 {
		var record []byte
		var n int
		if record, n, err = decode(raw); n == 0 {
			break
		}
		records, raw, j.size = append(records, record), raw[n:], j.size+int64(n)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	j.file = f
	return j, records, nil
}

// decode returns the first record and the bytes that it takes; zero: there is no complete one.
func decode(raw []byte) (record []byte, n int, err error) {
	if len(raw) < header {
		return nil, 0, nil
	}
	size := binary.BigEndian.Uint64(raw)
	if size > uint64(len(raw)-header) {
		return nil, 0, nil
	}
	n = header + int(size)
	switch record = raw[header:n]; {
	case sha256.Sum256(record) == [sha256.Size]byte(raw[8:header]):
		return record, n, nil
	case n == len(raw):
		return nil, 0, nil
	}
	return nil, 0, ErrDamaged
}

// Reset forgets all records. The next Append writes over them.
func (j *File) Reset() { j.size = 0 }

// Append makes a record durable. After an error it does not count, unless the error wraps ErrUnsynced.
func (j *File) Append(record []byte) (err error) {
	if j.file == nil {
		if j.file, err = os.OpenFile(j.path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return err
		}
		if err := j.syncDir(); err != nil {
			return err
		}
	}
	sum := sha256.Sum256(record)
	raw := append(binary.BigEndian.AppendUint64(nil, uint64(len(record))), sum[:]...)
	raw = append(raw, record...)
	if err := j.file.Truncate(j.size); err != nil { // what an attempt that failed left behind
		return err
	}
	if _, err := j.file.WriteAt(raw, j.size); err != nil {
		return err
	}
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsynced, err)
	}
	j.size += int64(len(raw))
	return nil
}

// Remove deletes the file.
func (j *File) Remove() error {
	if j.file == nil {
		return nil
	}
	err := errors.Join(j.file.Close(), os.Remove(j.path))
	j.file, j.size = nil, 0
	return errors.Join(err, j.syncDir())
}

// Close keeps the file.
func (j *File) Close() error {
	if j.file == nil {
		return nil
	}
	return j.file.Close()
}

// syncDir makes the file's name durable.
func (j *File) syncDir() error {
	dir, err := os.Open(filepath.Dir(j.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
