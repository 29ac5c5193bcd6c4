package engine_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/selector"
)

var writeOldLedger = flag.String("write-old-ledger", "",
	"write the ledger of a broker that dies to this path with .db.gz added, and its answers with .json added")

// TestWriteOldLedger writes the test data of [TestOldLedger] with the present build. The path ends in the commit:
//
//	go test ./broker/engine -run TestWriteOldLedger -write-old-ledger testdata/ledger-8532fd1
//
// The clock and the randomness are fixed, and the per-backend workers run one after the other. So the same build
// writes the same records each time; the pages of the file may be in another order. Do not overwrite the ledger of an
// earlier build: add another.
func TestWriteOldLedger(t *testing.T) {
	if *writeOldLedger == "" {
		return
	}
	build := (*writeOldLedger)[strings.LastIndex(*writeOldLedger, "-")+1:]
	dead := filepath.Join(t.TempDir(), "dead.db")
	d := oldData{Build: build, Cases: map[string]string{}, Records: map[string]int{}}
	synctest.Test(t, func(t *testing.T) { writeDeadLedger(t, &d, dead) })
	synctest.Test(t, func(t *testing.T) {
		w := revive(t, &d, dead)
		w.describe(&d)
		w.must(w.Resume(ctx))
		pass(reconciled)
		d.After = w.after(&d)
	})
	synctest.Test(t, func(t *testing.T) { d.After.Silent = revive(t, &d, dead).silent(&d) })
	raw, err := os.ReadFile(dead)
	if err != nil {
		t.Fatal(err)
	}
	packed, text := packOldLedger(t, raw, &d)
	t.Logf("%d records, %d entries: %d bytes, %d compressed; answers: %d bytes",
		d.Records["all"], d.Log.Head, len(raw), packed, text)
}

// packOldLedger writes the two files and returns their sizes.
func packOldLedger(t *testing.T, raw []byte, d *oldData) (packed, text int) {
	t.Helper()
	answers, err := json.MarshalIndent(d, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	_, err = z.Write(raw)
	if err := errors.Join(err, z.Close(), os.WriteFile(*writeOldLedger+".db.gz", b.Bytes(), 0o644),
		os.WriteFile(*writeOldLedger+".json", append(answers, '\n'), 0o644)); err != nil {
		t.Fatal(err)
	}
	return b.Len(), len(answers) + 1
}

// keyFamilies are the prefixes of the ledger's keys. The test data has at least one record of each.
var keyFamilies = strings.Split("c/ d/ m/ u/ g/ l/ p/ r/ x/ w/ f/ y/ e/ n/ k/ h/ t/ b/", " ")

// describe fills in the engine's answers about the dead ledger before Resume.
func (w *oldWorld) describe(d *oldData) {
	w.t.Helper()
	w.must(w.ledger.Verify(ctx))
	w.must(w.ledger.View(ctx, func(tx broker.Tx) error {
		return tx.Scan("", "", func(key string, _ []byte) bool {
			d.Records[key[:2]]++
			d.Records["all"]++
			return true
		})
	}))
	for _, family := range keyFamilies {
		if d.Records[family] == 0 {
			w.t.Errorf("the ledger has no record %s", family)
		}
	}
	entries := w.entries(0)
	root := rootOf(w.t, entries)
	d.Log = oldLog{Head: uint64(len(entries)), Root: root.String(), Ops: map[string]int{}}
	for _, e := range entries {
		d.Log.Ops[string(e.Op)]++
	}
	d.Log.Checkpoint, d.Log.Verifier = w.sign(len(entries), root)
	d.Answers = w.answers(d.Answers)
}

// sign signs a checkpoint as broker/audit does, and returns it with the key that verifies it.
func (w *oldWorld) sign(size int, root tlog.Hash) (checkpoint, verifier string) {
	w.t.Helper()
	const name = "example.org/pawl"
	seed := []byte("a key that signs nothing but this")[:ed25519.SeedSize]
	verifier, err := note.NewEd25519VerifierKey(name, ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey))
	w.must(err)
	hash := strings.Split(verifier, "+")[1]
	key := base64.StdEncoding.EncodeToString(append([]byte{1}, seed...)) // 1: Ed25519
	signer, err := note.NewSigner(strings.Join([]string{"PRIVATE", "KEY", name, hash, key}, "+"))
	w.must(err)
	signed, err := note.Sign(&note.Note{Text: fmt.Sprintf("%s\n%d\n%s\n", name, size, root)}, signer)
	w.must(err)
	return string(signed), verifier
}

