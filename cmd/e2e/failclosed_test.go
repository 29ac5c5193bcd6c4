package e2e_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/cmd/dev"
)

var update = flag.Bool("update", false, "write the table of docs/promises.md")

// outageRow is one part that is down or unreliable.
type outageRow struct {
	name   string
	part   func(*outOfOrder)       // installs the fault that break_ switches on; nil: none
	break_ func(*outOfOrder) error // called once chains and a secret exist
	repair func(*outOfOrder) error // nil: the fault ends with the run
	gives  bool                    // an agent may still get a secret
	blind  bool                    // the broken part is needed for the proof
}

// outOfOrder is a world with one broken part.
type outOfOrder struct {
	*world
	change []func(*engine.Config)
	broken atomic.Bool
}

// acts lists the requests in the order of the table.
var acts = []string{"open", "issue", "delegate", "close", "revoke", "freeze"}

var outages = []outageRow{
	{name: "Vault is down", blind: true,
		break_: func(o *outOfOrder) error { return o.env.Vault.Kill() },
		repair: func(o *outOfOrder) error { return o.env.Vault.Restart(o.t.Context()) }},
	{name: "Vault is sealed", blind: true,
		break_: func(o *outOfOrder) error { return o.env.Vault.Seal(o.t.Context()) },
		repair: func(o *outOfOrder) error { return o.env.Vault.Unseal(o.t.Context()) }},
	{name: "Vault does not answer", blind: true,
		break_: func(o *outOfOrder) error { return o.env.Vault.Pause() },
		repair: func(o *outOfOrder) error { return o.env.Vault.Continue() }},
	{name: "the ledger takes nothing", part: func(o *outOfOrder) { o.points("before commit") }},
	{name: "the ledger does not say what it took", part: func(o *outOfOrder) { o.points("after commit") }},
	{name: "policy cannot be evaluated", part: func(o *outOfOrder) {
		o.change = append(o.change, func(c *engine.Config) {
			whole := c.Policy
			c.Policy = func() broker.Policy { return &doubtful{whole(), &o.broken} }
		})
	}},
	{name: "the Workload API is gone, the broker's SVID is good still", gives: true,
		break_: func(o *outOfOrder) error { return o.env.Identities.Close() }},
	{name: "the broker's SVID has expired",
		break_: func(o *outOfOrder) error {
			err := o.env.Identities.Close()
			if !within(2*shortSVID, func() bool { return errors.Is(o.reach(), agent.ErrUnavailable) }) {
				return errors.New("agents take the broker's SVID although it has expired")
			}
			return err
		}},
	{name: "PostgreSQL is down", blind: true,
		break_: func(o *outOfOrder) error { return o.env.Postgres.Stop() },
		repair: func(o *outOfOrder) error { return o.env.Postgres.Start(o.t.Context()) }},
	{name: "the clock is an hour ahead", part: func(o *outOfOrder) { o.clock(time.Hour) }},
	{name: "the clock is an hour behind", part: func(o *outOfOrder) { o.clock(-time.Hour) }},
}

// shortSVID is the life of SVIDs where the Workload API is closed during the test.
const shortSVID = 10 * time.Second

// brief is the life of secrets here: the test waits for the expiry of secrets that cannot be ended.
const brief = 25 * time.Second

// points makes every commit fail at one side, before or after it, while the part is broken.
func (o *outOfOrder) points(side string) {
	o.change = append(o.change, newFaults(func(point string) error {
		if o.broken.Load() && strings.HasPrefix(point, side) {
			return errMishap
		}
		return nil
	}).install)
}

// clock makes the engine's clock jump.
func (o *outOfOrder) clock(by time.Duration) {
	o.change = append(o.change, func(c *engine.Config) {
		c.Now = func() time.Time {
			if o.broken.Load() {
				return time.Now().Add(by)
			}
			return time.Now()
		}
	})
}

// reach sends a request that needs an identity, over a new connection.
func (o *outOfOrder) reach() error {
	return o.post(o.t.Context(), "planner", "/v1/chains", api.OpenRequest{}, new(api.Delegation))
}

// doubtful is a policy that fails to evaluate.
type doubtful struct {
	broker.Policy
	broken *atomic.Bool
}

func (d *doubtful) Decide(q broker.Question) broker.Decision {
	answer := d.Policy.Decide(q)
	answer.Failed = answer.Failed || d.broken.Load()
	return answer
}

// TestFailClosed breaks one part after the other and sends every kind of request. The results are the table in
// docs/promises.md, word for word. No secret is handed out while a part is unreliable. Once the part is back, no secret
// is alive that should be dead.
func TestFailClosed(t *testing.T) {
	t.Parallel()
	need(t, true)
	found := make([]map[string]string, len(outages))
	t.Run("cells", func(t *testing.T) {
		for i, row := range outages {
			t.Run(row.name, func(t *testing.T) {
				t.Parallel()
				found[i] = row.play(t)
				if strings.HasPrefix(found[i]["issue"], "done") != row.gives {
					t.Errorf("issue: %s", found[i]["issue"])
				}
			})
		}
	})
	if t.Failed() {
		return
	}
	var table strings.Builder
	fmt.Fprintf(&table, "\n| when | %s |\n|---%s|\n", strings.Join(acts, " | "), strings.Repeat("|---", len(acts)))
	for i, row := range outages {
		fmt.Fprintf(&table, "| %s ", row.name)
		for _, act := range acts {
			fmt.Fprintf(&table, "| %s ", found[i][act])
		}
		table.WriteString("|\n")
	}
	promise(t, table.String()+"\n")
}

