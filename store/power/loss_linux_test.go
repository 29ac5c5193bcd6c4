package power_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/store/bolt"
	"github.com/pawlsec/pawl/store/power"
)

var rounds = flag.Int("power", 1, "the number of rounds in which power is lost")

var ctx = context.Background()

// pass lets time pass in the bubble.
func pass(d time.Duration) { <-time.After(d) }

// world is a broker on a ledger whose disk may lose its power. Its Vault and target are in memory, and keep theirs.
type world struct {
	*engine.Engine
	t      *testing.T
	path   string
	disk   *power.Disk
	ledger *bolt.Ledger
	vault  *brokertest.Vault
	faulty faults

	clock  atomic.Int64 // the latest time that the broker has read
	full   atomic.Bool  // the disk is
	alarms atomic.Int32 // of hand-overs that were not recorded

	mu    sync.Mutex // guards the fields below
	facts facts
	lost  []loss
	fault func(power.Call) syscall.Errno
}

// faults are mistakes that the checks must find.
type faults struct {
	unwaited bool // Update returns before it is durable
	longer   bool // secrets live longer than their answers say
}

// facts are the answers to the clients.
type facts struct {
	opened bool            // the ledger
	acked  broker.Revision // by an Update
	handed []handed
	fences []fence
}

// handed is a secret that a client has.
type handed struct {
	grant  broker.GrantID
	secret broker.Secret
	ends   time.Time // at the latest
}

// fence is one that was acknowledged, and a request that it refuses.
type fence struct {
	id     broker.RevocationID
	frozen bool
	grant  broker.GrantID // of a fence over one grant; empty: the delegations are refused
	under  []broker.Delegation
}

// loss is a loss of power: the disk after it, and the answers before it.
type loss struct {
	at     string
	now    time.Time
	facts  facts
	vault  *brokertest.Vault
	images []power.Image
}

// sharedTarget makes secrets without a lease.
type sharedTarget struct{ *brokertest.Target }

func (b sharedTarget) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := b.Target.Prepare(ctx, t, g)
	m.Leased, m.NoLease = false, true
	return m, name, err
}

// recordedLedger keeps the revision of each update that was acknowledged.
type recordedLedger struct {
	*bolt.Ledger
	w *world
}

func (l recordedLedger) Update(ctx context.Context, f func(broker.Tx) error) error {
	var head broker.Revision
	g := func(tx broker.Tx) (err error) {
		if err = f(tx); err == nil {
			head, err = tx.Head()
		}
		return err
	}
	update := l.Ledger.Update
	if l.w.faulty.unwaited && l.Err() == nil {
		update = func(ctx context.Context, f func(broker.Tx) error) error { return l.Order(ctx, f, func(error) {}) }
	}
	err := update(ctx, g)
	if err == nil {
		l.w.record(func(f *facts) { f.acked = max(f.acked, head) })
	}
	return err
}

func (w *world) record(f func(*facts)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.facts)
}

// open opens the ledger. check lets the check of it begin.
func (w *world) open() (check func()) {
	w.t.Helper()
	begin := make(chan struct{})
	l, err := bolt.OpenUnchecked(bolt.Config{Path: w.path, Reserve: 1 << 16, BeforeCheck: func() { <-begin }})
	if err != nil {
		w.t.Fatalf("OpenUnchecked = %v, want nil", err)
	}
	w.ledger = l
	w.record(func(f *facts) { f.opened = true })
	return func() {
		close(begin)
		<-l.Checked()
	}
}

// start makes and resumes a broker, as a new process does.
func (w *world) start(l broker.Ledger) error {
	policy := brokertest.AllowAll("db.read", "api.call")
	shared := policy.Tools["api.call"]
	shared.Backend = "shared"
	policy.Tools["api.call"] = shared
	e, err := engine.New(engine.Config{Ledger: l, Policy: func() broker.Policy { return policy }, Vault: w.vault,
		Backends: map[string]broker.Backend{"target": w.vault.Target, "shared": sharedTarget{w.vault.Target}},
		Alarm: func(op string, _ error) {
			if strings.Contains(op, "handed out") {
				w.alarms.Add(1)
			}
		},
		Now: func() time.Time {
			now := time.Now()
			w.clock.Store(now.UnixNano())
			return now
		},
		Random: rand.Reader, MintTimeout: 2 * time.Second, MintBound: 5 * time.Second, SweepEvery: -1, OpenChains: 1 << 20})
	w.Engine = e
	return err
}

