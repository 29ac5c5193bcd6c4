package ssh

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Constants of OpenSSH's PROTOCOL.krl.
const (
	krlMagic        = 0x5353484b524c0a00
	krlFormat       = 1
	krlCertificates = 1    // a section
	krlKeyIDs       = 0x23 // a subsection of krlCertificates
)

// maxKRL is the size limit of a list in bytes.
const maxKRL = 64 << 20

// encodeKRL encodes a list that revokes certificates of any authority by key id. The version must only increase.
func encodeKRL(ids []string, version uint64, at time.Time) []byte {
	var keys []byte
	for _, id := range ids {
		keys = appendString(keys, id)
	}
	b := binary.BigEndian.AppendUint64(nil, krlMagic)
	b = binary.BigEndian.AppendUint32(b, krlFormat)
	b = binary.BigEndian.AppendUint64(b, version)
	b = binary.BigEndian.AppendUint64(b, uint64(at.Unix()))
	b = binary.BigEndian.AppendUint64(b, 0)   // flags
	b = appendString(appendString(b, ""), "") // reserved, comment
	if len(ids) == 0 {
		return b
	}
	section := appendString(appendString(nil, ""), "") // any authority, reserved
	section = appendString(append(section, krlKeyIDs), string(keys))
	return appendString(append(b, krlCertificates), string(section))
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

var errKRL = errors.New("not a key revocation list written by this program")

// decodeKRL accepts only the output of encodeKRL. Another program's list has other sections, and a rewrite would lose
// them.
func decodeKRL(raw []byte) (ids []string, version uint64, err error) {
	r := reader{rest: raw}
	if r.uint64() != krlMagic || r.uint32() != krlFormat {
		return nil, 0, errKRL
	}
	version = r.uint64()
	r.uint64() // date
	flags, reserved, comment := r.uint64(), r.text(), r.text()
	if r.bad || flags != 0 || reserved != "" || comment != "" {
		return nil, 0, errKRL
	}
	if len(r.rest) == 0 {
		return nil, version, nil
	}
	kind := r.byte()
	section := reader{rest: []byte(r.text())}
	authority, reserved := section.text(), section.text()
	inner := section.byte()
	keys := reader{rest: []byte(section.text())}
	if r.bad || section.bad || kind != krlCertificates || inner != krlKeyIDs || authority+reserved != "" || len(r.rest)+len(section.rest) > 0 {
		return nil, 0, errKRL
	}
	for len(keys.rest) > 0 {
		ids = append(ids, keys.text())
	}
	if keys.bad || len(ids) == 0 {
		return nil, 0, errKRL
	}
	return ids, version, nil
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

// list is a revocation list in a file.
type list struct {
	path string

	mu      sync.Mutex           // guards the fields below, and the file
	ids     map[string]time.Time // each key id with the time until which it is listed
	version uint64
}

// openList loads the list from the file, if there is one. The file has no expiry times, so each entry is kept for the
// longest possible TTL plus leeway.
func openList(path string, now time.Time) (*list, error) {
	l := &list{path: path, ids: map[string]time.Time{}}
	raw, err := l.load()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		ids, version, err := decodeKRL(raw)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			l.ids[id] = now.Add(broker.MaxTTL + leeway)
		}
		l.version = version
	}
	return l, l.add(nil, now)
}

func (l *list) load() ([]byte, error) {
	info, err := os.Stat(l.path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxKRL {
		return nil, errors.New("the list is too large")
	}
	return os.ReadFile(l.path)
}

// add lists ids until their times, drops expired entries, and replaces the file atomically: sshd never reads half a
// list. After an error the ids stay in memory, and the next add writes them.
func (l *list) add(ids map[string]time.Time, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.Copy(l.ids, ids)
	maps.DeleteFunc(l.ids, func(_ string, until time.Time) bool { return now.After(until) })
	l.version++
	return replace(l.path, encodeKRL(slices.Sorted(maps.Keys(l.ids)), l.version, now))
}

func (l *list) read() ([]string, error) {
	raw, err := l.load()
	if err != nil {
		return nil, err
	}
	ids, _, err := decodeKRL(raw)
	return ids, err
}

// replace writes a temporary file next to path, syncs it and renames it to path. The file has key ids and no secrets,
// so everyone may read it; sshd reads it as root.
func replace(path string, raw []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".krl-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // the first error is returned
		}
	}()
	_, err = f.Write(raw)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
