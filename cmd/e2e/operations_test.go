package e2e_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/apitest"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// operations asks a broker for everything that the OpenAPI document has.
type operations struct {
	*world
	planner *http.Client     // without the SDK
	socket  *http.Client     // of the operators
	first   *operator.Client // at the socket
	second  *operator.Client // of another person, over the listener
	idp     ed25519.PrivateKey
}

// TestEveryOperation plays each operation of the OpenAPI document on a real broker with a real Vault, once as it should
// be and once refused. Every answer must be as the document has it, and the document may have no answer that did not
// occur.
func TestEveryOperation(t *testing.T) {
	t.Parallel()
	need(t, false)
	d, err := apitest.Read()
	if err != nil {
		t.Fatal(err)
	}
	open, idp, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, newEnv(t, dev.Config{NoPostgres: true}), nil)
	w.statusList()
	w.config.Listen.Operators, w.config.Operators = freeAddress(t), []string{dev.OperatorID.String()}
	w.config.Signals = []wire.Signal{{Issuer: "https://idp.pawl.dev", Audience: "https://pawl.dev", Action: "revoke",
		Keys: w.keysFile(jose.JSONWebKey{Key: open, KeyID: "k1"})}}
	s, err := w.start(nil, wire.Hooks{Handler: d.For(t)})
	if err != nil {
		t.Fatal(err)
	}
	o := newOperations(w)
	o.idp = idp
	o.refused()
	o.healthy()
	chain := o.agents()
	o.operators(chain)
	s.Close() // ends the streams
	if unseen := d.Unseen(); len(unseen) > 0 {
		t.Errorf("these answers of the document did not occur:\n\t%s", strings.Join(unseen, "\n\t"))
	}
}

func newOperations(w *world) *operations {
	source := w.env.Identities.Source(dev.Agent("planner"))
	agents := &http.Transport{ForceAttemptHTTP2: true,
		TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(dev.BrokerID))}
	socket := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", w.config.Listen.Socket)
	}}
	w.t.Cleanup(agents.CloseIdleConnections)
	w.t.Cleanup(socket.CloseIdleConnections)
	second, err := operator.New(operator.Config{Address: "https://" + w.config.Listen.Operators,
		Source: w.env.Identities.Source(dev.OperatorID), ServerID: dev.BrokerID})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(second.Close)
	return &operations{world: w, planner: &http.Client{Transport: agents}, socket: &http.Client{Transport: socket},
		first: w.operator(), second: second}
}

// keysFile writes a JWK set beside the configuration.
func (w *world) keysFile(keys ...jose.JSONWebKey) string {
	w.t.Helper()
	raw, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	file := filepath.Join(filepath.Dir(w.file), "keys.json")
	if err = errors.Join(err, os.WriteFile(file, raw, 0o600)); err != nil {
		w.t.Fatal(err)
	}
	return file
}

// request sends a request to a listener, with the body as its media type, and checks the status.
func (o *operations) request(listener, method, path, media string, body any, want int, header ...string,
) (answer []byte) {
	o.t.Helper()
	text, given := body.(string)
	if !given && body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			o.t.Fatal(err)
		}
		text = string(raw)
	}
	base, client := "https://"+o.config.Listen.Agents, o.planner
	if listener == "operators" {
		base, client = "http://pawl", o.socket
	}
	r, err := http.NewRequestWithContext(o.t.Context(), method, base+path, strings.NewReader(text))
	if err != nil {
		o.t.Fatal(err)
	}
	if body == nil {
		r.Body = nil
	}
	if media != "" {
		r.Header.Set("Content-Type", media)
	}
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	got, err := client.Do(r)
	if err != nil {
		o.t.Fatal(err)
	}
	defer got.Body.Close() //nolint:errcheck // it was only read
	if answer, err = io.ReadAll(got.Body); err != nil || want != 0 && got.StatusCode != want {
		o.t.Fatalf("%s %s = %d %s, %v, want %d", method, path, got.StatusCode, answer, err, want)
	}
	return answer
}

// post sends a JSON body as planner, and decodes the answer.
func (o *operations) post(path string, body, out any, want int, header ...string) {
	o.t.Helper()
	answer := o.request("agents", http.MethodPost, path, "application/json", body, want, header...)
	if err := json.Unmarshal(answer, out); err != nil {
		o.t.Fatalf("POST %s: %v", path, err)
	}
}