func (w *world) resume() {
	w.t.Helper()
	if err := errors.Join(w.start(recordedLedger{w.ledger, w}), w.Resume(ctx)); err != nil {
		w.t.Fatal(err)
	}
}

// stop ends the process.
func (w *world) stop() {
	w.t.Helper()
	w.Stop()
	if err := w.ledger.Close(); err != nil && w.fault == nil {
		w.t.Errorf("Close = %v, want nil", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.vault = w.vault.Restarted()
}

// on is called before each call on a file.
func (w *world) on(c power.Call) syscall.Errno {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fault != nil {
		return w.fault(c)
	}
	if _, err := os.Lstat(w.path + ".reserve"); w.full.Load() &&
		(c.Name == "allocate" || c.Name == "pwrite" && c.File == "ledger" && err == nil) {
		return syscall.ENOSPC
	}
	if c.Syncs() || c.Name == "unlink" || c.Name == "link" {
		w.loseLocked(c.String())
	}
	return 0
}

func (w *world) loseLocked(at string) {
	r := mrand.New(mrand.NewPCG(uint64(len(w.lost)), 0))
	images, err := w.disk.Images(power.None, power.Some(r, []float64{0.1, 0.5, 0.9}[r.IntN(3)]), power.All)
	if err != nil {
		w.t.Errorf("Images = %v, want nil", err)
	}
	w.lost = append(w.lost, loss{fmt.Sprintf("%d, before %s", len(w.lost), at), time.Unix(0, w.clock.Load()), w.facts,
		w.vault.Copy(), images})
}

func as(name string) broker.Caller {
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/" + name), Proof: broker.ProofX509,
		NotAfter: time.Now().Add(time.Hour)}
}

// take takes a step and keeps the secret.
func (w *world) take(d broker.Delegation, tool broker.ToolName) (got broker.Issued, err error) {
	got, err = w.Issue(ctx, as(strings.TrimPrefix(d.Holder.Path(), "/")), broker.StepRequest{Delegation: d.ID, Tool: tool})
	if err == nil {
		ends := got.Grant.LatestEnd()
		if w.faulty.longer {
			ends = ends.Add(24 * time.Hour)
		}
		w.record(func(f *facts) { f.handed = append(f.handed, handed{got.Grant.ID, got.Secret, ends}) })
	}
	return got, err
}

// chain opens a chain with a root and a leaf.
func (w *world) chain(name string) (list []broker.Delegation) {
	w.t.Helper()
	rights := []broker.Right{{Tool: "db.read", Use: true, Delegate: true}, {Tool: "api.call", Use: true, Delegate: true}}
	root, err := w.Open(ctx, as(name), broker.OpenRequest{Task: "a task", Depth: 1, Rights: rights})
	if err != nil {
		w.t.Fatalf("Open = %v, want a root", err)
	}
	leaf, err := w.Delegate(ctx, as(name), broker.DelegateRequest{From: root.ID, To: as("leaf-" + name).ID, Rights: rights})
	if err != nil {
		w.t.Fatalf("Delegate = %v, want a leaf", err)
	}
	return []broker.Delegation{root, leaf}
}

// fence fences, and keeps the acknowledgement.
func (w *world) fence(f fence, format string, args ...any) {
	w.t.Helper()
	s, err := selector.Parse(fmt.Sprintf(format, args...))
	if err != nil {
		w.t.Fatal(err)
	}
	rv, err := w.Revoke(ctx, broker.Operator{Name: "ana"}, selector.Request{Selector: s, Reason: "a test", Freeze: f.frozen})
	if err != nil {
		w.t.Errorf("Revoke("+format+") = %v", append(args, err)...)
		return
	}
	f.id = rv.ID
	w.record(func(all *facts) { all.fences = append(all.fences, f) })
}

// agent takes steps of both classes in a chain and closes some of them.
func (w *world) agent(n uint64, steps int, chain []broker.Delegation) {
	r := mrand.New(mrand.NewPCG(n, 2))
	for range steps {
		d := chain[r.IntN(2)]
		got, err := w.take(d, []broker.ToolName{"db.read", "api.call"}[r.IntN(2)])
		if err == nil && r.IntN(3) == 0 {
			_, err = w.Close(ctx, as(strings.TrimPrefix(d.Holder.Path(), "/")), got.Grant.ID)
		}
		if err != nil && !errors.Is(err, broker.Revoked) && !errors.Is(err, broker.Unavailable) {
			w.t.Errorf("a step = %v, want a secret, Revoked or Unavailable", err)
		}
		pass(time.Duration(r.IntN(9)) * time.Millisecond)
	}
}

// work is the life of a broker. Agents take steps while an operator fences, freezes, lifts and adopts policy; then a new
// process fences before its file is checked; then the disk is full.
func (w *world) work(seed uint64) {
	w.open()()
	w.resume()
	var chains [][]broker.Delegation
	for i := range 4 {
		chains = append(chains, w.chain(fmt.Sprintf("agent%d", i)))
	}
	adopt := func(version int64) {
		if err := w.Adopt(ctx, broker.Adoption{Name: "p", Version: version, Digest: fmt.Sprint(version)}); err != nil {
			w.t.Errorf("Adopt = %v, want nil", err)
		}
	}
	adopt(1)
	var agents sync.WaitGroup
	for i, c := range chains {
		agents.Go(func() { w.agent(seed*10+uint64(i), 5, c) })
	}
	pass(6 * time.Millisecond)
	if got, err := w.take(chains[3][0], "db.read"); err == nil {
		w.fence(fence{grant: got.Grant.ID}, "grant:%s", got.Grant.ID)
	}
	w.fence(fence{under: chains[0][1:]}, "subtree:%s", chains[0][1].ID)
	pass(3 * time.Millisecond)
	w.fence(fence{under: chains[1], frozen: true}, "chain:%s", chains[1][0].Chain)
	adopt(2)
	w.fence(fence{under: chains[2][1:]}, "spiffe:%s and chain:%s", chains[2][1].Holder, chains[2][0].Chain)
	agents.Wait()
	w.stop()

	check := w.open()
	w.resume()
	w.fence(fence{under: chains[0]}, "chain:%s", chains[0][0].Chain)
	w.fence(fence{under: chains[2]}, "chain:%s", chains[2][0].Chain)
	check()
	w.agent(seed*10+7, 3, chains[3])

	w.full.Store(true)
	w.agent(seed*10+8, 2, chains[3])
	w.fence(fence{under: chains[3][1:]}, "subtree:%s", chains[3][1].ID)
	w.full.Store(false)
	pass(2 * time.Second)
	w.agent(seed*10+9, 3, chains[3])
	pass(2 * broker.MaxOrderDelay)
}

// run plays the life of a broker, and returns each loss of power in it and the whole audit log.
func run(t *testing.T, seed uint64, faulty faults) (lost []loss, log []broker.Entry) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		w := &world{t: t, path: filepath.Join(dir, "ledger"), vault: brokertest.NewVault(brokertest.NewTarget()), faulty: faulty}
		w.clock.Store(time.Now().UnixNano())
		disk, stop, err := power.Watch(dir, w.on)
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		w.mu.Lock()
		w.disk = disk
		w.mu.Unlock()
		w.work(seed)
		w.mu.Lock()
		w.loseLocked("the end")
		lost = w.lost[:len(w.lost):len(w.lost)]
		w.mu.Unlock()
		if log, err = w.ledger.Entries(ctx, 0, 100_000); err != nil {
			t.Error(err)
		}
		w.stop()
	})
	return lost, log
}

