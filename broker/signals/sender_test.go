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
	"github.com/pawlsec/pawl/broker/jws"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/broker/signals"
)

// sendRig is a real engine in memory with senders over it.
type sendRig struct {
	t      *testing.T
	ledger broker.Ledger
	b      *engine.Engine
	key    jose.JSONWebKey

	mu     sync.Mutex // guards alarms
	alarms []string
}

func newSendRig(t *testing.T) *sendRig {
	t.Helper()
	d := &sendRig{t: t, ledger: brokertest.NewMemory()}
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

// start starts a sender. The returned function closes it.
func (d *sendRig) start(to ...signals.Subscriber) (*signals.Sender, func()) {
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

func (d *sendRig) alarmed(text string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.alarms, func(a string) bool { return strings.Contains(a, text) })
}

// rule revokes or freezes by a selector.
func (d *sendRig) rule(sel string, freeze bool) broker.Revocation {
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

// open opens a chain for an agent.
func (d *sendRig) open(who string) broker.Delegation {
	d.t.Helper()
	caller := broker.Caller{ID: spiffeid.RequireFromString("spiffe://a.example/" + who), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := d.b.Open(d.t.Context(), caller, broker.OpenRequest{Task: "t", Rights: []broker.Right{{Tool: "db", Use: true}}})
	if err != nil {
		d.t.Fatal(err)
	}
	return root
}

// subscribed waits until the subscriber is in the ledger. Later events are sent to it.
func (d *sendRig) subscribed(name string) {
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
			t.Fatalf("timed out: %s", what)
		case <-tick.C:
		}
	}
}

// received is a token as a subscriber received it.
type received struct {
	ID      string                     `json:"jti"`
	Subject map[string]any             `json:"sub_id"`
	Events  map[string]json.RawMessage `json:"events"`
}

func (s received) kind() string {
	for uri := range s.Events {
		return uri[strings.LastIndexByte(uri, '/')+1:]
	}
	return ""
}

// subscriber returns a subscriber over TLS. answer answers each token.
func subscriber(t *testing.T, name string, answer func(n int, w http.ResponseWriter, r *http.Request)) (signals.Subscriber, <-chan received) {
	t.Helper()
	tokens := make(chan received, 100)
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
		var s received
		if parts := strings.Split(string(raw), "."); len(parts) == 3 {
			if claims, err := base64.RawURLEncoding.DecodeString(parts[1]); err != nil || json.Unmarshal(claims, &s) != nil {
				t.Errorf("a token cannot be decoded")
			}
			tokens <- s
		}
		answer(i, w, r)
	}))
	t.Cleanup(server.Close)
	pool := x509.NewCertPool()
	pool.AddCert(server.Certificate())
	return signals.Subscriber{Name: name, URL: server.URL, Audience: "https://" + name, TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}}, tokens
}

func accept(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }

// kinds receives n tokens.
func kinds(t *testing.T, tokens <-chan received, n int) (list []string, all []received) {
	t.Helper()
	for range n {
		select {
		case s := <-tokens:
			list, all = append(list, s.kind()), append(all, s)
		case <-time.After(20 * time.Second):
			t.Fatalf("only %v received", list)
		}
	}
	return list, all
}

// TestSenderDelivers checks that each event is delivered once and in order. Delivery starts at the subscription, and
// after a restart at the delivery cursor.
func TestSenderDelivers(t *testing.T) {
	d := newSendRig(t)
	d.rule("tool:other", true) // before the subscription
	to, tokens := subscriber(t, "soc", accept)
	sender, stop := d.start(to)
	d.subscribed("soc")
	d.rule("chain:"+string(d.open("mute").Chain), false) // muted
	d.open("planner")
	d.rule("spiffe:spiffe://a.example/planner", false)
	list, all := kinds(t, tokens, 3)
	if want := []string{"session-revoked", "chain-fenced", "closure"}; !slices.Equal(list, want) {
		t.Fatalf("received %v, want %v", list, want)
	}
	if s := all[0].Subject; s["format"] != "uri" || s["uri"] != "spiffe://a.example/planner" {
		t.Errorf("the subject = %v, want the holder in the rule", s)
	}
	until(t, "the delivery is recorded", func() bool { return sender.Lag("soc") == 0 })
	stop()
	frozen := d.rule("tool:db", true)
	for _, who := range []string{"ann", "bob"} {
		if _, err := d.b.Unfreeze(t.Context(), broker.Operator{Name: who}, frozen.ID); err != nil && !errors.Is(err, broker.Denied) {
			t.Fatal(err)
		}
	}
	d.start(to)
	list, all = kinds(t, tokens, 2)
	if want := []string{"freeze", "unfreeze"}; !slices.Equal(list, want) {
		t.Errorf("received %v after a restart, want %v", list, want)
	}
	if s := all[0].Subject; s["format"] != "opaque" || s["id"] != "tool:db" {
		t.Errorf("the subject = %v, want the rule", s)
	}
	if len(tokens) > 0 {
		t.Errorf("received another token: %v", <-tokens)
	}
}