// refused has every operation refused, by a query that it does not have.
func (o *operations) refused() {
	o.t.Helper()
	var doc struct {
		Paths map[string]map[string]struct {
			Listener string `json:"x-listener"`
		}
	}
	if err := json.Unmarshal(api.OpenAPI, &doc); err != nil {
		o.t.Fatal(err)
	}
	for path, methods := range doc.Paths {
		path = strings.NewReplacer("{id}", "dl"+strings.Repeat("0", 24), "{backend}", "tokens").Replace(path)
		for method, op := range methods {
			for _, listener := range []string{"agents", "operators"} {
				if op.Listener == listener || op.Listener == "both" {
					o.request(listener, strings.ToUpper(method), path+"?no=such", "", nil, http.StatusBadRequest)
				}
			}
		}
	}
}

// healthy waits until the broker is ready, and asks for the operations of both listeners.
func (o *operations) healthy() {
	o.t.Helper()
	if !within(10*time.Second, func() bool {
		var h struct{ Status string }
		return json.Unmarshal(o.request("operators", http.MethodGet, "/readyz", "", nil, 0), &h) == nil && h.Status == "ok"
	}) {
		o.t.Fatal("the broker is not ready")
	}
	for _, listener := range []string{"agents", "operators"} {
		for _, path := range []string{"/livez", "/readyz", "/healthz", "/v1/openapi.json"} {
			o.request(listener, http.MethodGet, path, "", nil, http.StatusOK)
		}
	}
	o.request("operators", http.MethodGet, "/metrics", "", nil, http.StatusOK)
}

// agents plays the agents' operations, and returns planner's chain.
func (o *operations) agents() *agent.Delegation {
	o.t.Helper()
	ctx, client := o.t.Context(), o.agent("planner")
	d, err := client.Open(ctx, agent.Chain{Task: "every operation", Depth: 1, Heartbeat: time.Minute,
		Rights: rights("api.call")})
	if err != nil {
		o.t.Fatal(err)
	}
	path := "/v1/delegations/" + string(d.ID())
	part := agent.Share{Rights: []agent.Right{{Tool: "api.call", Use: true}}}
	if _, err := d.Delegate(ctx, dev.Agent("writer").String(), part); err != nil {
		o.t.Fatal(err)
	}
	o.request("agents", http.MethodGet, path, "", nil, http.StatusOK)
	o.post(path+"/heartbeat", api.Nothing{}, new(api.Nothing), http.StatusOK)
	args, err := json.Marshal(ordersCall)
	if err != nil {
		o.t.Fatal(err)
	}
	var first, again api.Issued
	call, once := api.StepRequest{Tool: "api.call", Args: args}, api.IdempotencyKey+": once"
	o.post(path+"/steps", call, &first, http.StatusCreated, once)
	o.post(path+"/steps", call, &again, http.StatusOK, once)
	if again.Grant.ID != first.Grant.ID {
		o.t.Errorf("the same key gave grant %s after %s", again.Grant.ID, first.Grant.ID)
	}
	o.post("/v1/grants/"+first.Grant.ID+"/close", api.Nothing{}, new(api.Grant), http.StatusOK)

	key, err := agent.NewSealKey()
	if err != nil {
		o.t.Fatal(err)
	}
	sealed, err := d.Begin(ctx, agent.Call{Tool: "api.call", Args: ordersCall, Seal: &agent.Seal{Key: key.Public()}})
	if err != nil {
		o.t.Fatal(err)
	}
	secret, err := client.Collect(ctx, sealed.Grant().ID, key)
	if err != nil {
		o.t.Fatal(err)
	}
	if !newService(o.world).ask(secret.Field("token")).Active {
		o.t.Error("the collected token is not active")
	}
	o.request("agents", http.MethodGet, "/v1/status-lists/tokens", "", nil, http.StatusOK)
	held, err := d.Begin(ctx, agent.Call{Tool: "api.call", Args: ordersCall, Held: true})
	if err != nil {
		o.t.Fatal(err)
	}
	o.holds(string(held.Grant().ID))
	if err := held.Close(ctx); err != nil {
		o.t.Error(err)
	}
	if _, err := client.Report(ctx, agent.Violation{Code: "odd", Delegation: d.ID()}); err != nil {
		o.t.Error(err)
	}
	if _, err := o.agent("victim").Open(ctx, agent.Chain{Task: "signed out", Rights: rights("api.call")}); err != nil {
		o.t.Fatal(err)
	}
	o.request("agents", http.MethodPost, "/v1/security-events", "application/secevent+jwt",
		o.signedOut(dev.Agent("victim").String()), http.StatusAccepted)
	return d
}

