package power

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	pageSize   = 4096
	sectorSize = 512
)

// page is a part of a file. It is not changed once it was read, so that images share it.
type page [pageSize]byte

// content is that of a file. A page that is not there is zeros.
type content struct {
	size  int64
	pages map[int64]*page
}

// inode is a file, whatever its name. A number may be used again, with another time of birth.
type inode struct {
	number uint64
	born   unix.StatxTimestamp
}

// state is a directory of files.
type state struct {
	names map[string]inode
	files map[inode]content
}

// Call is a system call on a file of the disk.
type Call struct {
	Name string // pwrite, fsync, fdatasync, truncate, allocate, unlink, link or rename
	File string // its name in the directory; "." is the directory
	// Offset of a pwrite.
	Offset int64
}

// Syncs reports whether the call makes something durable.
func (c Call) Syncs() bool { return c.Name == "fsync" || c.Name == "fdatasync" }

func (c Call) String() string { return c.Name + " " + c.File }

// Disk is a directory that may lose its power.
type Disk struct {
	dir string
	on  func(Call) syscall.Errno

	mu      sync.Mutex // guards durable
	durable state
}

// Omit is the answer to a sync that does nothing, as if the code did not make it.
const Omit = syscall.Errno(1 << 20)

// Watch begins to watch a directory, until stop. All that is in it is durable. on runs before each call, while its
// caller waits, and returns the error that the call is to fail with; zero: it is made. on must not write a file, nor wait
// for a goroutine that does. The process stays under the filter: see [Run].
func Watch(dir string, on func(Call) syscall.Errno) (d *Disk, stop func(), err error) {
	return watch(dir, on, func(now state) state { return now })
}

// watch is Watch with the durable state that remember makes of the present one.
func watch(dir string, on func(Call) syscall.Errno, remember func(now state) state) (d *Disk, stop func(), err error) {
	s, err := supervise()
	if err != nil {
		return nil, nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, nil, err
	}
	d = &Disk{dir: dir, on: on}
	now, err := d.read()
	if err != nil {
		return nil, nil, err
	}
	d.durable = remember(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watcher != nil {
		return nil, nil, errors.New("power: another disk is watched")
	}
	s.watcher = d.answer
	return d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watcher = nil
	}, nil
}

// Left is the disk when a process ends now and the power stays: all its writes, of which a part is durable.
type Left struct{ now, durable state }

// Left returns it. Call it in on, or when no call is made.
func (d *Disk) Left() (Left, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.read()
	return Left{now, d.durable.clone()}, err
}

// clone also makes the maps of a zero state.
func (s state) clone() state {
	c := state{names: map[string]inode{}, files: map[inode]content{}}
	maps.Copy(c.names, s.names)
	maps.Copy(c.files, s.files)
	return c
}

// Watch is [Watch] on a directory that is made from l.
func (l Left) Watch(dir string, on func(Call) syscall.Errno) (d *Disk, stop func(), err error) {
	all := Image{}
	for name, i := range l.now.names {
		all[name] = l.now.files[i]
	}
	if err := all.Write(dir); err != nil {
		return nil, nil, err
	}
	return watch(dir, on, func(now state) state {
		durable := l.durable.clone()
		for name, i := range now.names { // the same files have other numbers here
			old := l.now.names[name]
			durable.files[i] = l.durable.files[old]
			for n, was := range l.durable.names {
				if was == old {
					durable.names[n] = i
				}
			}
		}
		return durable
	})
}

// answer returns the error of a call. A sync that is made takes effect.
func (d *Disk) answer(call, path string, fd int, offset int64) syscall.Errno {
	name, ok := d.nameOf(path)
	if !ok {
		return 0
	}
	c := Call{Name: call, File: name, Offset: offset}
	switch errno := d.on(c); {
	case errno == Omit:
		return 0
	case errno != 0 || !c.Syncs():
		return errno
	}
	if err := d.sync(name, fd); err != nil {
		panic(fmt.Sprintf("power: %v: %v", c, err))
	}
	return 0
}

// nameOf returns the name of a path in the directory.
func (d *Disk) nameOf(path string) (string, bool) {
	path = strings.TrimSuffix(path, " (deleted)")
	rel, ok := strings.CutPrefix(path, d.dir)
	switch {
	case !ok:
		return "", false
	case rel == "":
		return ".", true
	}
	return strings.CutPrefix(rel, "/")
}

func (d *Disk) sync(name string, fd int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if name == "." {
		now, err := d.read()
		if err != nil {
			return err
		}
		d.durable.names = now.names
		for _, i := range now.names {
			if _, ok := d.durable.files[i]; !ok {
				d.durable.files[i] = content{} // the name is durable, and nothing of the content
			}
		}
		return nil
	}
	path := fmt.Sprintf("/proc/self/fd/%d", fd)
	i, err := inodeOf(path)
	if err != nil {
		return err
	}
	d.durable.files[i], err = readContent(path, d.durable.files[i])
	return err
}

// read returns the directory as programs see it.
func (d *Disk) read() (state, error) {
	now := state{names: map[string]inode{}, files: map[inode]content{}}
	list, err := os.ReadDir(d.dir)
	for _, e := range list {
		path := filepath.Join(d.dir, e.Name())
		i, err := inodeOf(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return now, err
		}
		now.names[e.Name()] = i
		if now.files[i], err = readContent(path, d.durable.files[i]); err != nil {
			return now, err
		}
	}
	return now, err
}