// oldWriter is the oldWorld of the broker that dies.
type oldWriter struct {
	*oldWorld
	d    *oldData
	zone atomic.Pointer[time.Location]
	lost map[string]string // leases that the ledger does not know, with their grants

	vaultDown  atomic.Bool // Vault refuses to revoke tokens and leases
	severDown  atomic.Bool // no target severs
	legacyDown atomic.Bool // the target "legacy" proves nothing

	mu   sync.Mutex               // guards shut
	shut map[string]chan struct{} // by backend: it does not sever before the channel is closed
}

// writeDeadLedger makes every request that leaves records. It copies the file while the last requests and revocations
// are under way, so the copy is the file of a killed process. Every transaction is on disk by then: the bubble waits.
func writeDeadLedger(t *testing.T, d *oldData, dead string) {
	w := &oldWriter{d: d, lost: map[string]string{}, shut: map[string]chan struct{}{}}
	w.zone.Store(time.FixedZone("", 2*60*60)) // the server's clock is not in UTC
	path := filepath.Join(t.TempDir(), "ledger.db")
	w.oldWorld = newOldWorld(t, oldWorldConfig{path: path, start: brokertest.Epoch.Add(123456789), zone: w.zone.Load,
		vault:   func(_ *oldWorld, v signingVault) broker.Vault { return refusingVault{v, w} },
		backend: func(name string, b severingProver) broker.Backend { return w.wrap(name, b) }})
	w.must(w.Resume(ctx))
	w.fail("", nil, nil)

	w.adoptBundles()
	w.openShop()
	w.useEveryConstraint()
	w.endGrants()
	w.zone.Store(time.UTC)
	w.sealSecrets()
	w.revokeAndSettle()
	w.writeRules()
	w.freeze()
	w.plantCanaries()
	w.refuse()
	w.subscribe()

	died := make(chan struct{})
	var requests sync.WaitGroup
	w.leaveInFlight(died, &requests)
	w.leaveHalfDone(died, &requests)
	synctest.Wait()
	b := copyFile(t, path, dead)
	used := (len(bytes.TrimRight(b, "\x00")) + os.Getpagesize() - 1) / os.Getpagesize() * os.Getpagesize()
	w.must(os.Truncate(dead, int64(used))) // the file grows by 16 MB at once
	w.outside()

	close(died)
	w.Stop()
	requests.Wait()
}

// outside records the state outside the ledger.
func (w *oldWriter) outside() {
	d := w.d
	d.Died = w.now().UTC()
	d.Outside = oldOutside{Leases: map[string]string{}}
	known := map[string]string{}
	chains, err := w.Chains(ctx, true)
	w.must(err)
	for _, c := range chains {
		v, err := w.Chain(ctx, c.Chain.ID)
		w.must(err)
		for _, g := range v.Grants {
			known[g.Lease.ID] = string(g.ID)
		}
	}
	maps.Copy(known, w.lost)
	for _, id := range w.vault.LeaseIDs() {
		d.Outside.Leases[id] = known[id]
	}
	for _, id := range w.target.Alive() {
		d.Outside.Logins = append(d.Outside.Logins, string(id))
	}
	w.signer.mu.Lock()
	defer w.signer.mu.Unlock()
	for id := range w.signer.accepts {
		d.Outside.Signed = append(d.Outside.Signed, string(id))
	}
	slices.Sort(d.Outside.Signed)
}

var errRefused = errors.New("connection refused")

// refusingVault revokes no lease while vaultDown.
type refusingVault struct {
	signingVault
	w *oldWriter
}

func (v refusingVault) Revoke(ctx context.Context, lease string) error {
	if v.w.vaultDown.Load() {
		return errRefused
	}
	return v.signingVault.Revoke(ctx, lease)
}

// fail stops Vault at a point until a channel is closed, and makes it answer err then. Vault refuses to revoke tokens
// while vaultDown.
func (w *oldWriter) fail(point string, until <-chan struct{}, err error) {
	w.vault.Fail(func(at string) error {
		switch {
		case at == "kill" && w.vaultDown.Load():
			return errRefused
		case at != point:
			return nil
		case until != nil:
			<-until
		}
		return err
	})
}

