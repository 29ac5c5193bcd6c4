package bolt

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime/debug"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
)

// pending has the updates of the time in which the ledger's file is checked. A file that may be damaged is only read:
// these updates are kept in a file of their own, and written to the ledger when the check has passed. If it fails, they
// stay there, and the damaged file is left as it is.
//
// A pending is immutable. Each commit makes another one, so that a View keeps its snapshot.
type pending struct {
	from    head              // of the ledger's file
	head    head              // with these updates
	puts    map[string][]byte // in stored form; nil: deleted
	entries [][]byte          // in stored form, from from.revision+1 on
}

// clone returns a copy that can be changed.
func (p *pending) clone() *pending {
	return &pending{from: p.from, head: p.head, puts: maps.Clone(p.puts), entries: p.entries[:len(p.entries):len(p.entries)]}
}

// guard runs f, which reads a file that was not checked. A page that leads bbolt out of the file is an error, not the end
// of the process. For a nil p the check has passed.
func (p *pending) guard(f func() error) (err error) {
	if p == nil {
		return f()
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: it cannot be read: %v", ErrDamaged, v)
		}
	}()
	return f()
}

// frame is one commit in the file of pending updates.
type frame struct {
	From    []byte   `json:"from"` // the head before it
	Head    []byte   `json:"head"` // the head after it
	Puts    []put    `json:"puts"`
	Entries [][]byte `json:"entries"`
}

type put struct {
	Key    []byte `json:"key"`
	Stored []byte `json:"stored"` // nil: deleted
}

// frameHeader is the length of a frame's JSON, u64, and its SHA-256.
const frameHeader = 8 + sha256.Size

// journal is the file of pending updates. It exists from the first such update until they are in the ledger.
type journal struct {
	path string
	file *os.File // nil: there is no file yet
	size int64    // of the acknowledged frames
}

// readJournal returns the updates of an earlier process that never reached the ledger, whose file has the head from. An
// incomplete last frame was not acknowledged, and is dropped.
func readJournal(path string, from head) (*journal, *pending, error) {
	j, p := &journal{path: path}, &pending{from: from, head: from, puts: map[string][]byte{}}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return j, p, nil
	}
	if err != nil {
		return nil, nil, err
	}
	raw, err := io.ReadAll(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	j.file = f
	var list []frame
	for rest := raw; ; {
		one, n, err := decodeFrame(rest)
		if err != nil {
			return nil, nil, errors.Join(err, f.Close())
		}
		if n == 0 {
			break
		}
		list, rest, j.size = append(list, one), rest[n:], j.size+int64(n)
	}
	if len(list) > 0 && bytes.Equal(list[len(list)-1].Head, from.encode()) {
		list, j.size = nil, 0 // they were written to the ledger, and the process ended before it removed them
	}
	for _, one := range list {
		if err := p.replay(one); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
		}
	}
	return j, p, nil
}

// decodeFrame returns the first frame and its length; zero: there is no complete one.
func decodeFrame(raw []byte) (one frame, n int, err error) {
	if len(raw) < frameHeader {
		return one, 0, nil
	}
	size := binary.BigEndian.Uint64(raw)
	if size > uint64(len(raw)-frameHeader) {
		return one, 0, nil
	}
	n = frameHeader + int(size)
	text := raw[frameHeader:n]
	if sha256.Sum256(text) != [sha256.Size]byte(raw[8:frameHeader]) {
		if n == len(raw) {
			return one, 0, nil
		}
		return one, 0, fmt.Errorf("%w: the updates beside it are damaged", ErrDamaged)
	}
	return one, n, json.Unmarshal(text, &one)
}

// replay adds a frame that was read.
func (p *pending) replay(one frame) error {
	next, err := decodeHead(one.Head)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(one.From, p.head.encode()):
		return fmt.Errorf("%w: the updates beside it, such as fences, follow revision %d of another copy; "+
			"this one has revision %d", ErrDamaged, revisionOf(one.From), p.head.revision)
	}
	for _, c := range one.Puts {
		p.puts[string(c.Key)] = c.Stored
	}
	p.entries, p.head = append(p.entries, one.Entries...), next
	return nil
}

func revisionOf(encoded []byte) broker.Revision {
	h, _ := decodeHead(encoded) // zero for one that is damaged
	return h.revision
}

// append makes a frame durable. After an error nothing of it counts.
func (j *journal) append(one frame) error {
	text, err := json.Marshal(one)
	if err != nil {
		return err
	}
	if j.file == nil {
		if j.file, err = os.OpenFile(j.path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return err
		}
		if err := syncDir(j.path); err != nil {
			return err
		}
	}
	sum := sha256.Sum256(text)
	raw := append(binary.BigEndian.AppendUint64(nil, uint64(len(text))), sum[:]...)
	raw = append(raw, text...)
	if err := j.file.Truncate(j.size); err != nil { // what an attempt that failed left behind
		return err
	}
	if _, err := j.file.WriteAt(raw, j.size); err != nil {
		return err
	}
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("%w: %w", errUnsynced, err)
	}
	j.size += int64(len(raw))
	return nil
}

// errUnsynced marks a failed sync: whether the frame is durable is unknown.
var errUnsynced = errors.New("syncing the updates")

// remove deletes the file: its updates are in the ledger.
func (j *journal) remove() error {
	if j.file == nil {
		return nil
	}
	err := errors.Join(j.file.Close(), os.Remove(j.path))
	j.file = nil
	return errors.Join(err, syncDir(j.path))
}

// close keeps the file.
func (j *journal) close() error {
	if j.file == nil {
		return nil
	}
	return j.file.Close()
}

// fold writes the pending updates to the ledger in one transaction.
func (p *pending) fold(db *bbolt.DB) error {
	if p.head == p.from {
		return nil
	}
	return db.Update(func(btx *bbolt.Tx) error {
		records, log := btx.Bucket(bucketRecords), btx.Bucket(bucketLog)
		for key, stored := range p.puts {
			var err error
			if stored == nil {
				err = records.Delete([]byte(key))
			} else {
				err = records.Put([]byte(key), stored)
			}
			if err != nil {
				return err
			}
		}
		for i, stored := range p.entries {
			if err := log.Put(logKey(p.from.revision+broker.Revision(i)+1), stored); err != nil {
				return err
			}
		}
		return btx.Bucket(bucketMeta).Put(keyHead, p.head.encode())
	})
}
