package archive_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/store/archive"
)

// office is a broker that keeps ended chains for two hours.
type office struct {
	*testing.T
	*engine.Engine
	ledger  *brokertest.Memory
	archive *archive.Archive
	dir     string
	vault   *brokertest.Vault
	target  *brokertest.Target
	policy  *brokertest.Policy

	mu     sync.Mutex // guards alarms
	alarms []string
}

var responder = broker.Operator{Name: "ana"}

func newOffice(t *testing.T) *office {
	o := &office{T: t, ledger: brokertest.NewMemory(), dir: filepath.Join(t.TempDir(), "archive"),
		target: brokertest.NewTarget(), policy: brokertest.AllowAll("db.read")}
	o.vault = brokertest.NewVault(o.target)
	o.start()
	return o
}

// start is the start of a process.
func (o *office) start() {
	o.Helper()
	var err error
	if o.archive, err = archive.New(archive.Config{Ledger: o.ledger, Dir: o.dir}); err != nil {
		o.Fatal(err)
	}
	o.Engine, err = engine.New(engine.Config{Ledger: o.archive, Archive: o.archive, Keep: 2 * time.Hour,
		Policy: func() broker.Policy { return o.policy }, Vault: o.vault,
		Backends: map[string]broker.Backend{"target": o.target}, Now: time.Now, Random: rand.Reader,
		Alarm: func(op string, err error) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.alarms = append(o.alarms, op+": "+err.Error())
		}})
	if err != nil {
		o.Fatal(err)
	}
	if err := o.Resume(context.Background()); err != nil {
		o.Fatal(err)
	}
	o.Cleanup(o.Stop)
}

func (o *office) caller() broker.Caller {
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/agent"), Proof: broker.ProofX509,
		NotAfter: time.Now().Add(time.Hour)}
}

func (o *office) open(task string) broker.Delegation {
	o.Helper()
	d, err := o.Open(context.Background(), o.caller(), broker.OpenRequest{Task: task, TTL: 10 * time.Minute,
		Rights: []broker.Right{{Tool: "db.read", Use: true, Delegate: true}}})
	if err != nil {
		o.Fatal(err)
	}
	return d
}

func (o *office) step(d broker.Delegation, key string) broker.Issued {
	o.Helper()
	got, err := o.Issue(context.Background(), o.caller(), broker.StepRequest{Delegation: d.ID, Tool: "db.read", Key: key})
	if err != nil {
		o.Fatal(err)
	}
	return got
}

// fill opens three chains with some steps, revokes one of them, and waits until they have ended and are retired from
// the index. It returns a value that leaked.
func (o *office) fill() (leaked string) {
	o.Helper()
	ctx := context.Background()
	for i := range 3 {
		d := o.open(fmt.Sprint("task ", i))
		for k := range 3 {
			got := o.step(d, fmt.Sprint("key ", k))
			var secret struct{ Password string }
			if err := json.Unmarshal(got.Secret.Reveal(), &secret); err != nil || secret.Password == "" {
				o.Fatalf("the secret has no password: %v", err)
			}
			leaked = secret.Password
			if k == 1 {
				if _, err := o.Close(ctx, o.caller(), got.Grant.ID); err != nil {
					o.Fatal(err)
				}
			}
		}
		if i == 1 {
			s, err := selector.Parse("chain:" + string(d.Chain))
			if err != nil {
				o.Fatal(err)
			}
			if _, err := o.Revoke(ctx, responder, selector.Request{Selector: s, Reason: "a drill"}); err != nil {
				o.Fatal(err)
			}
		}
	}
	pass(90 * time.Minute)
	return leaked
}

func pass(d time.Duration) { <-time.After(d); synctest.Wait() }

// answers are the answers of all queries about ended chains.
type answers struct {
	Chains      []broker.ChainSummary
	Views       []broker.ChainView
	Entries     [][]broker.Entry
	Revocations []broker.Revocation
	Reports     []audit.Report
	Leaked      string
	Log         []broker.Entry
}

func (o *office) ask(leaked string, until broker.Revision) (a answers) {
	o.Helper()
	ctx := context.Background()
	fail := func(err error) {
		o.Helper()
		if err != nil {
			o.Fatal(err)
		}
	}
	fail(broker.EachPage(func(p broker.Page) (string, error) {
		p.Limit = 2
		list, next, err := o.Engine.Chains(ctx, true, p)
		a.Chains = append(a.Chains, list...)
		return next, err
	}))
	for _, c := range a.Chains {
		v, err := o.Chain(ctx, c.Chain.ID, broker.Page{Limit: 100})
		fail(err)
		entries, err := o.ChainEntries(ctx, c.Chain.ID, 0, 1000)
		fail(err)
		for i := range entries {
			entries[i].At = entries[i].At.Round(0)
		}
		a.Views, a.Entries = append(a.Views, v), append(a.Entries, entries)
	}
	list, _, err := o.Engine.Revocations(ctx, broker.Page{Limit: 100})
	fail(err)
	a.Revocations = list
	log := func(after broker.Revision) audit.Log { return audit.Entries(o.Engine.Entries).From(ctx, after) }
	for _, rv := range list {
		r, err := audit.Compile(ctx, o.Engine, log, rv.ID, brokertest.Epoch)
		fail(err)
		a.Reports = append(a.Reports, r)
	}
	_, err = o.Plan(ctx, responder, selector.ForLeaked(leaked))
	a.Leaked = fmt.Sprint(err)
	for e, err := range log(0) {
		fail(err)
		if e.At = e.At.Round(0); e.Revision <= until {
			a.Log = append(a.Log, e)
		}
	}
	return a
}