// wrap returns a backend that severs once its gate is open. It fails while severDown or legacyDown.
func (w *oldWriter) wrap(name string, b severingProver) broker.Backend {
	g := gatedBackend{b, name, w}
	if f, ok := b.(broker.Finder); ok {
		return struct {
			gatedBackend
			broker.Finder
		}{g, f}
	}
	return g
}

type gatedBackend struct {
	severingProver
	name string
	w    *oldWriter
}

func (g gatedBackend) Sever(ctx context.Context, grants []broker.Grant) error {
	g.w.mu.Lock()
	gate := g.w.shut[g.name]
	g.w.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if g.w.severDown.Load() {
		return errRefused
	}
	return g.severingProver.Sever(ctx, grants)
}

func (g gatedBackend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	if g.name == "legacy" && g.w.legacyDown.Load() {
		return nil, errRefused
	}
	return g.severingProver.Prove(ctx, grants)
}

// inTurn runs f, then lets the per-backend workers run one after the other, then lets the reconciler record the counts.
// So the entries of the log have one order.
func (w *oldWriter) inTurn(f func()) {
	w.t.Helper()
	backends := []string{"keeper", "legacy", "signer", "target"}
	w.mu.Lock()
	for _, name := range backends {
		w.shut[name] = make(chan struct{})
	}
	w.mu.Unlock()
	f()
	for _, name := range backends {
		synctest.Wait()
		w.mu.Lock()
		close(w.shut[name])
		delete(w.shut, name)
		w.mu.Unlock()
	}
	synctest.Wait()
	pass(8 * time.Millisecond) // a reconciler reads again after 5 ms, and a worker retries a grant after 20 ms
	synctest.Wait()
}

// open, share and take call Open, Delegate and Issue. A second passes before each, so that no two grants expire at
// once: a per-backend worker takes grants that are due together in any order.
func (w *oldWriter) open(name string, r broker.OpenRequest) broker.Delegation {
	w.t.Helper()
	pass(time.Second)
	d, err := w.Open(ctx, named(agent(name)), r)
	w.must(err)
	return d
}

func (w *oldWriter) share(from broker.Delegation, to spiffeid.ID, r broker.DelegateRequest) broker.Delegation {
	w.t.Helper()
	pass(time.Second)
	r.From, r.To = from.ID, to
	d, err := w.Delegate(ctx, holderOf(from), r)
	w.must(err)
	return d
}

func (w *oldWriter) take(d broker.Delegation, r broker.StepRequest) broker.Issued {
	w.t.Helper()
	pass(time.Second)
	r.Delegation = d.ID
	got, err := w.Issue(ctx, holderOf(d), r)
	w.must(err)
	synctest.Wait()
	return got
}

// takeRefused is take for a step that must fail.
func (w *oldWriter) takeRefused(d broker.Delegation, r broker.StepRequest) {
	w.t.Helper()
	pass(time.Second)
	r.Delegation = d.ID
	if got, err := w.Issue(ctx, holderOf(d), r); err == nil {
		w.t.Fatalf("Issue(%v) = %v, want an error", r, got.Grant.ID)
	}
	synctest.Wait()
}

// end closes a grant and returns it.
func (w *oldWriter) end(d broker.Delegation, id broker.GrantID) broker.Grant {
	w.t.Helper()
	pass(time.Second)
	g, err := w.Close(ctx, holderOf(d), id)
	w.must(err)
	synctest.Wait()
	return g
}

// wantGrant fails the test unless a grant has the state, ending and outcome.
func (w *oldWriter) wantGrant(g broker.Grant, state broker.GrantState, ending broker.Ending, outcome broker.Outcome) {
	w.t.Helper()
	v, err := w.Chain(ctx, g.Chain)
	w.must(err)
	for _, got := range v.Grants {
		if got.ID == g.ID && (got.State != state || got.Ending != ending || got.Outcome != outcome) {
			w.t.Errorf("grant %s (%s) is %s, %q, %q; want %s, %q, %q", g.ID, g.Tool, got.State, got.Ending,
				got.Outcome, state, ending, outcome)
		}
	}
}

// revoked revokes or freezes, and lets the workers and the reconciler run in turn.
func (w *oldWriter) revoked(r selector.Request, format string, args ...any) (rv broker.Revocation) {
	w.t.Helper()
	pass(time.Second)
	r.Selector = selecting(w.t, format, args...)
	r.Reason = "incident 17: " + r.Reason
	w.inTurn(func() {
		var err error
		rv, err = w.Revoke(ctx, responder, r)
		w.must(err)
	})
	return rv
}
