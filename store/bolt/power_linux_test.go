package bolt_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/store/bolt"
	"github.com/pawlsec/pawl/store/power"
)

// rounds is the number of rounds in which power is lost.
var rounds = flag.Int("power", 1, "the number of rounds in which power is lost")

// player writes to a ledger on a disk that loses its power, and keeps the answers.
type player struct {
	t    *testing.T
	path string
	disk *power.Disk
	r    *rand.Rand // under mu
	n    int        // of the next key

	mu     sync.Mutex // guards the fields below
	told   answers
	lost   []loss
	ledger *bolt.Ledger // nil: it is not open
	full   bool         // the disk is
}

// answers are those to the callers of a ledger, by key.
type answers struct {
	opened          bool // Open has returned
	durable, undone map[string]bool
}

func (a answers) clone() answers {
	c := answers{a.opened, map[string]bool{}, map[string]bool{}}
	maps.Copy(c.durable, a.durable)
	maps.Copy(c.undone, a.undone)
	return c
}

// loss is a loss of power: the disk after it, and the answers before it.
type loss struct {
	at     string
	told   answers
	images []power.Image
	left   power.Left // by a process that is killed then
}

// newPlayer watches the directory of a ledger, with what an earlier process has left. It takes images before each call
// that syncs or names something.
func newPlayer(t *testing.T, seed uint64, left power.Left, told answers, answer func(power.Call) syscall.Errno) (
	p *player, stop func()) {
	dir := t.TempDir()
	p = &player{t: t, path: filepath.Join(dir, "ledger"), r: rand.New(rand.NewPCG(seed, 0)), told: told.clone()}
	on := func(c power.Call) syscall.Errno {
		p.mu.Lock()
		defer p.mu.Unlock()
		_, err := os.Lstat(p.path + ".reserve")
		if p.full && (c.Name == "allocate" || c.Name == "pwrite" && c.File == "ledger" && err == nil) {
			return syscall.ENOSPC
		}
		if answer != nil {
			if errno := answer(c); errno != 0 {
				return errno
			}
		}
		if c.Syncs() || c.Name == "unlink" || c.Name == "link" {
			p.loseLocked(c.String())
		}
		return 0
	}
	disk, stop, err := left.Watch(dir, on)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disk = disk
	return p, stop
}

// loseLocked takes the images of a loss of power now. All that a reader of the log sees is durable.
func (p *player) loseLocked(at string) {
	told := p.told.clone()
	if p.ledger != nil {
		entries, err := p.ledger.Entries(context.Background(), 0, 10_000)
		if err != nil {
			p.t.Errorf("Entries = %v, want nil", err)
		}
		for _, e := range entries {
			told.durable[e.Detail] = true
		}
	}
	images, err := p.disk.Images(power.None, power.All, power.Some(p.r, []float64{0.1, 0.5, 0.9}[p.r.IntN(3)]))
	if err != nil {
		p.t.Errorf("Images = %v, want nil", err)
	}
	left, err := p.disk.Left()
	if err != nil {
		p.t.Errorf("Left = %v, want nil", err)
	}
	p.lost = append(p.lost, loss{fmt.Sprintf("%d, before %s", len(p.lost), at), told, images, left})
}