func (o *office) head() (head broker.Revision) {
	o.Helper()
	if err := o.ledger.View(context.Background(), func(tx broker.Tx) (err error) { head, err = tx.Head(); return err }); err != nil {
		o.Fatal(err)
	}
	return head
}

// left returns the keys of the ledger that belong to a chain or a revocation.
func (o *office) left() (keys []string) {
	o.Helper()
	if err := o.ledger.View(context.Background(), func(tx broker.Tx) error {
		return tx.Scan("", "", func(key string, _ []byte) bool {
			if !slices.Contains([]string{"b", "s", "t", "q", "z"}, key[:1]) {
				keys = append(keys, key)
			}
			return true
		})
	}); err != nil {
		o.Fatal(err)
	}
	return keys
}

func (o *office) same(when string, got, want answers) {
	o.Helper()
	g, w := reflect.ValueOf(got), reflect.ValueOf(want)
	for i := range g.NumField() {
		if !reflect.DeepEqual(g.Field(i).Interface(), w.Field(i).Interface()) {
			o.Errorf("%s: %s = %.2000v, want %.2000v", when, g.Type().Field(i).Name, fmt.Sprintf("%+v", g.Field(i)),
				fmt.Sprintf("%+v", w.Field(i)))
		}
	}
}

// TestNothingIsLost asks the same before and after all was archived.
func TestNothingIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		leaked := o.fill()
		until := o.head()
		want := o.ask(leaked, until)
		if len(want.Chains) != 3 || len(want.Reports) != 1 || !strings.Contains(want.Leaked, "dead: it was handed out for grant gr") {
			t.Fatalf("before there are %d chains and %d reports, and the value: %s; want 3, 1, and its grant",
				len(want.Chains), len(want.Reports), want.Leaked)
		}
		if len(o.left()) == 0 {
			t.Fatal("the ledger has nothing already")
		}
		pass(8 * time.Hour) // the entries, the chains, and then the revocation: few are moved every two hours
		if keys := o.left(); len(keys) > 0 {
			t.Errorf("after eight hours the ledger still has %q", keys)
		}
		o.same("archived", o.ask(leaked, until), want)
		if err := o.archive.Verify(t.Context()); err != nil {
			t.Errorf("Verify = %v, want nil", err)
		}
		if len(o.alarms) > 0 {
			t.Errorf("alarms: %q", o.alarms)
		}

		// A segment that is gone is named, and hinders nothing else.
		files, err := filepath.Glob(filepath.Join(o.dir, "*.segment"))
		if err != nil || len(files) == 0 {
			t.Fatalf("segments: %q, %v", files, err)
		}
		for _, f := range files {
			must(t, os.Remove(f))
		}
		o.Stop()
		o.ledger = o.ledger.Crash()
		o.start()
		var refusal *broker.Error
		if _, err := o.Chain(t.Context(), want.Chains[0].Chain.ID, broker.Page{Limit: 10}); !errors.As(err, &refusal) ||
			refusal.Code != broker.CodeArchiveDamaged || !strings.Contains(refusal.Msg, ".segment") {
			t.Errorf("Chain = %v, want archive_damaged and the name of a segment", err)
		}
		d := o.open("a later task")
		o.step(d, "x")
		s, err := selector.Parse("spiffe:" + o.caller().ID.String())
		must(t, err)
		rv, err := o.Revoke(t.Context(), responder, selector.Request{Selector: s, Reason: "a breach"})
		must(t, err)
		pass(time.Minute)
		if rv, err = o.Revocation(t.Context(), rv.ID); err != nil || rv.Closure != broker.ClosureClosed || rv.Grants != 1 {
			t.Errorf("Revocation = %+v, %v, want CLOSED with one grant", rv, err)
		}
	})
}

// TestArchivingThroughFaults has each commit of a move fail, with both outcomes, and the process end there.
func TestArchivingThroughFaults(t *testing.T) {
	for _, fault := range []brokertest.Fault{brokertest.NotCommitted, brokertest.CommittedButFails} {
		struck := true
		for n := 1; struck; n++ {
			t.Run(fmt.Sprintf("fault %d at commit %d", fault, n), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { struck = faultAt(t, fault, n) })
			})
		}
	}
}

func faultAt(t *testing.T, fault brokertest.Fault, n int) (struck bool) {
	o := newOffice(t)
	leaked := o.fill()
	until := o.head()
	want := o.ask(leaked, until)
	at := 0
	o.ledger.Fail(func(_ int, entries []broker.Entry) brokertest.Fault {
		if entries[0].Op == broker.OpArchived {
			if at++; at >= n {
				struck = true
				return fault
			}
		}
		return brokertest.None
	})
	pass(8 * time.Hour)
	o.same("after the fault", o.ask(leaked, until), want)
	o.Stop()
	o.ledger.Fail(nil)
	o.ledger = o.ledger.Crash()
	o.start()
	o.same("after the restart", o.ask(leaked, until), want)
	pass(8 * time.Hour)
	o.same("in the end", o.ask(leaked, until), want)
	if keys := o.left(); len(keys) > 0 {
		t.Errorf("in the end the ledger still has %q", keys)
	}
	if err := o.archive.Verify(t.Context()); err != nil {
		t.Errorf("Verify = %v, want nil", err)
	}
	return struck
}
