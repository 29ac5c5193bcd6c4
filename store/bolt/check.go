package bolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"strconv"

	"go.etcd.io/bbolt"
)

// The parts of bbolt's file format, version 2, that a reader needs. Integers are in native byte order.
const (
	magic      = 0xED0CDAED
	format     = 2
	pageHeader = 16 // id u64, flags u16, count u16, overflow u32
	element    = 16 // leaf: flags, pos, key size, value size, u32 each; branch: pos, key size u32, page u64
	metaSize   = 64
	noFreelist = ^uint64(0)

	bucketHeader = 16 // of a bucket's value: root page and sequence

	flagBranch = 0x01
	flagLeaf   = 0x02
	// flagFreelist is of a page with a list of free pages.
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf element

	maxDepth = 64 // of a tree, in pages: a file of 2^63 bytes needs fewer
)

var order = binary.NativeEndian

// image is a ledger file under inspection. No number in the file is trusted.
type image struct {
	file     io.ReaderAt
	pageSize uint64
	root     uint64
	freelist uint64
	pages    uint64   // the high-water mark: pages below it may be in use
	txid     uint64   // of the newest transaction
	used     []uint64 // one bit for each page that was reached

	buckets   map[string][]byte
	head      head        // as stored
	base      head        // of the entry before the first one of the log
	cancelled func() bool // ends the check
}

// readImage reads the two meta pages. Both must be intact and of consecutive transactions. If one is damaged, bbolt
// would use the older one, without the last transaction, which may be a fence.
func readImage(f io.ReaderAt, size uint64) (*image, error) {
	first, err := readMeta(f, 0)
	if err != nil {
		return nil, fmt.Errorf("meta page 0: %w", err)
	}
	second, err := readMeta(f, first.pageSize)
	if err != nil {
		return nil, fmt.Errorf("meta page 1: %w", err)
	}
	im, older := first, second
	if second.txid > first.txid {
		im, older = second, first
	}
	switch {
	case im.txid != older.txid+1 || im.pageSize != older.pageSize:
		return nil, errors.New("the meta pages do not belong together")
	case im.pages > size/im.pageSize:
		return nil, fmt.Errorf("it is truncated: %d bytes, and %d pages of %d are in use", size, im.pages, im.pageSize)
	}
	im.used = make([]uint64, im.pages/64+1)
	return im, nil
}

func readMeta(f io.ReaderAt, at uint64) (*image, error) {
	var page [pageHeader + metaSize]byte
	if _, err := f.ReadAt(page[:], int64(at)); err != nil {
		return nil, err
	}
	b := page[pageHeader:]
	sum := fnv.New64a()
	sum.Write(b[:metaSize-8])
	im := &image{
		file:     f,
		pageSize: uint64(order.Uint32(b[8:])),
		root:     order.Uint64(b[16:]),
		freelist: order.Uint64(b[32:]),
		pages:    order.Uint64(b[40:]),
		txid:     order.Uint64(b[48:]),
	}
	switch {
	case order.Uint32(b) != magic || order.Uint32(b[4:]) != format:
		return nil, errors.New("not bbolt's format, version 2")
	case order.Uint64(b[56:]) != sum.Sum64():
		return nil, errors.New("its checksum is wrong")
	case im.pageSize < 512 || im.pageSize > 1<<24 || im.pageSize&(im.pageSize-1) != 0:
		return nil, fmt.Errorf("its page size is %d bytes", im.pageSize)
	}
	return im, nil
}

