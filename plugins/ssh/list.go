package ssh

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// maxKRL is the size limit of a list in bytes.
const maxKRL = 64 << 20

// list is a revocation list in a file. Another program may change its own sections of the file between two writes.
type list struct {
	path string // as configured; it may be a link

	mu       sync.Mutex           // guards the fields below, and the file
	inPlace  bool                 // do not replace the file
	ids      map[string]time.Time // each key id with the time until which it is listed
	versions map[string]uint64    // the first version of the file that has the key id, since the start
	version  uint64
}

// openList loads the list from the file, if there is one, and writes it. The file has no expiry times, so each entry is
// kept for the longest possible TTL plus [broker.Leeway].
func openList(path string, inPlace bool, now time.Time) (*list, error) {
	l := &list{path: path, inPlace: inPlace, ids: map[string]time.Time{}, versions: map[string]uint64{}}
	k, _, err := l.load()
	if err != nil {
		return nil, err
	}
	ids := map[string]time.Time{}
	for _, id := range k.ids {
		ids[id] = now.Add(broker.MaxTTL + broker.Leeway)
	}
	return l, l.add(ids, now)
}

// load reads the file. A missing file is an empty list.
func (l *list) load() (k krl, raw []byte, err error) {
	info, err := os.Stat(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return krl{}, nil, nil
	}
	if err != nil {
		return krl{}, nil, err
	}
	if info.Size() > maxKRL {
		return krl{}, nil, errors.New("the list is too large")
	}
	if raw, err = os.ReadFile(l.path); err != nil {
		return krl{}, nil, err
	}
	k, err = decodeKRL(raw)
	return k, raw, err
}

// add lists ids until their times, and drops expired entries. It keeps the sections of other programs as they are in the
// file now. After an error the ids stay in memory, and the next add writes them.
func (l *list) add(ids map[string]time.Time, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.Copy(l.ids, ids)
	maps.DeleteFunc(l.ids, func(_ string, until time.Time) bool { return now.After(until) })
	maps.DeleteFunc(l.versions, func(id string, _ uint64) bool { _, listed := l.ids[id]; return !listed })
	k, old, err := l.load()
	if err != nil {
		return err
	}
	l.version = max(l.version, k.version) + 1
	k.version, k.ids = l.version, slices.Sorted(maps.Keys(l.ids))
	if err := l.write(k.encode(now), old); err != nil {
		return err
	}
	for id := range l.ids {
		if _, known := l.versions[id]; !known {
			l.versions[id] = l.version
		}
	}
	return nil
}

// write replaces the file atomically, so that sshd never reads half a list. Where the system refuses that, since the file
// is mounted or its directory cannot be written, it writes the file in place.
func (l *list) write(raw, old []byte) error {
	path, err := resolve(l.path)
	if err != nil {
		return err
	}
	if l.inPlace && old != nil {
		return overwrite(path, raw, old)
	}
	err = replace(path, raw)
	for _, refusal := range []syscall.Errno{syscall.EBUSY, syscall.EACCES, syscall.EPERM, syscall.EROFS} {
		if old != nil && errors.Is(err, refusal) {
			l.inPlace = true
			return overwrite(path, raw, old)
		}
	}
	return err
}

// listed returns the key ids of ours that are in the file now.
func (l *list) listed() (map[string]bool, error) {
	k, _, err := l.load()
	if err == nil && k.half {
		err = errHalf
	}
	ids := make(map[string]bool, len(k.ids))
	for _, id := range k.ids {
		ids[id] = true
	}
	return ids, err
}

// since returns the version of the file that listed the key id first since the start. Zero: it is not listed.
func (l *list) since(id string) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.versions[id]
}

var errHalf = errors.New("the list was left half written, so sshd refuses every key: start the broker again")

// maxLinks is the number of links that resolve follows.
const maxLinks = 16

// resolve follows links to the file that a writer must replace. The file need not exist.
func resolve(path string) (string, error) {
	for range maxLinks {
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return "", err
		}
		path = filepath.Join(dir, filepath.Base(path))
		next, err := os.Readlink(path)
		if err != nil {
			return path, nil // not a link, or not there: its writer reports the rest
		}
		if !filepath.IsAbs(next) {
			next = filepath.Join(dir, next)
		}
		path = next
	}
	return "", errors.New("too many links")
}

// replace writes a temporary file next to path, syncs it and renames it to path. The file has key ids and no secrets,
// so every user may read it; sshd reads it as root.
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

// overwrite writes raw into the file, which has the bytes old. It never empties the file: sshd would refuse no key. It
// first gives the list a format that no sshd knows, so that sshd refuses every key until the last step. A crash in
// between leaves that format, and the next start writes the list again.
func overwrite(path string, raw, old []byte) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	err = writeOver(f, raw)
	switch {
	case err == nil:
		return nil
	case len(old) == 0:
		return errors.Join(fmt.Errorf("writing in place: %w", err), f.Truncate(0))
	}
	return errors.Join(fmt.Errorf("writing in place: %w", err), writeOver(f, old))
}

// writeOver makes raw, which is not empty, the content of the file.
func writeOver(f *os.File, raw []byte) error {
	half := []byte{0xff, 0xff, 0xff, 0xff} // krlHalf
	start := append(bytes.Clone(raw[:formatOffset]), half...)
	if _, err := f.WriteAt(start, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	_, err := f.WriteAt(raw[len(start):], int64(len(start)))
	if err = errors.Join(err, f.Truncate(int64(len(raw))), f.Sync()); err != nil {
		return err
	}
	if _, err := f.WriteAt(raw[formatOffset:len(start)], formatOffset); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	again, err := io.ReadAll(io.NewSectionReader(f, 0, int64(len(raw))+1))
	if err == nil && !bytes.Equal(again, raw) {
		err = errors.New("the file has other bytes than were written")
	}
	return err
}

// Inspect reads a revocation list. It returns the list's version, which is zero for an empty file, and the number of our
// certificates on it.
func Inspect(path string) (version uint64, ours int, err error) {
	if _, err := os.Stat(path); err != nil {
		return 0, 0, err // sshd refuses every key without the file
	}
	k, _, err := (&list{path: path}).load()
	if err == nil && k.half {
		err = errHalf
	}
	return k.version, len(k.ids), err
}
