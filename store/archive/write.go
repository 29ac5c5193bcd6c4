package archive

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/pawlsec/pawl/broker"
)

// stage is a point of an Add at which tests inject a fault.
type stage int

const (
	written stage = iota // under a temporary name
	renamed              // durable, and not listed
	listed               // durable and listed
)

const tempSuffix = ".tmp"

// writer writes one segment.
type writer struct {
	out  io.Writer
	at   int64
	foot footer
}

func (w *writer) write(b []byte) error {
	n, err := w.out.Write(b)
	w.at += int64(n)
	return err
}

// tableWriter fills a table. Keys must go up.
type tableWriter struct {
	w     *writer
	t     *table
	items []item
	size  int
}

func (tw *tableWriter) add(key string, value []byte) error {
	switch {
	case key == "" || len(key) > maxKey || len(value) > maxValue:
		return fmt.Errorf("record %.40q has %d bytes: it is too large for a segment", key, len(value))
	case key <= string(tw.t.Last):
		return fmt.Errorf("key %q comes after %q", key, tw.t.Last)
	}
	tw.items = append(tw.items, item{key, value})
	tw.t.Last, tw.t.Items = []byte(key), tw.t.Items+1
	if tw.size += len(key) + len(value); tw.size >= blockSize {
		return tw.flush()
	}
	return nil
}

func (tw *tableWriter) flush() error {
	if len(tw.items) == 0 {
		return nil
	}
	raw, err := pack(tw.items)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(raw)
	tw.t.Blocks = append(tw.t.Blocks, block{First: []byte(tw.items[0].key), At: tw.w.at, Size: int64(len(raw)), Sum: sum[:]})
	tw.items, tw.size = tw.items[:0], 0
	return tw.w.write(raw)
}

// content is the content of a new segment.
type content struct {
	number   uint64
	previous []byte
	records  []broker.Archived
	entries  func(add func(broker.Entry) error) error // from before's size on
	sign     func(name string, manifest []byte) ([]byte, error)
}

// writeTo writes a segment and returns its footer and digest.
func (c content) writeTo(out io.Writer, foot footer) (footer, []byte, error) {
	foot.Version, foot.Number, foot.Previous = version, c.number, c.previous
	w := &writer{out: out, foot: foot}
	f := &w.foot
	if err := w.write([]byte(magic)); err != nil {
		return *f, nil, err
	}
	records := slices.Clone(c.records)
	slices.SortFunc(records, func(a, b broker.Archived) int { return cmp.Compare(a.Key, b.Key) })
	tw := &tableWriter{w: w, t: &f.Records}
	for _, r := range records {
		if err := tw.add(r.Key, r.Value); err != nil {
			return *f, nil, err
		}
	}
	if err := tw.flush(); err != nil {
		return *f, nil, err
	}
	tw = &tableWriter{w: w, t: &f.Entries}
	f.After = f.Before.Clone()
	err := c.entries(func(e broker.Entry) error {
		if err := f.After.Add(e); err != nil {
			return err
		}
		text, err := json.Marshal(e)
		if err != nil {
			return err
		}
		return tw.add(revisionKey(e.Revision), text)
	})
	if err = errors.Join(err, tw.flush()); err != nil {
		return *f, nil, err
	}
	return c.finish(w)
}

// finish writes the footer and the signature.
func (c content) finish(w *writer) (footer, []byte, error) {
	text, err := json.Marshal(&w.foot)
	if err != nil {
		return w.foot, nil, err
	}
	sum := sha256.Sum256(text)
	var signature []byte
	if c.sign != nil {
		m, err := w.foot.manifest(sum[:])
		if err == nil {
			signature, err = c.sign(nameOf(c.number), m)
		}
		if err != nil {
			return w.foot, nil, fmt.Errorf("signing: %w", err)
		}
	}
	tail := bytes.NewBuffer(text)
	tail.Write(signature)
	tail.Write(binary.BigEndian.AppendUint32(nil, uint32(len(text))))
	tail.Write(binary.BigEndian.AppendUint32(nil, uint32(len(signature))))
	tail.WriteString(magicEnd)
	return w.foot, sum[:], w.write(tail.Bytes())
}

// create makes the content of a new file durable under a name of its own: a temporary file, its sync, a rename, and the
// sync of the directory. A crash leaves a temporary file, which the next one replaces, or one that the ledger does not list.
func create(path string, fault func(stage) error, f func(io.Writer) error) error {
	temp := path + tempSuffix
	out, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err = f(out); err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(err, os.Remove(temp)) // the disk may be full
	}
	err = fault(written)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err == nil {
		err = fault(renamed)
	}
	return err
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
