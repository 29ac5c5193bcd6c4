package process

import (
	"bytes"
	"errors"
	"io"
	"os"

	"go.etcd.io/bbolt"
)

// UsedBytes returns the size of the pages in use in a ledger that a broker has open. It reads a copy.
func UsedBytes(file string) (n float64, err error) {
	copied, err := copyOf(file)
	defer os.Remove(copied) //nolint:errcheck // below build/, which `make clean` removes
	if err != nil {
		return 0, err
	}
	db, err := bbolt.Open(copied, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer db.Close() //nolint:errcheck // it was only read
	return n, db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(_ []byte, of *bbolt.Bucket) error {
			s := of.Stats()
			n += float64(s.BranchAlloc + s.LeafAlloc)
			return nil
		})
	})
}

// copyOf makes a copy of a ledger that a broker has open, which no commit changed while it was made.
func copyOf(file string) (copied string, err error) {
	copied = file + ".copy"
	for range 1000 {
		unchanged, err := copyLedger(copied, file)
		if unchanged || err != nil {
			return copied, err
		}
	}
	return copied, errors.New("the ledger changed in each of 1,000 copies")
}

// copyLedger copies a ledger, and reports whether it stayed the same. A commit changes one of the first two pages.
func copyLedger(to, from string) (unchanged bool, err error) {
	in, err := os.Open(from)
	if err != nil {
		return false, err
	}
	defer in.Close() //nolint:errcheck // it was only read
	before, after := make([]byte, 2*os.Getpagesize()), make([]byte, 2*os.Getpagesize())
	if _, err := in.ReadAt(before, 0); err != nil {
		return false, err
	}
	out, err := os.Create(to)
	if err != nil {
		return false, err
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		return false, err
	}
	_, err = in.ReadAt(after, 0)
	return bytes.Equal(before, after), err
}

// FreePages counts the pages that no record uses in a ledger that a broker has open, and its bytes. It reads a copy.
func FreePages(file string) (free, size float64, err error) {
	copied, err := copyOf(file)
	defer os.Remove(copied) //nolint:errcheck // below build/, which `make clean` removes
	if err != nil {
		return 0, 0, err
	}
	db, err := bbolt.Open(copied, 0o600, &bbolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return 0, 0, err
	}
	defer db.Close() //nolint:errcheck // it was only read
	info, err := os.Stat(copied)
	if err != nil {
		return 0, 0, err
	}
	return float64(db.Stats().FreePageN), float64(info.Size()), nil
}