// after starts a broker on the disk after a loss of power, and returns the faults.
func (x loss) after(t *testing.T, im power.Image, log []broker.Entry) (bad []string) {
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	synctest.Test(t, func(t *testing.T) {
		pass(time.Until(x.now))
		dir := t.TempDir()
		if _, ok := im["ledger"]; !ok {
			if x.facts.opened {
				say("there is no ledger")
			}
			return
		}
		if err := im.Write(dir); err != nil {
			t.Fatal(err)
		}
		l, err := bolt.Open(bolt.Config{Path: filepath.Join(dir, "ledger"), Reserve: -1})
		if err != nil {
			say("Open = %v", err)
			return
		}
		w := &world{t: t, ledger: l, vault: x.vault.Copy()}
		if err := w.start(l); err != nil {
			t.Fatal(err)
		}
		entries, err := l.Entries(ctx, 0, 100_000)
		switch n := len(entries); {
		case err != nil:
			say("Entries = %v", err)
		case n < int(x.facts.acked):
			say("an update is lost: the log ends at %d, and %d was acknowledged", n, x.facts.acked)
		case n > len(log) || n > 0 && !reflect.DeepEqual(entries, log[:n]):
			say("the log is not a beginning of the one that was written")
		}
		known := w.checkSecrets(x, say)
		if err := w.Resume(ctx); err != nil {
			say("Resume = %v", err)
		}
		w.checkFences(x, known, say)
		pass(25 * time.Minute)
		w.checkEnd(x, say)
		w.Stop()
		if err := l.Close(); err != nil {
			say("Close = %v", err)
		}
	})
	return bad
}

