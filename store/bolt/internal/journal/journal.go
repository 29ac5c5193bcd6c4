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
	path  string
	file  *os.File // nil: there is no file yet
	named bool     // the file's name is durable
	size  int64    // of the records that count
}

// Open returns a journal and its records. The last one may be incomplete: a loss of power may have left any part of it.
// It was not acknowledged, and is dropped. One that is damaged before a good one is an error: it was durable.
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
	for record, n := decode(raw); n > 0; record, n = decode(raw) {
		records, raw, j.size = append(records, record), raw[n:], j.size+int64(n)
	}
	for from := range raw {
		if _, n := decode(raw[from:]); n > 0 {
			err = ErrDamaged
			break
		}
	}
	if err == nil { // a process that was killed may not have synced its last writes
		err = errors.Join(f.Sync(), j.syncDir())
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	j.file, j.named = f, true
	return j, records, nil
}

// decode returns the record with which raw begins, and the bytes that it takes; zero: there is none.
func decode(raw []byte) (record []byte, n int) {
	if len(raw) < header {
		return nil, 0
	}
	size := binary.BigEndian.Uint64(raw)
	if size == 0 || size > uint64(len(raw)-header) {
		return nil, 0
	}
	n = header + int(size)
	if record = raw[header:n]; sha256.Sum256(record) != [sha256.Size]byte(raw[8:header]) {
		return nil, 0
	}
	return record, n
}

// Reset forgets all records. The next Append writes over them.
func (j *File) Reset() { j.size = 0 }

// Append makes a record durable, which must not be empty. After an error it does not count, unless the error wraps ErrUnsynced.
func (j *File) Append(record []byte) (err error) {
	if j.file == nil {
		if j.file, err = os.OpenFile(j.path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return err
		}
	}
	if !j.named {
		if err := j.syncDir(); err != nil {
			return err
		}
		j.named = true
	}
	if err := j.cut(); err != nil {
		return err
	}
	sum := sha256.Sum256(record)
	raw := append(binary.BigEndian.AppendUint64(nil, uint64(len(record))), sum[:]...)
	raw = append(raw, record...)
	if _, err := j.file.WriteAt(raw, j.size); err != nil {
		return err
	}
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsynced, err)
	}
	j.size += int64(len(raw))
	return nil
}

// cut removes the bytes behind the records: of an attempt that failed, or from before Reset. It is gone for good before
// anything is written over it. Else a loss of power could leave a mixture, with good records behind a torn one.
func (j *File) cut() error {
	info, err := j.file.Stat()
	if err != nil || info.Size() == j.size {
		return err
	}
	return errors.Join(j.file.Truncate(j.size), j.file.Sync())
}

// Remove deletes the file.
func (j *File) Remove() error {
	if j.file == nil {
		return nil
	}
	err := errors.Join(j.file.Close(), os.Remove(j.path))
	j.file, j.named, j.size = nil, false, 0
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
