package archive

import (
	"errors"
	"os"
	"strings"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
)

// Segment is the ledger's record of a segment.
type Segment struct {
	Number  uint64               `json:"number"`
	Digest  string               `json:"digest"` // SHA-256 of its footer, in hexadecimal
	Size    int64                `json:"size"`   // bytes of the file
	Records uint64               `json:"records"`
	First   broker.Revision      `json:"first"`  // of its first entry
	Tree    audit.Tree           `json:"tree"`   // of the audit log up to its last entry
	Ranges  map[string][2]string `json:"ranges"` // the first and last key of each family, such as "g"
	Removed bool                 `json:"removed"`
}

// mayHave reports whether the segment may have a key from one to another. An empty to is after all keys.
func (s Segment) mayHave(from, to string) bool {
	name, _, one := strings.Cut(from, "/")
	if !one {
		return true
	}
	r, ok := s.Ranges[name]
	return ok && from <= r[1] && (to == "" || to >= r[0]) || ok && strings.HasPrefix(r[1], from)
}

// fault names the segment in an error.
func (s Segment) fault(err error) error {
	var refusal *broker.Error
	if err == nil || errors.As(err, &refusal) {
		return err
	}
	why := "cannot be read"
	switch {
	case errors.Is(err, os.ErrNotExist):
		why = "is missing"
	case errors.Is(err, errDamaged):
		why = "is damaged, or is not the one that was written"
	}
	return broker.Errorf(broker.Unavailable, "archive", "segment %s of the archive %s: restore it from a backup",
		nameOf(s.Number), why).With(broker.CodeArchiveDamaged).Because(err)
}

func (s Segment) public() broker.Segment {
	return broker.Segment{Number: s.Number, Name: nameOf(s.Number), Records: s.Records, First: s.First,
		Last: broker.Revision(s.Tree.Size())}
}

// rangesOf returns the first and last key of each family.
func rangesOf(records []broker.Archived) map[string][2]string {
	ranges := map[string][2]string{}
	for _, r := range records {
		name, _, _ := strings.Cut(r.Key, "/")
		if was, ok := ranges[name]; !ok {
			ranges[name] = [2]string{r.Key, r.Key}
		} else {
			ranges[name] = [2]string{min(was[0], r.Key), max(was[1], r.Key)}
		}
	}
	return ranges
}