// grants returns all grants of the ledger.
func (w *world) grants() map[broker.GrantID]broker.Grant {
	w.t.Helper()
	known := map[broker.GrantID]broker.Grant{}
	err := broker.EachPage(func(p broker.Page) (string, error) {
		chains, next, err := w.Chains(ctx, true, p)
		for _, c := range chains {
			err = errors.Join(err, broker.EachPage(func(p broker.Page) (string, error) {
				v, err := w.Chain(ctx, c.Chain.ID, p)
				for _, g := range v.Grants {
					known[g.ID] = g
				}
				return v.Next, err
			}))
		}
		return next, err
	})
	if err != nil {
		w.t.Errorf("reading all grants = %v", err)
	}
	return known
}

// checkSecrets checks that the ledger has each secret that works, and that it ends no later than the ledger says.
func (w *world) checkSecrets(x loss, say func(string, ...any)) map[broker.GrantID]broker.Grant {
	known := w.grants()
	for _, id := range w.vault.Target.Alive() {
		if g := known[id]; g.State != broker.StateHandle && g.State != broker.StateIssued {
			say("the secret of %s works, and the ledger has it as %q", id, g.State)
		}
	}
	for _, h := range x.facts.handed {
		g, ok := known[h.grant]
		if !ok {
			say("the secret of %s was handed out, and the ledger does not have it", h.grant)
		} else if w.vault.Target.Login(h.secret.Reveal()) && g.LatestEnd().Before(h.ends) {
			say("the secret of %s ends at %v, and the ledger says %v", h.grant, h.ends, g.LatestEnd())
		}
	}
	return known
}

// checkFences checks that fenced steps are refused, and that no answer about a leaked value denies a secret of which
// the loss took the digest.
func (w *world) checkFences(x loss, known map[broker.GrantID]broker.Grant, say func(string, ...any)) {
	for _, h := range x.facts.handed {
		if g := known[h.grant]; !w.vault.Target.Login(h.secret.Reveal()) || g.State != broker.StateHandle || len(g.Lease.Digests) > 0 {
			continue
		}
		var s struct{ Password string }
		if err := json.Unmarshal(h.secret.Reveal(), &s); err != nil {
			say("the secret of %s: %v", h.grant, err)
		}
		_, err := w.Revoke(ctx, broker.Operator{Name: "ana"}, selector.Request{Selector: selector.ForLeaked(s.Password), Reason: "a test"})
		if err == nil || !strings.Contains(err.Error(), "may have it are not recorded") {
			say("the leaked secret of %s is answered with %v", h.grant, err)
		}
		break // the others end meanwhile
	}
	for _, f := range x.facts.fences {
		if g := known[f.grant]; f.grant != "" && g.Fence == nil && g.State != broker.StateClosed {
			say("the fence %s over a grant is lost", f.id)
		}
		for _, d := range f.under {
			if _, err := w.take(d, "db.read"); !errors.Is(err, broker.Revoked) {
				say("the fence %s is lost: a step is answered with %v", f.id, err)
			}
		}
	}
}

// checkEnd checks that nothing lives, and that the ledger knows it.
func (w *world) checkEnd(x loss, say func(string, ...any)) {
	if alive, leases := w.vault.Target.Alive(), w.vault.LeaseIDs(); len(alive)+len(leases) > 0 {
		say("alive in the end: %v, leases %v", alive, leases)
	}
	for id, g := range w.grants() {
		if g.State != broker.StateClosed {
			say("%s is %s in the end", id, g.State)
		}
	}
	for _, f := range x.facts.fences {
		if rv, err := w.Revocation(ctx, f.id); err != nil || !f.frozen && rv.Closure != broker.ClosureClosed {
			say("the revocation %s is %q in the end, %v", f.id, rv.Closure, err)
		}
	}
}