func inodeOf(path string) (inode, error) {
	var s unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_INO|unix.STATX_BTIME, &s)
	return inode{s.Ino, s.Btime}, err
}

// readContent reads a file, without its holes. It takes pages that are the same from like.
func readContent(path string, like content) (c content, err error) {
	f, err := os.Open(path)
	if err != nil {
		return c, err
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return c, err
	}
	c = content{size: info.Size(), pages: map[int64]*page{}}
	for at := int64(0); at < c.size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return c, nil // only a hole is left
		}
		if err != nil {
			return c, err
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return c, err
		}
		first := data / pageSize
		raw := make([]byte, (hole-first*pageSize+pageSize-1)/pageSize*pageSize)
		if _, err := f.ReadAt(raw, first*pageSize); err != nil && !errors.Is(err, io.EOF) {
			return c, err
		}
		for n := first; len(raw) > 0; n, raw = n+1, raw[pageSize:] {
			p := page(raw)
			switch old := like.pages[n]; {
			case old != nil && *old == p:
				c.pages[n] = old
			case p != page{}:
				c.pages[n] = &p
			}
		}
		at = hole
	}
	return c, nil
}

// Draw draws which parts that were not synced have reached the disk.
type Draw func() bool

// None and All are draws of nothing and of everything.
func None() bool { return false }
func All() bool  { return true }

// Some draws each part with the probability p.
func Some(r *rand.Rand, p float64) Draw { return func() bool { return r.Float64() < p } }

// Image is the content of the disk after a loss of power.
type Image map[string]content

// Left returns the image as a disk: all of it is durable.
func (im Image) Left() Left {
	s := state{names: map[string]inode{}, files: map[inode]content{}}
	for name, c := range im {
		i := inode{number: uint64(len(s.names)) + 1}
		s.names[name], s.files[i] = i, c
	}
	return Left{s, s}
}

// Images returns the disk after a loss of power now, for each of the draws. It leaves out an image that equals the first.
// Call it in on, or when no call is made.
func (d *Disk) Images(draws ...Draw) ([]Image, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.read()
	if err != nil {
		return nil, err
	}
	var images []Image
	for _, draw := range draws {
		if im := d.image(now, draw); len(images) == 0 || !maps.EqualFunc(im, images[0], content.equal) {
			images = append(images, im)
		}
	}
	return images, nil
}

func (d *Disk) image(now state, draw Draw) Image {
	names := maps.Clone(d.durable.names)
	both := maps.Clone(now.names)
	maps.Copy(both, d.durable.names)
	for _, name := range slices.Sorted(maps.Keys(both)) {
		i, exists := now.names[name]
		switch {
		case i == d.durable.names[name] || !draw():
		case exists:
			names[name] = i
		default:
			delete(names, name)
		}
	}
	im := Image{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		im[name] = d.durable.files[names[name]]
		if written, ok := now.files[names[name]]; ok { // else it has no name that programs see
			im[name] = im[name].mix(written, draw)
		}
	}
	return im
}

func (c content) equal(other content) bool {
	return c.size == other.size && maps.EqualFunc(c.pages, other.pages, func(a, b *page) bool { return a == b || *a == *b })
}

// mix returns the content with a part of the written one.
func (c content) mix(written content, draw Draw) content {
	mixed := content{size: c.size, pages: map[int64]*page{}}
	if written.size != c.size && draw() {
		mixed.size = written.size
	}
	numbers := maps.Clone(written.pages)
	maps.Copy(numbers, c.pages)
	var zeros page
	for _, n := range slices.Sorted(maps.Keys(numbers)) {
		before, after := c.pages[n], written.pages[n]
		if n*pageSize >= written.size { // it was cut off, and is back with the former size
			after = before
		}
		if before == after {
			mixed.pages[n] = before
			continue
		}
		if before == nil {
			before = &zeros
		}
		if after == nil {
			after = &zeros
		}
		p := *before
		for at := 0; at < pageSize; at += sectorSize {
			if to := at + sectorSize; [sectorSize]byte(after[at:to]) != [sectorSize]byte(p[at:to]) && draw() {
				copy(p[at:to], after[at:to])
			}
		}
		mixed.pages[n] = &p
	}
	mixed.cut()
	return mixed
}

// cut drops the pages beyond the size, and those of zeros.
func (c content) cut() {
	for n, p := range c.pages {
		if left := c.size - n*pageSize; left < pageSize {
			kept := *p
			clear(kept[max(left, 0):])
			p = &kept
			c.pages[n] = p
		}
		if *p == (page{}) {
			delete(c.pages, n)
		}
	}
}

// Write writes the image to a directory.
func (im Image) Write(dir string) error {
	for name, c := range im {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		err = f.Truncate(c.size)
		for n, p := range c.pages {
			_, seekErr := f.Seek(n*pageSize, io.SeekStart)
			_, writeErr := f.Write(p[:min(pageSize, c.size-n*pageSize)])
			err = errors.Join(err, seekErr, writeErr)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
