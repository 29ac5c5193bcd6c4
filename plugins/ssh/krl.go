package ssh

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"time"
)

// Constants of OpenSSH's PROTOCOL.krl.
const (
	krlMagic        = 0x5353484b524c0a00
	krlFormat       = 1
	krlCertificates = 1    // a section
	krlSignature    = 4    // a section
	krlKeyIDs       = 0x23 // a subsection of krlCertificates
)

// The kinds of sections and of subsections of krlCertificates that sshd knows. It refuses every key when a list has
// another kind.
var (
	krlSections    = []byte{krlCertificates, 2, 3, krlSignature, 5, 0xff}
	krlSubsections = []byte{0x20, 0x21, 0x22, krlKeyIDs, 0x39}
)

// krlHalf stands in place of krlFormat while a list is rewritten in place. sshd refuses every key while it reads a
// format that it does not know.
const krlHalf = 0xffffffff

// formatOffset is the position of the format in a list, behind the magic number.
const formatOffset = 8

// keyIDPrefix begins the key id of every certificate of ours.
const keyIDPrefix = "pawl-"

// krl is a key revocation list. Other programs may have sections of their own in it.
type krl struct {
	version uint64   // must only increase
	comment string   // another program's
	foreign []byte   // the sections without our key ids, unchanged and in order
	ids     []string // our key ids
	half    bool     // its writer ended while it rewrote the list in place, so some of our ids may be missing
}

// padding is the number of list lengths that differ for consecutive versions. A reader that mixes the start of one
// version with the end of another then finds a length that does not fit, and sshd refuses every key.
const padding = 64

// encode encodes the list. Our section revokes certificates of any authority by key id. It comes last, so that a
// rewrite in place changes nothing before it but the header.
func (k krl) encode(at time.Time) []byte {
	var keys []byte
	for _, id := range k.ids {
		keys = appendString(keys, id)
	}
	b := binary.BigEndian.AppendUint64(nil, krlMagic)
	b = binary.BigEndian.AppendUint32(b, krlFormat)
	b = binary.BigEndian.AppendUint64(b, k.version)
	b = binary.BigEndian.AppendUint64(b, uint64(at.Unix()))
	b = binary.BigEndian.AppendUint64(b, 0)          // flags
	b = appendString(appendString(b, ""), k.comment) // reserved, comment
	b = append(b, k.foreign...)
	const around = 1 + 4 + 4 + 4 + 1 + 4 // lengths and kinds of our section
	pad := (k.version - uint64(len(b)+around+len(keys))) % padding
	section := appendString(appendString(nil, ""), strings.Repeat(" ", int(pad))) // any authority, reserved
	section = appendString(append(section, krlKeyIDs), string(keys))
	return appendString(append(b, krlCertificates), string(section))
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

var (
	errKRL    = errors.New("not a key revocation list: make one with `ssh-keygen -k`, or empty the file")
	errSigned = errors.New("the key revocation list is signed, and a change would break its signature: " +
		"give the broker a list of its own")
)

// decodeKRL reads a list, of this program or another. An empty file is an empty list, as it is to sshd.
func decodeKRL(raw []byte) (k krl, err error) {
	if len(raw) == 0 {
		return krl{}, nil
	}
	r := reader{rest: raw}
	magic, format := r.uint64(), r.uint32()
	k.half = format == krlHalf
	if magic != krlMagic || format != krlFormat && !k.half {
		return krl{}, errKRL
	}
	k.version = r.uint64()
	r.uint64() // date
	flags, reserved := r.uint64(), r.text()
	k.comment = r.text()
	switch {
	case r.bad && k.half:
		return krl{half: true}, nil // the header was not written, so the file was empty before
	case r.bad || flags != 0 || reserved != "":
		return krl{}, errKRL
	}
	for len(r.rest) > 0 {
		kind, section := r.byte(), r.text()
		switch {
		case r.bad && k.half:
			return k, nil // the end was not written
		case r.bad:
			return krl{}, errKRL
		case kind == krlSignature:
			return krl{}, errSigned
		}
		if !k.add(kind, section) {
			return krl{}, errKRL
		}
	}
	return k, nil
}

// add adds a section. It takes our key ids out of a section that names no authority, and keeps all others.
func (k *krl) add(kind byte, section string) bool {
	if !slices.Contains(krlSections, kind) {
		return false
	}
	r := reader{rest: []byte(section)}
	if kind != krlCertificates || r.text() != "" {
		k.foreign = appendString(append(k.foreign, kind), section)
		return true
	}
	reserved := r.text()
	kept := appendString(appendString(nil, ""), reserved)
	before := len(kept)
	for len(r.rest) > 0 {
		inner, part := r.byte(), r.text()
		if r.bad || !slices.Contains(krlSubsections, inner) {
			return false
		}
		if inner == krlKeyIDs {
			if part = k.takeIDs(part); part == "" {
				continue
			}
		}
		kept = appendString(append(kept, inner), part)
	}
	if len(kept) > before {
		k.foreign = appendString(append(k.foreign, kind), string(kept))
	}
	return !r.bad
}

// takeIDs takes our key ids from a subsection and returns the others.
func (k *krl) takeIDs(part string) (others string) {
	var kept []byte
	r := reader{rest: []byte(part)}
	for len(r.rest) > 0 {
		id := r.text()
		if r.bad {
			return part // sshd refuses such a list
		}
		if strings.HasPrefix(id, keyIDPrefix) {
			k.ids = append(k.ids, id)
		} else {
			kept = appendString(kept, id)
		}
	}
	slices.Sort(k.ids)
	k.ids = slices.Compact(k.ids)
	return string(kept)
}

// reader consumes values from the front. It sets bad when too few bytes are left.
type reader struct {
	rest []byte
	bad  bool
}

func (r *reader) take(n uint64) []byte {
	if r.bad || n > uint64(len(r.rest)) {
		r.bad, r.rest = true, nil
		return make([]byte, min(n, 8))
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) byte() byte     { return r.take(1)[0] }
func (r *reader) uint32() uint32 { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) uint64() uint64 { return binary.BigEndian.Uint64(r.take(8)) }

func (r *reader) text() string {
	s := r.take(uint64(r.uint32()))
	if r.bad {
		return ""
	}
	return string(s)
}