// shrunk is a loss after which the ledger's file has no free pages at its end, so that the next commit makes it grow.
func (x loss) shrunk(t *testing.T) loss {
	dir := t.TempDir()
	if err := x.images[0].Write(dir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "ledger")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	var used int64
	err = db.View(func(tx *bbolt.Tx) error {
		used = tx.Size()
		return nil
	})
	if err := errors.Join(err, db.Close(), os.Truncate(path, used)); err != nil {
		t.Fatal(err)
	}
	disk, stop, err := power.Watch(dir, func(power.Call) syscall.Errno { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	left, err := disk.Left()
	if err != nil {
		t.Fatal(err)
	}
	return loss{at: "after the end, with a file that is full", told: x.told, left: left}
}

// open opens the ledger, and returns before it is checked. check lets the check begin. All that is there is acknowledged:
// a request that is repeated is answered by it.
func (p *player) open() (l *bolt.Ledger, check func(), err error) {
	begin := make(chan struct{})
	l, err = bolt.OpenUnchecked(bolt.Config{Path: p.path, Reserve: 1 << 16, BeforeCheck: func() { <-begin }})
	if err != nil {
		return nil, nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told.opened, p.ledger = true, l
	return l, func() {
		close(begin)
		<-l.Checked()
	}, nil
}

func (p *player) key() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n++
	return fmt.Sprintf("k/%04d", p.n)
}

// answered keeps the answer to a change.
func (p *player) answered(key string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err == nil:
		p.told.durable[key] = true
	case errors.Is(err, broker.ErrNotCommitted):
		p.told.undone[key] = true
	}
}

// update is an update of op with a value of some bytes.
func (p *player) update(l *bolt.Ledger, op broker.Op, size int) error {
	key := p.key()
	err := l.Update(context.Background(), func(tx broker.Tx) error {
		return errors.Join(enter(op, key)(tx), tx.Put("large", make([]byte, size)))
	})
	p.answered(key, err)
	return err
}

// order orders a change. The channel is closed when its outcome is known.
func (p *player) order(l *bolt.Ledger) <-chan struct{} {
	key, known := p.key(), make(chan struct{})
	err := l.Order(context.Background(), enter(broker.OpIssued, key), func(err error) {
		p.answered(key, err)
		close(known)
	})
	if err != nil {
		p.answered(key, err)
		close(known)
	}
	return known
}

// work makes changes of all kinds, and closes the ledger: together and one by one, ordered and not, while the file is
// checked and after it, with room on the disk and without. It returns the errors of opening and closing.
func (p *player) work() error {
	l, check, err := p.open()
	if err != nil {
		return err
	}
	_ = p.update(l, broker.OpFence, 10) // beside the ledger
	_ = p.update(l, broker.OpIntent, 10)
	_ = p.update(l, broker.OpFence, 5_000)
	check()
	known := []<-chan struct{}{p.order(l), p.order(l)}
	_ = p.update(l, broker.OpIntent, 100)
	<-p.order(l)
	var together sync.WaitGroup
	for range 8 {
		together.Go(func() { _ = p.update(l, broker.OpClosed, 3_000) })
	}
	together.Wait()
	known = append(known, p.order(l))
	p.setFull(true)
	_ = p.update(l, broker.OpFence, 9_000)
	_ = p.update(l, broker.OpIntent, 10)
	p.setFull(false)
	_ = p.update(l, broker.OpEnd, 10)
	known = append(known, p.order(l))
	p.mu.Lock()
	p.ledger = nil
	p.mu.Unlock()
	err = l.Close()
	for _, k := range known {
		<-k
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.loseLocked("the end")
	return err
}

func (p *player) setFull(full bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.full = full
}

// check opens the ledger of an image, and returns its faults.
func (a answers) check(dir string, im power.Image) error {
	if _, ok := im["ledger"]; !ok && !a.opened {
		return nil
	}
	if _, ok := im["ledger"]; !ok {
		return errors.New("there is no ledger")
	}
	if err := im.Write(dir); err != nil {
		return err
	}
	l, err := bolt.Open(bolt.Config{Path: filepath.Join(dir, "ledger"), Reserve: -1})
	if err != nil {
		return fmt.Errorf("Open = %w", err)
	}
	entries, err := l.Entries(context.Background(), 0, 1_000)
	if err = errors.Join(err, l.Verify(context.Background()), l.Close()); err != nil {
		return err
	}
	has := map[string]bool{}
	for _, e := range entries {
		has[e.Detail] = true
	}
	for _, key := range slices.Sorted(maps.Keys(a.durable)) {
		if !has[key] {
			err = errors.Join(err, fmt.Errorf("%s was acknowledged and is lost", key))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(a.undone)) {
		if has[key] {
			err = errors.Join(err, fmt.Errorf("%s was refused and is there", key))
		}
	}
	return err
}

// play plays every loss of power of the work on a ledger. From some of these moments it goes on, with the disk after the
// loss or after a kill of the process, and plays losses once more. It returns the number of images, and the faults of the
// first bad one.
func play(t *testing.T, seed uint64, answer func(power.Call) syscall.Errno) (n int, bad error) {
	r := rand.New(rand.NewPCG(seed, 1))
	try := func(p *player, share float64) error {
		for _, x := range p.lost {
			for i, im := range x.images {
				if r.Float64() >= share {
					continue
				}
				n++
				if err := x.told.check(t.TempDir(), im); err != nil {
					return fmt.Errorf("loss %s, image %d: %w", x.at, i, err)
				}
			}
		}
		return nil
	}
	p, stop := newPlayer(t, seed, power.Left{}, answers{}, answer)
	err := p.work()
	stop()
	if bad = errors.Join(err, try(p, 1)); bad != nil {
		return n, bad
	}
	p.lost = append(p.lost, p.lost[len(p.lost)-1].shrunk(t)) // the first from which it goes on
	for i := range 8 {
		x := p.lost[r.IntN(len(p.lost))]
		if i == 0 {
			x = p.lost[len(p.lost)-1]
		}
		what, left := "process killed", x.left
		if len(x.images) > 0 && r.IntN(2) == 0 {
			what, left = "loss", x.images[r.IntN(len(x.images))].Left()
		}
		again, stop := newPlayer(t, seed+1, left, x.told, answer)
		again.n = p.n
		err := again.work()
		stop()
		if bad = errors.Join(err, try(again, 0.3)); bad != nil {
			return n, fmt.Errorf("%s %s, then %w", what, x.at, bad)
		}
	}
	return n, nil
}

// TestPowerLoss plays a loss of power before each call that makes something of the ledger durable.
func TestPowerLoss(t *testing.T) {
	power.Run(t, func(t *testing.T) {
		for seed := range uint64(*rounds) {
			n, bad := play(t, seed, nil)
			t.Logf("seed %d: %d images", seed, n)
			if bad != nil {
				t.Errorf("seed %d: %v", seed, bad)
			}
		}
	}, fmt.Sprintf("-power=%d", *rounds))
}

// TestPowerLossFindsSyncs takes out one sync after the other. Each is needed: a loss of power shows that it is missing.
func TestPowerLossFindsSyncs(t *testing.T) {
	power.Run(t, func(t *testing.T) {
		without := func(names ...string) func() func(power.Call) syscall.Errno {
			return func() func(power.Call) syscall.Errno {
				return func(c power.Call) syscall.Errno {
					if c.Syncs() && slices.Contains(names, c.String()) {
						return power.Omit
					}
					return 0
				}
			}
		}
		every := func(turn int) func() func(power.Call) syscall.Errno { // a commit has two, before and after the meta page
			return func() func(power.Call) syscall.Errno {
				meta := false
				return func(c power.Call) syscall.Errno {
					if c.File == "ledger" && c.Name == "pwrite" {
						meta = c.Offset < 2*4096
					}
					if c.String() == "fdatasync ledger" && meta == (turn == 1) {
						return power.Omit
					}
					return 0
				}
			}
		}
		for what, answer := range map[string]func() func(power.Call) syscall.Errno{
			"of the directory":             without("fsync ."),
			"of the new ledger":            without("fdatasync ledger.new", "fsync ledger.new"),
			"of a commit's pages":          every(0),
			"of a commit's meta page":      every(1),
			"of the updates beside it":     without("fsync ledger.pending"),
			"of what an open ledger reads": without("fsync ledger"),
		} {
			var bad error
			for seed := uint64(0); bad == nil && seed < 5; seed++ {
				_, bad = play(t, seed, answer())
			}
			if t.Logf("without the sync %s: %v", what, bad); bad == nil {
				t.Errorf("without the sync %s no loss of power shows it", what)
			}
		}
	})
}

// TestFaultAtEachWrite fails one call on a file after the other, with two errors. Each caller is answered, once, and the
// answer is true for the disk.
func TestFaultAtEachWrite(t *testing.T) {
	power.Run(t, func(t *testing.T) {
		step := 7 // in the suite
		if *rounds > 1 {
			step = 1
		}
		failed := 0
		for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
			fired := true
			for k := int(errno) % step; fired; k += step {
				calls := 0
				p, stop := newPlayer(t, 0, power.Left{}, answers{}, func(power.Call) syscall.Errno {
					if calls++; calls != k+1 {
						return 0
					}
					return errno
				})
				_ = p.work()
				stop()
				fired = calls > k
				failed++
				if len(p.lost) == 0 {
					continue
				}
				last := p.lost[len(p.lost)-1]
				for i, im := range last.images {
					if err := p.told.check(t.TempDir(), im); err != nil {
						t.Errorf("%v of call %d, image %d: %v", errno, k, i, err)
					}
				}
			}
		}
		t.Logf("%d faults", failed)
	}, fmt.Sprintf("-power=%d", *rounds))
}
