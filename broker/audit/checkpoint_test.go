package audit_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
)

// entries returns a log of n entries.
func entries(n int) (list []broker.Entry) {
	for i := range n {
		list = append(list, broker.Entry{Revision: broker.Revision(i + 1), At: time.Unix(int64(i), 5).In(time.FixedZone("elsewhere", 3600)),
			Actor: "pawl", Op: broker.OpResume, Detail: fmt.Sprint("entry <", i, ">")})
	}
	return list
}

func log(list []broker.Entry) audit.Log {
	return func(yield func(broker.Entry, error) bool) {
		for _, e := range list {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func checkpoint(t testing.TB, s *audit.Signer, list []broker.Entry) []byte {
	t.Helper()
	var tree audit.Tree
	if err := tree.Grow(log(list), 0); err != nil {
		t.Fatal(err)
	}
	signed, err := s.Checkpoint(&tree)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// TestProofs checks that at every size the root is that of RFC 6962, and that it proves every entry and no other.
func TestProofs(t *testing.T) {
	signer, key := newSigner(t)
	list := entries(20)
	for size := 1; size <= len(list); size++ {
		c, err := audit.OpenCheckpoint(checkpoint(t, signer, list[:size]), key)
		if err != nil || c.Size != int64(size) || c.Origin != "example.org/pawl" {
			t.Fatalf("OpenCheckpoint = %+v, %v, want size %d", c, err, size)
		}
		for _, e := range list[:size] {
			proof, err := audit.Prove(log(list), int64(size), e.Revision)
			if err != nil {
				t.Fatal(err)
			}
			if !c.Holds(e, proof) {
				t.Errorf("entry %d is not proven by the checkpoint of %d", e.Revision, size)
			}
			e.Detail += "!"
			if c.Holds(e, proof) {
				t.Errorf("entry %d is proven with another detail", e.Revision)
			}
		}
	}
	if _, err := audit.Prove(log(list), 20, 21); err == nil {
		t.Error("Prove of a missing entry = nil, want an error")
	}
	if (audit.Checkpoint{Size: 1}).Holds(broker.Entry{}, tlog.RecordProof{}) {
		t.Error("an entry without a revision is proven")
	}
}

// TestAdd checks that a tree accepts the next entry and no other.
func TestAdd(t *testing.T) {
	var tree audit.Tree
	for _, r := range []broker.Revision{0, 2} {
		if err := tree.Add(broker.Entry{Revision: r}); !errors.Is(err, audit.ErrChanged) || tree.Size() != 0 {
			t.Errorf("Add of entry %d to an empty tree = %v, want ErrChanged", r, err)
		}
	}
	if err := tree.Add(broker.Entry{Revision: 1}); err != nil || tree.Size() != 1 {
		t.Errorf("Add of entry 1 = %v, want it in", err)
	}
}

// TestVerify checks that a log may grow after the checkpoint. A log that was truncated, changed or added to before it
// must fail.
func TestVerify(t *testing.T) {
	signer, key := newSigner(t)
	list := entries(9)
	signed := checkpoint(t, signer, list[:7])
	changed := slices.Clone(list)
	changed[3].Actor = "mallory"
	cut := slices.Delete(slices.Clone(list), 3, 4)
	renumbered := slices.Clone(cut)
	for i := range renumbered {
		renumbered[i].Revision = broker.Revision(i + 1)
	}
	elsewhere := slices.Clone(list)
	for i := range elsewhere {
		elsewhere[i].At = elsewhere[i].At.UTC() // the same moment
	}
	later := slices.Clone(list)
	later[8].Actor = "mallory" // after the checkpoint
	for name, c := range map[string]struct {
		log  []broker.Entry
		want error
	}{
		"the same":         {list[:7], nil},
		"a log that grew":  {list, nil},
		"times in UTC":     {elsewhere, nil},
		"changed after it": {later, nil},
		"a changed entry":  {changed, audit.ErrChanged},
		"a missing entry":  {cut, audit.ErrChanged},
		"a renumbered log": {renumbered, audit.ErrChanged},
		"a truncated log":  {list[:6], audit.ErrChanged},
		"an empty log":     {nil, audit.ErrChanged},
	} {
		if _, err := audit.Verify(log(c.log), key, signed); !errors.Is(err, c.want) {
			t.Errorf("Verify of %s = %v, want %v", name, err, c.want)
		}
	}
	if _, other := newSigner(t); true {
		if _, err := audit.Verify(log(list), other, signed); !errors.Is(err, audit.ErrForeign) {
			t.Errorf("Verify with another key = %v, want ErrForeign", err)
		}
	}
	if c, err := audit.Verify(log(list), key, checkpoint(t, signer, nil)); err != nil || c.Size != 0 {
		t.Errorf("Verify with the checkpoint of an empty log = %+v, %v, want nil", c, err)
	}
	broken := errors.New("the disk is gone")
	failing := func(yield func(broker.Entry, error) bool) { yield(broker.Entry{}, broken) }
	if _, err := audit.Verify(failing, key, signed); !errors.Is(err, broken) {
		t.Errorf("Verify of a log that cannot be read = %v, want the cause", err)
	}
}

// TestVerifyTwo checks one log against two checkpoints, as a party does that keeps a new one in place of the old one.
func TestVerifyTwo(t *testing.T) {
	signer, key := newSigner(t)
	list := entries(9)
	old := checkpoint(t, signer, list[:7])
	forked := slices.Clone(list)
	forked[3].Actor = "mallory"
	for name, c := range map[string]struct {
		log, now []broker.Entry
		want     error
	}{
		"a log that grew":         {list, list, nil},
		"the same":                {list, list[:7], nil},
		"a rolled back log":       {list[:6], list[:6], audit.ErrChanged},
		"a fork of the same size": {list, forked[:7], audit.ErrChanged},
		"a fork that grew":        {list, forked, audit.ErrChanged},
		"both forked":             {forked, forked, audit.ErrChanged},
		"an older checkpoint":     {list, list[:3], audit.ErrChanged},
	} {
		last, err := audit.Verify(log(c.log), key, old, checkpoint(t, signer, c.now))
		if !errors.Is(err, c.want) || err == nil && last.Size != int64(len(c.now)) {
			t.Errorf("%s: Verify = %+v, %v, want size %d, %v", name, last, err, len(c.now), c.want)
		}
	}
}

func TestChangedCheckpoint(t *testing.T) {
	signer, key := newSigner(t)
	signed := checkpoint(t, signer, entries(7))
	for i := range signed {
		changed := slices.Clone(signed)
		changed[i] ^= 1
		if _, err := audit.OpenCheckpoint(changed, key); err == nil {
			t.Fatalf("OpenCheckpoint with byte %d changed = nil, want an error", i)
		}
	}
}

// TestNotary checks that each checkpoint holds for the log at its time, while the log grows.
func TestNotary(t *testing.T) {
	w := newWorld(t)
	signer, key := newSigner(t)
	n := w.notary(signer)
	var kept [][]byte
	for range 3 {
		w.issue("root", w.open("root", "t"))
		signed, err := n.Checkpoint(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, signed)
	}
	for i, signed := range kept {
		c, err := audit.Verify(audit.Entries(w.ledger.Entries).From(t.Context(), 0), key, signed)
		if err != nil || c.Size < int64(i+1) {
			t.Errorf("Verify of checkpoint %d = %+v, %v, want it to hold", i+1, c, err)
		}
	}
	if bytes.Equal(kept[0], kept[2]) {
		t.Error("the checkpoint did not change with the log")
	}
	if _, err := audit.NewNotary(audit.NotaryConfig{}); err == nil {
		t.Error("NewNotary of an empty config = nil, want an error")
	}
}

func TestNewSigner(t *testing.T) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, public := newSigner(t)
	for name, key := range map[string]jose.JSONWebKey{"ECDSA": {Key: private}, "public": public, "none": {}} {
		if _, err := audit.NewSigner("name", key); err == nil {
			t.Errorf("NewSigner with the key %q = nil, want an error", name)
		}
	}
}

func FuzzOpenCheckpoint(f *testing.F) {
	signer, key := newSigner(f)
	signed := checkpoint(f, signer, entries(3))
	f.Add(signed)
	f.Add([]byte("a\n1\nAA==\n\n— a AAAA\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := audit.OpenCheckpoint(raw, key); err == nil && !bytes.HasPrefix(raw, signed[:len(signed)/2]) {
			t.Errorf("OpenCheckpoint accepted %q", raw)
		}
	})
}