// open reads the root, the schema and the head, without bbolt. Errors wrap ErrDamaged or ErrNewer.
func (im *image) open() error {
	im.buckets = map[string][]byte{}
	err := im.tree(im.root, bucketElements, func(key, val []byte) error {
		im.buckets[string(key)] = val
		return nil
	})
	if err != nil {
		return err
	}
	meta := map[string][]byte{}
	err = im.bucket(im.buckets[string(bucketMeta)], func(key, val []byte) error {
		meta[string(key)] = val
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range [][]byte{bucketRecords, bucketLog} {
		if len(im.buckets[string(name)]) < bucketHeader {
			return fmt.Errorf("%w: a bucket is missing", ErrDamaged)
		}
	}
	if err := checkSchema(meta[string(keySchema)]); err != nil {
		return err
	}
	if im.base, err = decodeBase(meta[string(keyBase)]); err != nil {
		return err
	}
	im.head, err = decodeHead(meta[string(keyHead)])
	return err
}

// check checks the rest of the file without bbolt. Every reachable page has its own number, and keys are in order. Each
// record has its seal, and each audit entry follows from the previous one. The head matches the records and entries
// exactly. Pages that are listed as free are not in use. This takes about as long as reading and hashing the file.
// Errors wrap ErrDamaged.
func (im *image) check() error {
	h := im.base
	if err := im.bucket(im.buckets[string(bucketLog)], h.verify); err != nil {
		return err
	}
	if err := im.bucket(im.buckets[string(bucketRecords)], h.count); err != nil {
		return err
	}
	if err := im.checkFree(); err != nil {
		return damaged(err)
	}
	return h.match(im.head)
}

// checkFree checks the list of free pages, if the file has one. The ledger writes none. Other programs do, such as the
// one that compacts a bbolt file, and bbolt believes it: it would write over a page that is in use and listed.
func (im *image) checkFree() error {
	if im.freelist == noFreelist {
		return nil
	}
	b, err := im.read(im.freelist)
	if err != nil {
		return fmt.Errorf("the list of free pages: %w", err)
	}
	n, ids := uint64(order.Uint16(b[10:])), b[pageHeader:]
	if n == 0xFFFF { // the first element is the count
		n, ids = order.Uint64(ids), ids[8:]
	}
	if order.Uint16(b[8:]) != flagFreelist || n > uint64(len(ids)/8) {
		return errors.New("the list of free pages is damaged")
	}
	for i := range n {
		if err := im.use(order.Uint64(ids[8*i:]), 1); err != nil {
			return fmt.Errorf("the list of free pages: %w", err)
		}
	}
	return nil
}

func checkSchema(b []byte) error {
	n, err := strconv.Atoi(string(b))
	switch {
	case err != nil || n < 1:
		return fmt.Errorf("%w: it has no schema version", ErrDamaged)
	case n > schema:
		return fmt.Errorf("%w: it has schema %d, this version supports schemas up to %d; run the newer version",
			ErrNewer, n, schema)
	}
	return nil
}

// bucket walks the elements of a bucket, given its value in the root.
func (im *image) bucket(val []byte, f func(key, val []byte) error) error {
	if len(val) < bucketHeader {
		return fmt.Errorf("%w: a bucket is missing", ErrDamaged)
	}
	if root := order.Uint64(val); root != 0 {
		return im.tree(root, 0, f)
	}
	w := walk{im: im, f: f}
	return damaged(w.node(val[bucketHeader:], 0))
}

// bucketElements are the flags of each leaf element of the root.
const bucketElements = flagBucket

func (im *image) tree(root uint64, flags uint32, f func(key, val []byte) error) error {
	w := walk{im: im, flags: flags, f: f}
	return damaged(w.page(root, 0))
}

// walk traverses one tree in order.
type walk struct {
	im    *image
	flags uint32 // of each leaf element
	f     func(key, val []byte) error
	last  []byte // the previous key; nil: none yet
	seen  bool
}

// damaged makes err wrap ErrDamaged.
func damaged(err error) error {
	if err == nil || errors.Is(err, ErrDamaged) || errors.Is(err, ErrClosed) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

func (w *walk) page(id uint64, depth int) error {
	b, err := w.im.read(id)
	if err != nil {
		return err
	}
	return w.node(b, depth)
}

// read returns page id with its overflow pages, and marks them as used.
func (im *image) read(id uint64) ([]byte, error) {
	if im.cancelled() {
		return nil, ErrClosed
	}
	if id < 2 || id >= im.pages {
		return nil, fmt.Errorf("page %d is outside the file", id)
	}
	b := make([]byte, im.pageSize)
	if _, err := im.file.ReadAt(b, int64(id*im.pageSize)); err != nil {
		return nil, err
	}
	if got := order.Uint64(b); got != id {
		return nil, fmt.Errorf("page %d has the number %d", id, got)
	}
	n := 1 + uint64(order.Uint32(b[12:]))
	if err := im.use(id, n); err != nil || n == 1 {
		return b, err
	}
	whole := make([]byte, n*im.pageSize)
	_, err := im.file.ReadAt(whole, int64(id*im.pageSize))
	return whole, err
}

// use marks n pages from id on as used.
func (im *image) use(id, n uint64) error {
	if id < 2 || id >= im.pages || n > im.pages-id {
		return fmt.Errorf("page %d is outside the file, or extends beyond it", id)
	}
	for i := id; i < id+n; i++ {
		if im.used[i/64]>>(i%64)&1 != 0 {
			return fmt.Errorf("page %d is used twice", i)
		}
		im.used[i/64] |= 1 << (i % 64)
	}
	return nil
}

func (w *walk) node(b []byte, depth int) error {
	if len(b) < pageHeader || depth > maxDepth {
		return errors.New("a page is too short or nested too deep")
	}
	flags, count := order.Uint16(b[8:]), int(order.Uint16(b[10:]))
	if flags != flagLeaf && flags != flagBranch || pageHeader+count*element > len(b) {
		return fmt.Errorf("page %d has flags %#x and %d elements", order.Uint64(b), flags, count)
	}
	for i := range count {
		var err error
		at := b[pageHeader+i*element:]
		if flags == flagLeaf {
			err = w.leaf(at)
		} else {
			err = w.branch(at, i, depth)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// leaf visits one element of a leaf. at is the rest of the page from that element on.
func (w *walk) leaf(at []byte) error {
	pos, ksize, vsize := uint64(order.Uint32(at[4:])), uint64(order.Uint32(at[8:])), uint64(order.Uint32(at[12:]))
	if pos+ksize+vsize > uint64(len(at)) {
		return errors.New("an element extends beyond its page")
	}
	key, val := at[pos:pos+ksize], at[pos+ksize:pos+ksize+vsize]
	switch {
	case order.Uint32(at) != w.flags:
		return errors.New("an element has the wrong kind")
	case ksize == 0 || w.seen && bytes.Compare(w.last, key) >= 0:
		return errors.New("keys out of order")
	}
	w.last, w.seen = key, true
	return w.f(key, val)
}

// branch visits the page below one element of a branch. Its keys must lie between the keys of this element and the next
// one: bbolt could not find any other key.
func (w *walk) branch(at []byte, i, depth int) error {
	pos, ksize, child := uint64(order.Uint32(at)), uint64(order.Uint32(at[4:])), order.Uint64(at[8:])
	if pos+ksize > uint64(len(at)) || ksize > bbolt.MaxKeySize {
		return errors.New("an element extends beyond its page")
	}
	key := at[pos : pos+ksize]
	if i > 0 && bytes.Compare(w.last, key) >= 0 {
		return errors.New("keys out of order")
	}
	// The first key below must not be less than this element's.
	inner := walk{im: w.im, flags: w.flags, f: w.f, last: w.last, seen: w.seen}
	first := true
	inner.f = func(k, v []byte) error {
		if first && bytes.Compare(k, key) < 0 {
			return errors.New("keys out of order")
		}
		first = false
		return w.f(k, v)
	}
	err := inner.page(child, depth+1)
	w.last, w.seen = inner.last, inner.seen
	return err
}
