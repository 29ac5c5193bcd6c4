package e2e_test

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// tenAnHour limits the steps of each agent, and of those for whom it works, in all chains.
const tenAnHour = `
@id("agents-open")
@any("tool")
permit (principal in AgentGroup::"spiffe://pawl.dev/agent", action in [Action::"open", Action::"delegate"], resource);

@id("ten-reads-an-hour")
@limit("10 per hour")
permit (principal in AgentGroup::"spiffe://pawl.dev/agent", action == Action::"use", resource == Tool::"db.read");
`

// limited gives the environment's bundle with another policy, and with the help desk as an issuer.
func limited(t *testing.T, env *dev.Env, desk helpDesk, cedar string) fs.FS {
	t.Helper()
	files := map[string]string{}
	dir := desk.names(t, filepath.Join(env.Dir, "policy"))
	for _, name := range []string{"bundle.yaml", "tools.yaml", "issuers.yaml"} {
		text, err := fs.ReadFile(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(text)
	}
	files["limits.cedar"] = cedar
	return authors(files)
}

// rush takes steps at once, each on the next of the delegations, and returns the logins that were handed out. All other
// steps must be refused by the limit, with the time to wait.
func (w *world) rush(n int, on []*agent.Delegation) (got []login) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	var all sync.WaitGroup
	var mu sync.Mutex // guards got
	for i := range n {
		all.Go(func() {
			_, l, err := take(ctx, on[i%len(on)], 0)
			mu.Lock()
			defer mu.Unlock()
			var problem *agent.Error
			switch {
			case err == nil:
				got = append(got, l)
			case !errors.As(err, &problem) || problem.Code != "caller_limit":
				w.t.Errorf("a step = %v, want a secret or caller_limit", err)
			case problem.RetryAfter() <= 0 || problem.RetryAfter() > time.Hour+time.Minute:
				w.t.Errorf("the agent is to wait %v, want until its oldest steps are an hour old", problem.RetryAfter())
			}
		})
	}
	all.Wait()
	return got
}

// opened opens chains for reading, for an agent. A token is the envelope of each; empty: none.
func (w *world) opened(name, token string, n int) (list []*agent.Delegation) {
	w.t.Helper()
	client := w.agent(name)
	for range n {
		d, err := client.Open(w.t.Context(), agent.Chain{Task: "limits", Depth: 1, Rights: rights("db.read"),
			Envelope: token})
		if err != nil {
			w.t.Fatal(err)
		}
		list = append(list, d)
	}
	return list
}

// usable fails unless there are n logins and each works.
func (w *world) usable(what string, got []login, n int) {
	w.t.Helper()
	if len(got) != n {
		w.t.Errorf("%s: %d steps got a secret, want %d", what, len(got), n)
	}
	for _, l := range got {
		if !w.oracle.works(l) {
			w.t.Errorf("%s: login %s does not work", what, l.Username)
		}
	}
}

// TestLimitOverChains lets one agent take fifty steps at once over 25 chains, against a limit of ten in an hour, on a
// real Vault and a real PostgreSQL: exactly ten logins exist, and none more after the broker was killed and has started
// again. Neither another agent in its chain nor one that opens a chain on its behalf gets more. Two agents on behalf of a
// third party get ten together.
func TestLimitOverChains(t *testing.T) {
	t.Parallel()
	need(t, true)
	env, desk := newEnv(t, dev.Config{}), newHelpDesk(t)
	w := newWorld(t, env, func(c *wire.Config) { c.Policy = sign(t, limited(t, env, desk, tenAnHour)) })
	p := startProcess(t, w.file)
	behalf := func(name, of string) string {
		return desk.seal(t, dev.Agent(name).String(), map[string]any{"on_behalf_of": of})
	}
	planner := dev.Agent("planner").String()
	chains := w.opened("planner", "", 25)
	part := agent.Share{Rights: []agent.Right{{Tool: "db.read", Use: true}}}
	passed, err := chains[0].Delegate(t.Context(), dev.Agent("fetcher").String(), part)
	if err != nil {
		t.Fatal(err)
	}
	inChain, err := w.agent("fetcher").Join(t.Context(), passed)
	if err != nil {
		t.Fatal(err)
	}
	forPlanner := append(w.opened("fetcher", behalf("fetcher", planner), 1), inChain)
	forAna := append(w.opened("writer", behalf("writer", "ana"), 1), w.opened("reader", behalf("reader", "ana"), 1)...)

	w.usable("fifty steps over 25 chains", w.rush(50, chains), 10)
	w.usable("another agent, in its chain and on its behalf", w.rush(6, forPlanner), 0)
	w.usable("two agents on behalf of ana", w.rush(16, forAna), 10)
	p.kill()

	p = startProcess(t, w.file)
	w.usable("fifty steps after the restart", w.rush(50, chains), 0)
	w.usable("a new chain after the restart", w.rush(2, w.opened("planner", "", 1)), 0)
	w.usable("another agent after the restart", w.rush(6, forPlanner), 0)
	w.usable("two agents on behalf of ana after the restart", w.rush(6, forAna), 0)
	if roles := w.oracle.left().without(w.before).roles; len(roles) != 20 {
		t.Errorf("%d logins exist, want the ten of each limit: %v", len(roles), roles)
	}
	w.usable("an agent for itself", w.rush(1, w.opened("fetcher", "", 1)), 1)
	if n := w.counts("planner", broker.OpHandle); n != 10 {
		t.Errorf("the audit log has %d steps of planner for which a mint was sent, want 10", n)
	}
	p.end(t)
}

// entries reads the audit log, which must fit on one page.
func (w *world) entries() []api.Entry {
	w.t.Helper()
	page, err := w.operator().Audit(w.t.Context(), 0, 1000)
	if err != nil || len(page.Entries) == 1000 {
		w.t.Fatalf("the audit log has %d entries, %v", len(page.Entries), err)
	}
	return page.Entries
}

// counts counts the entries of an agent with an op.
func (w *world) counts(name string, op broker.Op) (n int) {
	w.t.Helper()
	for _, e := range w.entries() {
		if e.Actor == dev.Agent(name).String() && e.Op == string(op) {
			n++
		}
	}
	return n
}
