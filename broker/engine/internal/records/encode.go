package records

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/fxamacker/cbor/v2"

	"github.com/pawlsec/pawl/broker"
)

// A record begins with the version of its format. Builds before version 1 wrote JSON, which begins with a brace.
const (
	version1 = 1
	jsonOpen = '{'
)

var encoder, decoder = modes()

func modes() (cbor.UserBufferEncMode, cbor.DecMode) {
	enc, err := cbor.EncOptions{Sort: cbor.SortNone}.UserBufferEncMode()
	if err != nil {
		panic("records: the encoder's options are wrong: " + err.Error())
	}
	dec, err := cbor.DecOptions{DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden,
		TagsMd: cbor.TagsForbidden, MaxNestedLevels: 8}.DecMode()
	if err != nil {
		panic("records: the decoder's options are wrong: " + err.Error())
	}
	return enc, dec
}

// encode encodes a record in the latest format.
func encode(key string, rec any) ([]byte, error) {
	wire, err := toWire(rec)
	if err != nil {
		return nil, fmt.Errorf("encoding record %q: %w", key, err)
	}
	out := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(out)
	out.Reset()
	out.WriteByte(version1)
	if err := encoder.MarshalToBuffer(wire, out); err != nil {
		return nil, fmt.Errorf("encoding record %q: %w", key, err)
	}
	return bytes.Clone(out.Bytes()), nil
}

// buffers are of records that are being encoded: they have no secrets.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// decode decodes a record of any format.
func decode(key string, raw []byte, rec any) (err error) {
	switch {
	case len(raw) == 0:
		err = errors.New("it is empty")
	case raw[0] == jsonOpen:
		err = json.Unmarshal(raw, rec)
		if rv, ok := rec.(*broker.Revocation); ok {
			rv.Grants, rv.Uncounted = counted(rv.Grants, rv.Uncounted)
		}
	case raw[0] == version1:
		err = fromWire(raw[1:], rec)
	default:
		err = fmt.Errorf("its format is version %d, and this build reads version %d and JSON: run a later build",
			raw[0], version1)
	}
	if err != nil {
		return fmt.Errorf("reading record %q: %w", key, err)
	}
	return nil
}

// toWire is the one table of the types that are encoded.
func toWire(rec any) (any, error) {
	switch r := rec.(type) {
	case broker.Grant:
		return grantWire(r), nil
	case Scheduled:
		return wireScheduled{r.Backend, stampOf(r.Expires), r.Abandoned, r.Held}, nil
	case broker.Delegation:
		return delegationWire(r)
	case broker.Chain:
		return chainWire(r), nil
	case Usage:
		return usageWire(r), nil
	case Tally:
		return tallyWire(r), nil
	case broker.Revocation:
		return revocationWire(r), nil
	case Rule:
		return wireRule{*fenceWire(&r.Fence), r.Selector}, nil
	case broker.Canary:
		return wireCanary{r.ID, r.Chain, r.Note, r.By, stampOf(r.Planted), stampOf(r.Touched), r.Touches}, nil
	case Bundle:
		return wireBundle{r.Name, r.Version, r.Digest, stampOf(r.Since), r.By}, nil
	case acknowledged:
		return wireAcknowledged{stampOf(r.At)}, nil
	case cursor:
		return wireCursor(r), nil
	}
	panic(fmt.Sprintf("records: %T has no format", rec))
}

// fromWire is the one table of the types that are decoded.
func fromWire(raw []byte, rec any) (err error) {
	switch r := rec.(type) {
	case *broker.Grant:
		*r, err = read(raw, (*wireGrant).grant)
	case *Scheduled:
		*r, err = read(raw, func(w *wireScheduled) (Scheduled, error) {
			return Scheduled{Backend: w.Backend, Expires: w.Expires.time(), Abandoned: w.Abandoned, Held: w.Held}, nil
		})
	case *broker.Delegation:
		*r, err = read(raw, func(w *wireDelegation) (broker.Delegation, error) { return w.delegation() })
	case *broker.Chain:
		*r, err = read(raw, func(w *wireChain) (broker.Chain, error) { return w.chain() })
	case *Usage:
		*r, err = read(raw, func(w *wireUsage) (Usage, error) { return w.usage(), nil })
	case *Tally:
		*r, err = read(raw, func(w *wireTally) (Tally, error) { return w.tally(), nil })
	case *broker.Revocation:
		*r, err = read(raw, func(w *wireRevocation) (broker.Revocation, error) { return w.revocation(), nil })
	case *Rule:
		*r, err = read(raw, func(w *wireRule) (Rule, error) {
			return Rule{Fence: *w.Fence.fence(), Selector: w.Selector}, nil
		})
	case *broker.Canary:
		*r, err = read(raw, func(w *wireCanary) (broker.Canary, error) {
			return broker.Canary{ID: w.ID, Chain: w.Chain, Note: w.Note, By: w.By, Planted: w.Planted.time(),
				Touched: w.Touched.time(), Touches: w.Touches}, nil
		})
	case *Bundle:
		*r, err = read(raw, func(w *wireBundle) (Bundle, error) {
			return Bundle{w.Name, w.Version, w.Digest, w.Since.time(), w.By}, nil
		})
	case *acknowledged:
		*r, err = read(raw, func(w *wireAcknowledged) (acknowledged, error) { return acknowledged{w.At.time()}, nil })
	case *cursor:
		*r, err = read(raw, func(w *wireCursor) (cursor, error) { return cursor(*w), nil })
	default:
		panic(fmt.Sprintf("records: %T has no format", rec))
	}
	return err
}

// read decodes a wire type and converts it.
func read[W, T any](raw []byte, convert func(*W) (T, error)) (rec T, err error) {
	var w W
	if err := decoder.Unmarshal(raw, &w); err != nil {
		return rec, err
	}
	return convert(&w)
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

// maxKept bounds the kept records of a family. At the bound all of them are dropped.
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
