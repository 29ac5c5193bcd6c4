package e2e_test

import (
	"io"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/cmd/dev"
)

// present introspects a value as a service does, and gives the whole answer without its date and request id.
func (s service) present(value string) string {
	s.t.Helper()
	s.http.CloseIdleConnections() // the broker may have restarted
	resp, err := s.http.PostForm("https://"+s.config.Listen.Agents+"/v1/introspect", url.Values{"token": {value}})
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it was only read
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	head := resp.Header.Clone()
	for name := range head {
		if name == "Date" || strings.Contains(name, "Request") {
			head.Del(name)
		}
	}
	var said strings.Builder
	if err := head.Write(&said); err != nil {
		s.t.Fatal(err)
	}
	return resp.Status + "\n" + said.String() + "\n" + string(raw)
}

// blamed gives the audit's violations for one canary.
func (w *world) blamed(id string) (found []api.Entry) {
	w.t.Helper()
	page, err := w.operator().Audit(w.t.Context(), 0, 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range page.Entries {
		if e.Op == string(broker.OpViolation) && e.Code == string(broker.ViolationCanary) && strings.Contains(e.Detail, id) {
			found = append(found, e)
		}
	}
	return found
}

func (w *world) plant(r api.PlantRequest) api.Planted {
	w.t.Helper()
	p, err := w.operator().Plant(w.t.Context(), r)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// TestCanaryValues: a stolen canary value that is presented to a service ends the chain in which it was planted, even
// if the broker was killed in between. The answer is the same as for an unknown token. A canary without a chain stops
// nothing. An operator who finds a value gets the canary's name.
func TestCanaryValues(t *testing.T) {
	t.Parallel()
	need(t, false)
	w := newWorld(t, newEnv(t, dev.Config{NoPostgres: true}), nil)
	first := startProcess(t, w.file)
	planner := w.agent("planner")
	open := func(task string) (*agent.Delegation, string) {
		t.Helper()
		d, err := planner.Open(t.Context(), agent.Chain{Task: task, Rights: []agent.Right{{Tool: "api.call", Use: true}}})
		if err != nil {
			t.Fatal(err)
		}
		_, token := takeToken(t, d, 0)
		return d, token
	}
	robbed, lost := open("robbed")
	_, kept := open("not robbed")
	read, found := open("read in a log")
	tokens := map[string]string{"lost": lost, "kept": kept, "found": found}
	decoy := w.plant(api.PlantRequest{Chain: string(robbed.Info().Chain), Note: "the home of planner"})
	free := w.plant(api.PlantRequest{Like: "github"})
	logged := w.plant(api.PlantRequest{Chain: string(read.Info().Chain), Like: "github"})

	first.kill()
	second := startProcess(t, w.file)
	s := newService(w)
	s.want("before any presentation", tokens, "lost", "kept", "found")
	unknown := s.present("hvs.CAESnobodyknowsthis")
	if got := s.present(decoy.Value); got != unknown || !strings.HasSuffix(got, "\n\n{\"active\":false}") {
		t.Errorf("the answer to a canary is %q, and to an unknown token %q", got, unknown)
	}
	if got := s.present(free.Value); got != unknown {
		t.Errorf("the answer to a canary without a chain is %q, and to an unknown token %q", got, unknown)
	}
	if !within(10*time.Second, func() bool { return len(w.blamed(decoy.Canary.ID)) > 0 && len(w.blamed(free.Canary.ID)) > 0 }) {
		t.Fatalf("the audit has no entry that they were presented; the broker's log:\n%s", second.said())
	}
	by := w.blamed(decoy.Canary.ID)
	if len(by) != 1 || by[0].Chain != string(robbed.Info().Chain) || by[0].Actor != dev.Agent("orders").String() || by[0].Detail != "canary "+decoy.Canary.ID+", revoke-chain" {
		t.Errorf("the audit has %+v, want the presenter, the chain and the consequence", by)
	}
	s.want("after a canary", tokens, "kept", "found")
	_, err := robbed.Begin(t.Context(), agent.Call{Tool: "api.call", Args: ordersCall})
	mustRefuse(t, "a step of the chain that was robbed", err, agent.ErrRevoked)
	all, err := w.operator().Revocations(t.Context())
	if err != nil || len(all) != 1 || all[0].Selector != "subtree:"+string(robbed.ID()) || all[0].By != "pawl" {
		t.Fatalf("Revocations = %+v, %v; want the one of the chain with the stolen canary", all, err)
	}
	w.closes(all[0].ID)
	for _, id := range []string{decoy.Canary.ID, free.Canary.ID} {
		if !strings.Contains(second.said(), "canary "+id) {
			t.Errorf("no alarm names canary %s; the broker's log:\n%s", id, second.said())
		}
	}

	rv, err := w.operator().Revoke(t.Context(), api.RevokeRequest{Selector: selector.ForLeaked(logged.Value).String(), Reason: "found in a log"})
	if err != nil || rv.Selector != "subtree:"+string(read.ID()) {
		t.Fatalf("Revoke of a canary's value = %+v, %v; want the revocation that the canary caused", rv, err)
	}
	s.want("after a canary was found", tokens, "kept")
	w.closes(rv.ID)
	if _, err := w.operator().Pull(t.Context(), free.Canary.ID); err != nil {
		t.Fatal(err)
	}
	list, err := w.operator().Canaries(t.Context())
	if err != nil || len(list) != 2 || slices.ContainsFunc(list, func(c api.Canary) bool { return c.Touches != 1 || c.Touched.IsZero() }) {
		t.Errorf("Canaries = %+v, %v; want both remaining canaries touched once", list, err)
	}
	for _, p := range []api.Planted{decoy, free, logged} {
		if strings.Contains(second.said(), p.Value) || strings.Contains(string(w.metrics(t))+string(w.audit(t)), p.Value) {
			t.Errorf("the value of canary %s is in a log", p.Canary.ID)
		}
	}
}

// closes waits until a revocation is CLOSED with one dead secret.
func (w *world) closes(id string) {
	w.t.Helper()
	var last api.Revocation
	if err := w.operator().Follow(w.t.Context(), id, func(rv api.Revocation) error { last = rv; return nil }); err != nil {
		w.t.Fatal(err)
	}
	if last.Closure != string(broker.ClosureClosed) || last.Dead != 1 {
		w.t.Errorf("the revocation is %s with %d dead, want CLOSED with the one token", last.Closure, last.Dead)
	}
}
