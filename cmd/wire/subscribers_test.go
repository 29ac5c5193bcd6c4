package wire_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestRevocationIsCarriedOn fences a chain at one broker. A broker of another trust domain ends the chains that
// continue it, although it is down at first and the first broker restarts in between. A subscriber that knows
// nothing of Pawl and demands a client certificate can verify the events.
func TestRevocationIsCarriedOn(t *testing.T) {
	a, b := newSite(t, "a.example"), newSite(t, "b.example")
	a.identify()
	b.identify()
	b.config.JWTAudience = "pawl" // so that others need no certificate of its trust domain
	b.config.Signals = []wire.Signal{{Issuer: "https://a.example/pawl", Audience: "https://b.example",
		Action: "revoke", ChainLabel: "upstream",
		Keys: b.file("a.json", jose.JSONWebKeySet{Keys: []jose.JSONWebKey{a.public}})}}
	soc := newSOC(t, a)
	a.config.Subscribers = map[string]wire.Subscriber{
		"b": {URL: "https://" + b.config.Listen.Agents + "/v1/security-events", Audience: "https://b.example",
			CA: b.path("ca.pem"), ServerID: "spiffe://b.example/pawl", Events: []string{"session-revoked"}},
		"soc": soc.subscriber(a),
	}

	w := a.start()
	root, other := a.open(w, nil), a.open(w, nil)
	begun := time.Now()
	rv, err := a.operator().Revoke(t.Context(),
		api.RevokeRequest{Selector: "chain:" + string(root.Chain), Reason: "it leaked"})
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("fencing took %v with a subscriber down, want less than 2 s", took)
	}
	soc.verify(t, rv, root, a.public)
	within(t, 10*time.Second, "the subscriber that is down has a lag", func() bool {
		return strings.Contains(lag(t, a, "b"), "0.") || len(lag(t, a, "b")) > 1
	})
	within(t, 10*time.Second, "the subscriber that acknowledged all events has no lag", func() bool {
		return lag(t, a, "soc") == "0"
	})
	w.Close() // before b has acknowledged an event

	remote := b.start()
	child := b.open(remote, map[string]string{"upstream": string(root.Chain)})
	free := b.open(remote, map[string]string{"upstream": string(other.Chain)})
	a.start()
	within(t, 30*time.Second, "the fence has reached the other broker", func() bool { return b.fenced(remote, child) })
	if b.fenced(remote, free) {
		t.Error("a chain that continues another chain is fenced too")
	}
	within(t, 10*time.Second, "no subscriber has a lag", func() bool { return lag(t, a, "b") == "0" })
	if again := len(soc.events); again != 0 {
		t.Errorf("%d events were pushed again after a restart", again)
	}
}

