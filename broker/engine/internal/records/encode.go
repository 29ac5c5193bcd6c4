package records

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sync"
)

func encode(key string, rec any) ([]byte, error) {
	raw, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encoding record %q: %w", key, err)
	}
	return raw, nil
}

func decode(key string, raw []byte, rec any) error {
	if err := json.Unmarshal(raw, rec); err != nil {
		return fmt.Errorf("reading record %q: %w", key, err)
	}
	return nil
}

// load reads a record; ok is false when there is none.
func load[T any](t *Tx, key string) (rec T, ok bool, err error) {
	raw, err := t.tx.Get(key)
	if err != nil || raw == nil {
		return rec, false, err
	}
	if err := decode(key, raw, &rec); err != nil {
		return rec, false, err
	}
	return rec, true, nil
}

// save writes a record.
func save(t *Tx, key string, rec any) error {
	raw, err := encode(key, rec)
	if err != nil {
		return err
	}
	return t.tx.Put(key, raw)
}

// decoded keeps the decoded records of one family.
type decoded[T any] struct {
	mu   sync.RWMutex // guards kept
	kept map[string]keptRecord[T]
}

type keptRecord[T any] struct {
	raw []byte
	rec T
}

// maxKept bounds the records of a family that are kept; then all are dropped.
const maxKept = 1 << 16

func (c *decoded[T]) load(t *Tx, key string) (rec T, ok bool, err error) {
	raw, err := t.tx.Get(key)
	if err != nil || raw == nil {
		return rec, false, err
	}
	c.mu.RLock()
	k, known := c.kept[key]
	c.mu.RUnlock()
	if known && bytes.Equal(k.raw, raw) {
		return k.rec, true, nil
	}
	if err := decode(key, raw, &rec); err != nil {
		return rec, false, err
	}
	c.keep(key, keptRecord[T]{bytes.Clone(raw), rec})
	return rec, true, nil
}

// save writes the record and keeps it. If the transaction fails, the ledger's bytes differ from the kept ones, and the
// next load decodes.
func (c *decoded[T]) save(t *Tx, key string, rec T) error {
	raw, err := encode(key, rec)
	if err != nil {
		return err
	}
	c.keep(key, keptRecord[T]{raw, rec})
	return t.tx.Put(key, raw)
}

func (c *decoded[T]) keep(key string, k keptRecord[T]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kept == nil || len(c.kept) >= maxKept {
		c.kept = map[string]keptRecord[T]{}
	}
	c.kept[key] = k
}
