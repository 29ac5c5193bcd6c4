package signals_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/broker/signals"
)

// desk is a real engine in memory, and what is told of it.
type desk struct {
	t      *testing.T
	ledger broker.Ledger
	b      *engine.Engine
	key    jose.JSONWebKey

	mu     sync.Mutex // guards alarms
	alarms []string
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	d := &desk{t: t, ledger: brokertest.NewMemory()}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	d.key = jose.JSONWebKey{Key: private, KeyID: "k", Algorithm: "EdDSA"}
	target, tools := brokertest.NewTarget(), brokertest.AllowAll("db")
	d.b, err = engine.New(engine.Config{Ledger: d.ledger, Policy: func() broker.Policy { return tools }, Vault: brokertest.NewVault(target),
		Backends: map[string]broker.Backend{"target": target}, Now: time.Now, Random: rand.Reader, SweepEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.b.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.b.Stop)
	return d
}

// tell starts a sender; the returned function ends it.
func (d *desk) tell(to ...signals.Subscriber) (*signals.Sender, func()) {
	d.t.Helper()
	s, err := signals.NewSender(signals.SenderConfig{Source: d.b, Subscribers: to, Issuer: "https://a.example", Mute: spiffeid.RequireFromString("spiffe://a.example/mute"), Key: d.key, Now: time.Now,
		Retry: time.Millisecond, Alarm: func(op string, err error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.alarms = append(d.alarms, op+": "+err.Error())
		}})
	if err != nil {
		d.t.Fatal(err)
	}
	s.Start()
	stop := sync.OnceFunc(s.Close)
	d.t.Cleanup(stop)
	return s, stop
}

func (d *desk) alarmed(text string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.alarms, func(a string) bool { return strings.Contains(a, text) })
}

// rule fences or freezes by a selector.
func (d *desk) rule(sel string, freeze bool) broker.Revocation {
	d.t.Helper()
	s, err := selector.Parse(sel)
	if err != nil {
		d.t.Fatal(err)
	}
	rv, err := d.b.Revoke(d.t.Context(), broker.Operator{Name: "ann"}, selector.Request{Selector: s, Reason: "test", Freeze: freeze})
	if err != nil {
		d.t.Fatal(err)
	}
	return rv
}

// open makes a chain of an agent's.
func (d *desk) open(who string) broker.Delegation {
	d.t.Helper()
	caller := broker.Caller{ID: spiffeid.RequireFromString("spiffe://a.example/" + who), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := d.b.Open(d.t.Context(), caller, broker.OpenRequest{Task: "t", Rights: []broker.Right{{Tool: "db", Use: true}}})
	if err != nil {
		d.t.Fatal(err)
	}
	return root
}

// subscribed waits until the subscriber is known, after which events are for it.
func (d *desk) subscribed(name string) {
	d.t.Helper()
	until(d.t, name+" is subscribed", func() bool {
		known := false
		err := d.ledger.View(d.t.Context(), func(tx broker.Tx) error {
			raw, err := tx.Get("t/" + name)
			known = raw != nil
			return err
		})
		if err != nil {
			d.t.Fatal(err)
		}
		return known
	})
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.After(20 * time.Second); !ok(); {
		select {
		case <-end:
			t.Fatalf("still not so: %s", what)
		case <-tick.C:
		}
	}
}

// said is a token as it came.
type said struct {
	ID      string                     `json:"jti"`
	Subject map[string]any             `json:"sub_id"`
	Events  map[string]json.RawMessage `json:"events"`
}

func (s said) kind() string {
	for uri := range s.Events {
		return uri[strings.LastIndexByte(uri, '/')+1:]
	}
	return ""
}

// ear is a subscriber over TLS; answer says how it takes each token.
func ear(t *testing.T, name string, answer func(n int, w http.ResponseWriter, r *http.Request)) (signals.Subscriber, <-chan said) {
	t.Helper()
	came := make(chan said, 100)
	n := 0
	var mu sync.Mutex // guards n
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		mu.Lock()
		n++
		i := n
		mu.Unlock()
		var s said
		if parts := strings.Split(string(raw), "."); len(parts) == 3 {
			if claims, err := base64.RawURLEncoding.DecodeString(parts[1]); err != nil || json.Unmarshal(claims, &s) != nil {
				t.Errorf("a token that cannot be read")
			}
			came <- s
		}
		answer(i, w, r)
	}))
	t.Cleanup(server.Close)
	pool := x509.NewCertPool()
	pool.AddCert(server.Certificate())
	return signals.Subscriber{Name: name, URL: server.URL, Audience: "https://" + name, TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}}, came
}

func accept(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }

// kinds takes n tokens.
func kinds(t *testing.T, came <-chan said, n int) (list []string, all []said) {
	t.Helper()
	for range n {
		select {
		case s := <-came:
			list, all = append(list, s.kind()), append(all, s)
		case <-time.After(20 * time.Second):
			t.Fatalf("only %v came", list)
		}
	}
	return list, all
}