// holds holds a step until the broker has confirmed it.
func (o *operations) holds(grant string) {
	o.t.Helper()
	got, err := o.planner.Get("https://" + o.config.Listen.Agents + "/v1/grants/" + grant + "/hold")
	if err != nil {
		o.t.Fatal(err)
	}
	defer got.Body.Close() //nolint:errcheck // it was only read
	if _, err := io.ReadFull(got.Body, make([]byte, 1)); err != nil || got.StatusCode != http.StatusOK {
		o.t.Fatalf("holding a step = %d, %v", got.StatusCode, err)
	}
}

// signedOut signs the event that the sessions of a subject were revoked.
func (o *operations) signedOut(subject string) string {
	part := base64.RawURLEncoding.EncodeToString
	text := part([]byte(`{"typ":"secevent+jwt","alg":"EdDSA","kid":"k1"}`)) + "." + part(fmt.Appendf(nil,
		`{"iss":"https://idp.pawl.dev","jti":"e1","iat":%d,"aud":"https://pawl.dev","sub_id":{"format":"uri","uri":%q},
		"events":{"https://schemas.openid.net/secevent/caep/event-type/session-revoked":{"initiating_entity":"policy"}}}`,
		time.Now().Unix(), subject))
	return text + "." + part(ed25519.Sign(o.idp, []byte(text)))
}

// operators plays the operators' operations on an agent's chain.
func (o *operations) operators(d *agent.Delegation) {
	o.t.Helper()
	ctx, first, chain := o.t.Context(), o.first, string(d.Info().Chain)
	must := func(_ any, err error) {
		o.t.Helper()
		if err != nil {
			o.t.Fatal(err)
		}
	}
	must(first.ChainPage(ctx, true, "", 1))
	must(first.Chain(ctx, chain))
	must(first.ChainAudit(ctx, chain, 0, 10))
	must(first.Audit(ctx, 0, 10))
	must(first.Checkpoint(ctx))
	planted, err := first.Plant(ctx, api.PlantRequest{Chain: chain})
	must(planted, err)
	must(first.Canaries(ctx))
	must(first.Pull(ctx, planted.Canary.ID))

	frozen, err := first.Revoke(ctx, api.RevokeRequest{Selector: "spiffe:" + dev.Agent("idle").String(), Reason: "a look",
		Freeze: true})
	must(frozen, err)
	_, err = first.Unfreeze(ctx, frozen.ID)
	refusal(o.t, "the first person's wish", err, api.KindDenied, broker.CodeSecondPerson)
	must(o.second.Unfreeze(ctx, frozen.ID))

	plan, err := first.Plan(ctx, "chain:"+chain)
	must(plan, err)
	rv, err := first.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + chain, Reason: "the end", Plan: plan.Plan})
	must(rv, err)
	o.post("/v1/delegations/"+string(d.ID())+"/acknowledge", api.AcknowledgeRequest{Revocation: rv.ID}, new(api.Nothing),
		http.StatusOK)
	must(nil, first.Follow(ctx, rv.ID, func(api.Revocation) error { return nil }))
	must(first.Revocation(ctx, rv.ID))
	all, err := first.Revocations(ctx)
	must(all, err)
	if !slices.ContainsFunc(all, func(r api.Revocation) bool { return r.ID == rv.ID }) {
		o.t.Errorf("the revocation is not listed in %v", all)
	}
	report, err := first.Report(ctx, rv.ID)
	if must(report, err); bytes.Count(report, []byte(".")) != 2 {
		o.t.Errorf("the report is %.40q, want a compact JWS", report)
	}
}