func (s *site) fenced(w *wire.Server, d broker.Delegation) bool {
	s.t.Helper()
	caller := broker.Caller{ID: d.Holder, Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	status, err := w.Broker.Status(s.t.Context(), caller, d.ID)
	if err != nil {
		s.t.Fatal(err)
	}
	return status.Fence != nil
}

// lag returns a subscriber's lag as it is in the metrics.
func lag(t *testing.T, s *site, subscriber string) string {
	t.Helper()
	for line := range strings.Lines(scrape(t, s)) {
		if value, ok := strings.CutPrefix(line, `pawl_subscriber_lag_seconds{subscriber="`+subscriber+`"} `); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("the metrics have no subscriber %q", subscriber)
	return ""
}

func scrape(t *testing.T, s *site) string {
	t.Helper()
	h := &http.Client{Transport: socketTransport(s)}
	resp, err := h.Get("http://pawl/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	page, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET /metrics = %d, %v, want 200", resp.StatusCode, err)
	}
	return string(page)
}

// soc is a subscriber that uses none of Pawl's code.
type soc struct {
	*httptest.Server
	events chan string
}

func newSOC(t *testing.T, a *site) soc {
	s := soc{events: make(chan string, 100)}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		if err != nil || r.Header.Get("Content-Type") != "application/secevent+jwt" || r.Method != http.MethodPost {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		s.events <- string(raw)
		w.WriteHeader(http.StatusAccepted)
	}))
	pool := x509.NewCertPool()
	pool.AddCert(a.identities.Bundle().X509Authorities()[0])
	s.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, MinVersion: tls.VersionTLS13}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s soc) subscriber(a *site) wire.Subscriber {
	ca := a.file("soc.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	return wire.Subscriber{URL: s.URL + "/events", Audience: "https://soc.example", CA: ca, MTLS: true}
}

// verify checks the two events of a fence and the event of its closure, in order.
func (s soc) verify(t *testing.T, rv api.Revocation, root broker.Delegation, key jose.JSONWebKey) {
	t.Helper()
	seen := map[string]bool{}
	for _, want := range []string{"https://schemas.openid.net/secevent/caep/event-type/session-revoked",
		"https://pawl.dev/secevent/event-type/chain-fenced", "https://pawl.dev/secevent/event-type/closure"} {
		var token string
		select {
		case token = <-s.events:
		case <-time.After(20 * time.Second):
			t.Fatalf("no event %s came", want)
		}
		jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.EdDSA})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := jws.Verify(key)
		if err != nil {
			t.Fatalf("the signature of %s: %v", want, err)
		}
		if h := jws.Signatures[0].Protected; h.KeyID != key.KeyID || h.ExtraHeaders["typ"] != "secevent+jwt" {
			t.Errorf("the header is %+v, want the key's kid and typ secevent+jwt", h)
		}
		var c struct {
			Iss, Aud, Jti string
			Iat, Toe      int64
			SubID         struct {
				Format        string
				Session, User struct{ Format, ID, URI string }
			} `json:"sub_id"`
			Events map[string]struct {
				EventTimestamp                int64 `json:"event_timestamp"`
				Revocation, Selector, Closure string
				ReasonAdmin                   map[string]string `json:"reason_admin"`
			}
		}
		if err := json.Unmarshal(raw, &c); err != nil {
			t.Fatal(err)
		}
		e, is := c.Events[want]
		if !is || len(c.Events) != 1 || c.Iss != "https://a.example/pawl" || c.Aud != "https://soc.example" || seen[c.Jti] ||
			c.Toe > c.Iat || e.EventTimestamp != c.Toe || time.Since(time.Unix(c.Iat, 0)) > time.Minute {
			t.Errorf("the token is %s, want one recent event %s with a unique id", raw, want)
		}
		seen[c.Jti] = true
		if c.SubID.Format != "complex" || c.SubID.Session.ID != string(root.Chain) ||
			c.SubID.User.URI != root.Holder.String() {
			t.Errorf("the subject is %+v, want the chain, of %s", c.SubID, root.Holder)
		}
		caep := strings.Contains(want, "caep")
		if caep && e.ReasonAdmin["en"] != "it leaked" || !caep && e.Revocation != rv.ID {
			t.Errorf("the event is %+v, want the reason in CAEP's event and the revocation in others", e)
		}
		if strings.HasSuffix(want, "/closure") && e.Closure != string(broker.ClosureClosed) {
			t.Errorf("the event's closure is %q, want CLOSED", e.Closure)
		}
	}
}

// TestSubscribersConfig holds that a subscriber's address and authentication must be configured in full.
func TestSubscribersConfig(t *testing.T) {
	const key = "signing_key: k\n"
	const good = key + `subscribers: {soc: {url: "https://soc/events", audience: soc, mtls: true, events: [freeze]}}`
	if c, err := wire.ParseConfig([]byte(config + good)); err != nil || !c.Subscribers["soc"].MTLS {
		t.Fatalf("ParseConfig = %+v, %v, want the subscriber", c.Subscribers, err)
	}
	for name, row := range map[string]struct{ text, want string }{
		"no key":      {`subscribers: {soc: {url: "https://soc", audience: soc}}`, "signing_key"},
		"no url":      {key + `subscribers: {soc: {audience: soc}}`, "subscribers.soc.url"},
		"no TLS":      {key + `subscribers: {soc: {url: "http://soc", audience: soc}}`, "subscribers.soc.url"},
		"a password":  {key + `subscribers: {soc: {url: "https://u:p@soc", audience: soc}}`, "subscribers.soc.url"},
		"no audience": {key + `subscribers: {soc: {url: "https://soc"}}`, "subscribers.soc.audience"},
		"a bad name":  {key + `subscribers: {SOC: {url: "https://soc", audience: soc}}`, "subscribers.SOC"},
		"an unknown event": {key + `subscribers: {soc: {url: "https://soc", audience: soc, events: [all]}}`,
			"subscribers.soc.events"},
		"a bad SPIFFE ID": {key + `subscribers: {soc: {url: "https://soc", audience: soc, server_id: soc}}`,
			"subscribers.soc.server_id"},
		"a static secret": {key + `subscribers: {soc: {url: "https://soc", audience: soc, token: x}}`, "token"},
		"a bad label": {`signals: [{issuer: i, audience: us, keys: k, action: revoke, chain_label: "a b"}]`,
			"signals.0.chain_label"},
	} {
		if _, err := wire.ParseConfig([]byte(config + row.text)); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("ParseConfig with %s = %v, want an error with %q", name, err, row.want)
		}
	}
}