// TestSenderAgainAndAgain checks that a token that is not accepted is sent again, the same and in order, after any answer.
// A refused token is skipped, and other subscribers do not wait.
func TestSenderAgainAndAgain(t *testing.T) {
	elsewhere, redirected := subscriber(t, "elsewhere", accept)
	for name, row := range map[string]struct {
		answer func(n int, w http.ResponseWriter, r *http.Request)
		same   bool // the first is sent again
		alarm  string
	}{
		"down":    {func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, true, "answered 503"},
		"aborted": {func(int, http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, true, "EOF"},
		"elsewhere": {func(_ int, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}, true, "answered 307"},
		"not allowed":          {func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, true, "answered 403"},
		"400 without a reason": {func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadRequest) }, true, "answered 400"},
		"400 without an end":   {func(_ int, w http.ResponseWriter, r *http.Request) { endless(t, w, r) }, true, "answered 400"},
		"refused for good":     {refuse, false, `"invalid_request": "no\nmore"`},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSendRig(t)
			bad, tokens := subscriber(t, "bad", func(n int, w http.ResponseWriter, r *http.Request) {
				if n <= 2 {
					row.answer(n, w, r)
					return
				}
				accept(n, w, r)
			})
			dead := signals.Subscriber{Name: "dead", URL: "https://127.0.0.1:1", Audience: "dead", TLS: &tls.Config{MinVersion: tls.VersionTLS13}}
			good, healthy := subscriber(t, "good", accept)
			s, _ := d.start(dead, bad, good)
			for _, name := range []string{"dead", "bad", "good"} {
				d.subscribed(name)
			}
			d.rule("tool:db", true)
			d.rule("tool:other", true)
			if list, _ := kinds(t, healthy, 2); !slices.Equal(list, []string{"freeze", "freeze"}) {
				t.Errorf("the healthy subscriber received %v", list)
			}
			n := 2
			if row.same {
				n = 4
			}
			_, all := kinds(t, tokens, n)
			if row.same && (all[0].ID != all[1].ID || all[0].ID != all[2].ID) || all[n-1].ID == all[0].ID {
				t.Errorf("received %v, want the first until it was accepted, then the second", all)
			}
			until(t, "an alarm with "+row.alarm, func() bool { return d.alarmed(row.alarm) })
			until(t, "only the dead one is behind", func() bool { return s.Lag("bad") == 0 && s.Lag("good") == 0 && s.Lag("dead") > 0 })
			if len(redirected) > 0 {
				t.Error("a token was sent to the target of a redirect")
			}
		})
	}
}

func refuse(_ int, w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(http.StatusBadRequest)
	fmt.Fprint(w, `{"err":"invalid_request","description":"no\nmore"}`)
}

// endless writes a refusal that does not end.
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

// TestSenderToReceiver checks that a receiver accepts the sender's event about a chain, and selects the chains that
// continue it.
func TestSenderToReceiver(t *testing.T) {
	d := newSendRig(t)
	public := d.key.Public()
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := jws.ParseKeys(set)
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
	d.start(signals.Subscriber{Name: "peer", URL: server.URL, Audience: "https://peer", Kinds: []string{"session-revoked"},
		TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}})
	d.subscribed("peer")
	whole, part := d.open("agent"), d.open("agent")
	for sel, want := range map[string]string{"chain:" + string(whole.Chain): string(whole.Chain), "subtree:" + string(part.ID): string(part.ID)} {
		d.rule(sel, false)
		select {
		case r := <-asked:
			if r.Selector.String() != "label.upstream:"+want {
				t.Errorf("%s at one broker is %s at the other, want the chains labelled with its name", sel, r.Selector)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s caused nothing", sel)
		}
	}
}