// play breaks the part and gives the result of each act.
func (row outageRow) play(t *testing.T) map[string]string {
	config := dev.Config{}
	if strings.Contains(row.name, "SVID") {
		config.SVIDTTL = shortSVID
	}
	o := &outOfOrder{world: newWorld(t, newEnv(t, config), nil)}
	if row.part != nil {
		row.part(o)
	}
	o.here(nil, func(c *engine.Config) {
		for _, f := range o.change {
			f(c)
		}
	})
	root, doomed, frozen := o.chain("planner"), o.chain("writer"), o.chain("stranger")
	held, _, err := take(t.Context(), root, brief)
	if err == nil {
		_, _, err = take(t.Context(), doomed, brief)
	}
	if err != nil {
		t.Fatal(err)
	}
	o.broken.Store(true)
	if row.break_ != nil {
		if err := row.break_(o); err != nil {
			t.Fatal(err)
		}
	}
	found := o.ask(root, string(held.Grant().ID), doomed, frozen, row.blind)
	o.broken.Store(false)
	if row.repair != nil {
		if err := row.repair(o); err != nil {
			t.Fatal(err)
		}
	}
	o.allClosed(90 * time.Second)
	o.oracle.untilNone(o.before, 5*time.Second)
	return found
}

func (o *outOfOrder) chain(name string) *agent.Delegation {
	o.t.Helper()
	d, err := o.agent(name).Open(o.t.Context(), agent.Chain{Task: "fail closed", Rights: rights("db.read"), Depth: 1})
	if err != nil {
		o.t.Fatal(err)
	}
	return d
}

// ask sends every kind of request over new connections, so that the broker answers and not a client's cache.
func (o *outOfOrder) ask(root *agent.Delegation, grant string, doomed, frozen *agent.Delegation, blind bool) map[string]string {
	ctx, cancel := context.WithTimeout(o.t.Context(), 2*time.Minute)
	defer cancel()
	under := "/v1/delegations/" + string(root.ID())
	all := []api.Right{{Tool: "db.read", Use: true}}
	found := map[string]string{}
	say := func(act string, err error, done string) {
		var p *agent.Error
		switch {
		case err == nil:
			found[act] = done
		case errors.As(err, &p):
			found[act] = fmt.Sprintf("refused: `%s`", p.Code)
		default:
			o.t.Errorf("%s: %v, want a problem", act, err)
		}
	}
	var issued api.Issued
	say("open", o.post(ctx, "planner", "/v1/chains", api.OpenRequest{Task: "another", Rights: all}, new(api.Delegation)), "done")
	say("issue", o.post(ctx, "planner", under+"/steps", api.StepRequest{Tool: "db.read", Args: []byte(`{"tables":["orders"]}`), TTLSeconds: int64(brief.Seconds())}, &issued), "done")
	say("delegate", o.post(ctx, "planner", under+"/delegate", api.DelegateRequest{To: dev.Agent("writer").String(), Rights: all}, new(api.Delegation)), "done")
	o.close(ctx, grant, say)
	for act, d := range map[string]*agent.Delegation{"revoke": doomed, "freeze": frozen} {
		rv, err := o.operator().Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "fail closed", Freeze: act == "freeze"})
		say(act, err, "done")
		if err == nil && act == "revoke" {
			found[act] = "fenced; " + o.closure(rv.ID, blind)
		}
	}
	return found
}

// close closes a step and distinguishes a proof from an end that is only recorded.
func (o *outOfOrder) close(ctx context.Context, grant string, say func(act string, err error, done string)) {
	patient, stop := context.WithTimeout(ctx, 2*bound)
	defer stop()
	var closed api.Grant
	err := o.post(patient, "planner", "/v1/grants/"+grant+"/close", api.Nothing{}, &closed)
	switch {
	case err == nil && closed.State == string(broker.StateClosed):
		say("close", nil, "done")
	case err != nil && patient.Err() == nil:
		say("close", err, "")
	case slices.ContainsFunc(o.grants(), func(g api.GrantRecord) bool { return g.ID == grant && g.Ending == string(broker.EndingClosed) }):
		say("close", nil, "recorded; the proof comes later") // the answer waits for the proof
	default:
		say("close", nil, "neither recorded nor refused")
	}
}

// closure gives a revocation's closure after enough time. It waits until the closure is final, or, where the broken
// part is needed for the proof, for a few polls.
func (o *outOfOrder) closure(id string, blind bool) string {
	patience := time.Minute
	if blind {
		patience = 2 * bound
	}
	var rv api.Revocation
	within(patience, func() bool {
		now, err := o.operator().Revocation(o.t.Context(), id)
		if err != nil {
			o.t.Fatal(err)
		}
		rv = now
		return !rv.Settled.IsZero()
	})
	return "`" + rv.Closure + "`"
}

const (
	promiseBegins = "<!-- from cmd/e2e, by go test ./cmd/e2e -run FailClosed -update -->\n"
	promiseEnds   = "<!-- end -->\n"
)

// promise checks that docs/promises.md has the table.
func promise(t *testing.T, table string) {
	t.Helper()
	const page = "../../docs/promises.md"
	raw, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), promiseBegins)
	old, after, ended := strings.Cut(rest, promiseEnds)
	switch {
	case !ok || !ended:
		t.Fatalf("%s has no place for the table", page)
	case table == old:
	case !*update:
		t.Errorf("the table of %s differs from the results: run go test ./cmd/e2e -run FailClosed -update\n%s", page, table)
	default:
		if err := os.WriteFile(page, []byte(before+promiseBegins+table+promiseEnds+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