// TestSenderTells: each event once and in order, from the subscription on, and after a restart from where
// the ledger says.
func TestSenderTells(t *testing.T) {
	d := newDesk(t)
	d.rule("tool:other", true) // before anybody listened
	to, came := ear(t, "soc", accept)
	sender, stop := d.tell(to)
	d.subscribed("soc")
	d.rule("chain:"+string(d.open("mute").Chain), false) // nobody is told
	d.open("planner")
	d.rule("spiffe:spiffe://a.example/planner", false)
	list, all := kinds(t, came, 3)
	if want := []string{"session-revoked", "chain-fenced", "closure"}; !slices.Equal(list, want) {
		t.Fatalf("told %v, want %v", list, want)
	}
	if s := all[0].Subject; s["format"] != "uri" || s["uri"] != "spiffe://a.example/planner" {
		t.Errorf("the subject = %v, want whom the rule is about", s)
	}
	until(t, "it is recorded what was told", func() bool { return sender.Lag("soc") == 0 })
	stop()
	frozen := d.rule("tool:db", true)
	for _, who := range []string{"ann", "bob"} {
		if _, err := d.b.Unfreeze(t.Context(), broker.Operator{Name: who}, frozen.ID); err != nil && !errors.Is(err, broker.Denied) {
			t.Fatal(err)
		}
	}
	d.tell(to)
	list, all = kinds(t, came, 2)
	if want := []string{"freeze", "unfreeze"}; !slices.Equal(list, want) {
		t.Errorf("told %v after a restart, want %v", list, want)
	}
	if s := all[0].Subject; s["format"] != "opaque" || s["id"] != "tool:db" {
		t.Errorf("the subject = %v, want the rule", s)
	}
	if len(came) > 0 {
		t.Errorf("more was told: %v", <-came)
	}
}

// TestSenderAgainAndAgain: what is not taken comes again, the same and in order, whatever the
// answer was; what is refused is passed over; and nobody else waits.
func TestSenderAgainAndAgain(t *testing.T) {
	elsewhere, strayed := ear(t, "elsewhere", accept)
	for name, row := range map[string]struct {
		answer func(n int, w http.ResponseWriter, r *http.Request)
		same   bool // the first came again
		alarm  string
	}{
		"down": {func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, true, "answers 503"},
		"cut":  {func(int, http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, true, "EOF"},
		"elsewhere": {func(_ int, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}, true, "answers 307"},
		"not allowed":           {func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, true, "answers 403"},
		"400 without a reason":  {func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadRequest) }, true, "answers 400"},
		"400 without an end":    {func(_ int, w http.ResponseWriter, r *http.Request) { endless(t, w, r) }, true, "answers 400"},
		"refused for this once": {refuse, false, `"invalid_request": "no\nmore"`},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			bad, came := ear(t, "bad", func(n int, w http.ResponseWriter, r *http.Request) {
				if n <= 2 {
					row.answer(n, w, r)
					return
				}
				accept(n, w, r)
			})
			dead := signals.Subscriber{Name: "dead", URL: "https://127.0.0.1:1", Audience: "dead", TLS: &tls.Config{MinVersion: tls.VersionTLS13}}
			good, well := ear(t, "good", accept)
			s, _ := d.tell(dead, bad, good)
			for _, name := range []string{"dead", "bad", "good"} {
				d.subscribed(name)
			}
			d.rule("tool:db", true)
			d.rule("tool:other", true)
			if list, _ := kinds(t, well, 2); !slices.Equal(list, []string{"freeze", "freeze"}) {
				t.Errorf("the subscriber that is well was told %v", list)
			}
			n := 2
			if row.same {
				n = 4
			}
			_, all := kinds(t, came, n)
			if row.same && (all[0].ID != all[1].ID || all[0].ID != all[2].ID) || all[n-1].ID == all[0].ID {
				t.Errorf("told %v, want the first until it was taken, then the second", all)
			}
			until(t, "an alarm says "+row.alarm, func() bool { return d.alarmed(row.alarm) })
			until(t, "only the dead one is behind", func() bool { return s.Lag("bad") == 0 && s.Lag("good") == 0 && s.Lag("dead") > 0 })
			if len(strayed) > 0 {
				t.Error("a token went where a redirect pointed")
			}
		})
	}
}

func refuse(_ int, w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(http.StatusBadRequest)
	fmt.Fprint(w, `{"err":"invalid_request","description":"no\nmore"}`)
}

// endless is a refusal that would never be read to its end.
func endless(t *testing.T, w http.ResponseWriter, r *http.Request) {
	w.WriteHeader(http.StatusBadRequest)
	fmt.Fprint(w, `{"err":"invalid_request","description":"`)
	for n := 0; r.Context().Err() == nil; {
		more, err := w.Write(make([]byte, 1<<16))
		if n += more; err != nil {
			return
		}
		if n > 32<<20 {
			t.Error("32 MiB of an answer were read")
			return
		}
	}
}

// TestSenderToReceiver: what we send about a chain is what we take, and means the chains that go on from it.
func TestSenderToReceiver(t *testing.T) {
	d := newDesk(t)
	public := d.key.Public()
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := signals.ParseKeys(set)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan selector.Request, 10)
	receiver, err := signals.New(signals.Config{Domains: []string{"b.example"}, Now: time.Now,
		Transmitters: []signals.Transmitter{{Issuer: "https://a.example", Audience: "https://peer", Keys: keys, ChainLabel: "upstream"}},
		Revoke: func(_ context.Context, _ broker.Operator, r selector.Request) (broker.Revocation, error) {
			asked <- r
			return broker.Revocation{ID: "rv1"}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewTLSServer(receiver)
	t.Cleanup(server.Close)
	pool := x509.NewCertPool()
	pool.AddCert(server.Certificate())
	d.tell(signals.Subscriber{Name: "peer", URL: server.URL, Audience: "https://peer", Kinds: []string{"session-revoked"},
		TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}})
	d.subscribed("peer")
	whole, part := d.open("agent"), d.open("agent")
	for sel, want := range map[string]string{"chain:" + string(whole.Chain): string(whole.Chain), "subtree:" + string(part.ID): string(part.ID)} {
		d.rule(sel, false)
		select {
		case r := <-asked:
			if r.Selector.String() != "label.upstream:"+want {
				t.Errorf("%s at one broker is %s at the other, want what carries its name", sel, r.Selector)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("nothing came of %s", sel)
		}
	}
}