// TestLossOfPower plays a loss of power at each sync in the life of a broker, and starts the next one on its disk.
// In the suite it checks one image of each loss, in all rounds all of them.
func TestLossOfPower(t *testing.T) {
	power.Run(t, func(t *testing.T) {
		for seed := range uint64(*rounds) {
			lost, log := run(t, seed, faults{})
			n, handed, fences := 0, 0, 0
			for i, x := range lost {
				handed, fences = max(handed, len(x.facts.handed)), max(fences, len(x.facts.fences))
				for j, im := range x.images {
					if *rounds == 1 && j != i%len(x.images) {
						continue
					}
					n++
					for _, bad := range x.after(t, im, log) {
						t.Errorf("seed %d: loss %s, image %d: %s", seed, x.at, j, bad)
					}
				}
				if t.Failed() {
					break
				}
			}
			t.Logf("seed %d: %d losses, %d images, %d secrets handed out, %d fences", seed, len(lost), n, handed, fences)
			if handed < 10 || fences < 7 {
				t.Errorf("%d secrets and %d fences, want 10 and 7 or more", handed, fences)
			}
		}
	}, fmt.Sprintf("-power=%d", *rounds))
}

// TestLossesAreFound holds that each check can fail.
func TestLossesAreFound(t *testing.T) {
	power.Run(t, func(t *testing.T) {
		for _, row := range []struct {
			want   string
			faulty faults
		}{
			{"and the ledger does not have it", faults{unwaited: true}},
			{"works, and the ledger has it as", faults{unwaited: true}},
			{"an update is lost", faults{unwaited: true}},
			{"is lost: a step is answered with", faults{unwaited: true}},
			{"and the ledger says", faults{longer: true}},
		} {
			lost, log := run(t, 0, row.faulty)
			found := ""
			for _, x := range lost {
				for _, bad := range x.after(t, x.images[0], log) {
					if strings.Contains(bad, row.want) && found == "" {
						found = fmt.Sprintf("loss %s: %s", x.at, bad)
					}
				}
				if found != "" {
					break
				}
			}
			if t.Logf("%+v: %s", row.faulty, found); found == "" {
				t.Errorf("%+v: no loss of power shows %q", row.faulty, row.want)
			}
		}
	})
}

// TestLostIssuedAtEachWrite fails each write and sync of the commit that takes ISSUED, after its secret was handed out.
// With a full disk it is in the reserve. After any other failure the secret is ended, with an alarm.
func TestLostIssuedAtEachWrite(t *testing.T) {
	power.Run(t, func(t *testing.T) {
		for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
			for k, fired := 0, true; fired; k++ {
				synctest.Test(t, func(t *testing.T) { fired = lostIssued(t, k, errno) })
				if !fired && k < 4 {
					t.Errorf("the commit has %d calls, want at least two writes and two syncs", k)
				}
			}
		}
	})
}

// lostIssued fails call k of the commit, and reports whether there was one.
func lostIssued(t *testing.T, k int, errno syscall.Errno) (fired bool) {
	dir := t.TempDir()
	w := &world{t: t, path: filepath.Join(dir, "ledger"), vault: brokertest.NewVault(brokertest.NewTarget())}
	armed, failed := false, ""
	w.fault = func(c power.Call) syscall.Errno {
		if !armed || failed != "" || c.File != "ledger" {
			return 0
		}
		if k--; k >= 0 {
			return 0
		}
		failed = c.Name
		return errno
	}
	_, stop, err := power.Watch(dir, w.on)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	w.open()()
	w.resume()
	root := w.chain("agent")[0]
	if _, err := w.take(root, "db.read"); err != nil {
		t.Fatal(err)
	}
	pass(time.Second)
	got, err := w.take(root, "db.read")
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	armed = true
	w.mu.Unlock()
	pass(time.Second)
	w.mu.Lock()
	call := failed
	w.mu.Unlock()
	ended := !w.vault.Target.Login(got.Secret.Reveal())
	want := call != "" && (errno != syscall.ENOSPC || call != "pwrite")
	if ended != want || (w.alarms.Load() == 1) != want {
		t.Errorf("%v of %q: the secret is ended: %v, with %d alarms; want %v", errno, call, ended, w.alarms.Load(), want)
	}
	w.stop()
	return call != ""
}
