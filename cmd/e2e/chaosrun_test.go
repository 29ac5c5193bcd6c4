package e2e_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// run plays one cell: the broker with the mishap and the brokers before and after it. It has the requests of agents and
// an operator, and the answers that they got.
type run struct {
	w     *world
	cell  cell
	proxy *proxy
	life  time.Duration // of secrets

	began   int          // brokers so far
	process *process     // the running broker, or
	here    *wire.Server // the broker in this process

	got     []chaosLogin
	granted []string // ids of grants in answers to an agent
	fenced  []string // ids of revocations in answers to an operator
	chains  []string

	mu     sync.Mutex // guards the fields below
	points []string
	done   bool // the mishap happened
}

// chaosLogin is a login that an agent got, with the selectors that revoke it and its end.
type chaosLogin struct {
	login
	under []string
	end   time.Time
}

func newRun(t *testing.T, env *dev.Env, c cell) *run {
	r := &run{cell: c, life: stepTTL}
	if c.mishap == paused {
		r.life = pause()
	}
	r.w = newWorld(t, env, func(config *wire.Config) {
		if c.mishap == vault500 || c.mishap == answerLost {
			r.proxy = newProxy(t, env)
			r.proxy.use(t, config)
		}
	})
	return r
}

func (r *run) met() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.done }

func (r *run) walked() []string { r.mu.Lock(); defer r.mu.Unlock(); return slices.Clone(r.points) }

// alive starts the next broker if none is running.
func (r *run) alive() {
	r.w.t.Helper()
	if r.process != nil {
		select {
		case <-r.process.exited:
			r.process = nil
		default:
		}
	}
	if r.process == nil && r.here == nil {
		r.next()
	}
}

// next starts a broker: first the one that is killed and leaves a past, then the one with the mishap, then brokers
// without one.
func (r *run) next() {
	r.w.t.Helper()
	n := r.began
	if r.began++; r.cell.after == "" {
		n++
	}
	switch {
	case n == 0:
		r.process = startProcess(r.w.t, r.w.file, with(envKill, r.cell.after))
	case n == 1 && r.cell.mishap == killed:
		r.process = startProcess(r.w.t, r.w.file, with(envKill, r.cell.point))
		go r.watch(r.process)
	case n == 1 && r.cell.mishap == paused:
		r.process = startProcess(r.w.t, r.w.file, with(envStop, r.cell.point))
		go r.watch(r.process)
	case n == 1:
		r.here, _ = r.w.start(nil, wire.Hooks{Engine: newFaults(r.reach).install}) // the ledger may refuse its first commit
	default:
		r.here = r.w.here(nil, nil)
	}
}

// watch records that the point was reached, and continues a paused broker after its pause.
func (r *run) watch(p *process) {
	select {
	case <-p.met:
	case <-p.exited: // its last output has been read by then
	}
	select {
	case <-p.met:
		r.happened()
	default:
		return
	}
	if r.cell.mishap != paused {
		return
	}
	over := time.NewTimer(r.life)
	defer over.Stop()
	select {
	case <-over.C:
		_ = p.cmd.Process.Signal(syscall.SIGCONT) // if it has exited, the run fails elsewhere
	case <-p.exited:
	}
}

func (r *run) happened() { r.mu.Lock(); defer r.mu.Unlock(); r.done = true }

// reach is called when the broker in this process is at a point.
func (r *run) reach(point string) error {
	r.mu.Lock()
	r.points = append(r.points, point)
	r.mu.Unlock()
	act, late := strings.CutPrefix(r.cell.point, "after ")
	switch {
	case r.cell.mishap == ledgerFails || r.cell.mishap == targetFails:
		if point == r.cell.point {
			r.happened()
			return errMishap
		}
	case r.proxy != nil && !late && point == r.cell.point:
		r.spoil(instead(r.answer()))
	case r.proxy != nil && late && point == "before "+act:
		r.spoil(r.answer())
	}
	return nil
}

func (r *run) answer() fault {
	if r.cell.mishap == vault500 {
		return status(500)
	}
	return cut
}

func (r *run) spoil(f fault) {
	r.happened()
	r.proxy.spoil(vaultActs[actOf(r.cell.point)], f)
}

// again retries a request until it succeeds, as agents and operators do. Every error must be an unknown outcome or an
// expiry.
func (r *run) again(what string, do func(context.Context) error) {
	r.w.t.Helper()
	var err error
	patience := 20*time.Second + 2*r.life
	if !within(patience, func() bool {
		r.alive()
		ctx, cancel := context.WithTimeout(r.w.t.Context(), patience)
		defer cancel()
		if err = do(ctx); err != nil && !errors.Is(err, agent.ErrUnavailable) && !errors.Is(err, agent.ErrExpired) {
			r.w.t.Fatalf("%s: %v, which is false", what, err)
		}
		return err == nil
	}) {
		r.w.t.Fatalf("%s, retried for %v: %v", what, patience, err)
	}
}

// play runs the cell from the first request to the last check.
func (r *run) play() {
	w := r.w
	root := r.open("planner")
	part := r.pass(root)
	first := r.step(root)
	r.again("closing a step", first.Close)
	r.step(part)
	other := r.open("stranger")
	r.step(other)
	var grants []api.GrantRecord
	r.again("looking", func(context.Context) (err error) { grants, err = w.readGrants(); return err })
	w.known(grants)
	r.violate(other)
	r.refuses(other, "stranger")
	r.revoke(root)
	r.refuses(root, "planner")
	r.refuses(part, "writer")
	r.follow()
	w.allClosed(r.life + 4*bound)
	r.ended()
	r.restart()
	r.ended()
	r.remembered()
}

func (r *run) open(name string) (d *agent.Delegation) {
	client := r.w.agent(name)
	r.again("opening a chain", func(ctx context.Context) (err error) {
		d, err = client.Open(ctx, agent.Chain{Task: "chaos", Rights: rights("db.read"), Depth: 1})
		return err
	})
	r.chains = append(r.chains, string(d.Info().Chain))
	return d
}

func (r *run) pass(from *agent.Delegation) (d *agent.Delegation) {
	var id agent.DelegationID
	r.again("delegating", func(ctx context.Context) (err error) {
		id, err = from.Delegate(ctx, dev.Agent("writer").String(), agent.Share{Rights: []agent.Right{{Tool: "db.read", Use: true}}})
		return err
	})
	client := r.w.agent("writer")
	r.again("joining", func(ctx context.Context) (err error) { d, err = client.Join(ctx, id); return err })
	return d
}

func (r *run) step(d *agent.Delegation) (s *agent.Step) {
	var l login
	r.again("taking a step", func(ctx context.Context) (err error) { s, l, err = take(ctx, d, r.life); return err })
	r.got = append(r.got, chaosLogin{l, []string{"chain:" + string(d.Info().Chain), "subtree:" + string(d.ID())}, s.Grant().Expires})
	r.granted = append(r.granted, string(s.Grant().ID))
	return s
}

// violate asks for a tool that policy forbids with revoke-chain. If the answer was lost, the answer to the retry is
// that the chain is revoked.
func (r *run) violate(d *agent.Delegation) {
	r.again("breaking policy", func(ctx context.Context) error {
		_, err := d.Begin(ctx, agent.Call{Tool: "db.admin", Args: agent.Args{"tables": []string{"orders"}}})
		var p *agent.Error
		switch {
		case err == nil:
			r.w.t.Fatal("a secret was handed out for a forbidden tool")
		case errors.As(err, &p) && (p.Kind == agent.ErrDenied && p.Revocation != "" || p.Kind == agent.ErrRevoked):
			return nil
		}
		return err
	})
}

func (r *run) revoke(d *agent.Delegation) {
	r.again("revoking", func(ctx context.Context) error {
		rv, err := r.w.operator().Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "chaos"})
		r.fenced = append(r.fenced, rv.ID)
		if err != nil {
			r.fenced = r.fenced[:len(r.fenced)-1]
		}
		return err
	})
}

// refuses asks the broker, over a new connection, for a step under a fence that was acknowledged. The broker must
// refuse it.
func (r *run) refuses(d *agent.Delegation, holder string) {
	r.again("asking under a fence", func(ctx context.Context) error {
		err := r.w.post(ctx, holder, "/v1/delegations/"+string(d.ID())+"/steps", api.StepRequest{Tool: "db.read", Args: []byte(`{"tables":["orders"]}`)}, new(api.Issued))
		switch {
		case err == nil:
			r.w.t.Fatal("a secret was handed out after the fence was acknowledged")
		case errors.Is(err, agent.ErrRevoked):
			return nil
		}
		return err
	})
}

// follow follows every revocation in the ledger to its final closure.
func (r *run) follow() {
	var all []api.Revocation
	r.again("listing revocations", func(ctx context.Context) (err error) { all, err = r.w.operator().Revocations(ctx); return err })
	if len(all) < 2 {
		r.w.t.Fatalf("the ledger has %d revocations, want one of each chain", len(all))
	}
	for _, rv := range all {
		r.again("following a revocation", func(ctx context.Context) error { return r.w.operator().Follow(ctx, rv.ID, r.check) })
	}
}

// check compares a revocation with PostgreSQL: it is CLOSED only when all logins are dead, and its latest end is not
// before the end of a working login.
func (r *run) check(rv api.Revocation) error {
	for _, l := range r.got {
		if !slices.Contains(l.under, rv.Selector) {
			continue
		}
		switch works := r.w.oracle.works(l.login); {
		case works && rv.Closure == string(broker.ClosureClosed):
			r.w.t.Errorf("the revocation is CLOSED, but login %s works", l.Username)
		case works && rv.LatestEnd.Before(l.end.Truncate(time.Second)):
			r.w.t.Errorf("the reported latest end is %v, but login %s works until %v", rv.LatestEnd, l.Username, l.end)
		}
	}
	if !rv.Settled.IsZero() && (rv.Closure != string(broker.ClosureClosed) || rv.Dead != rv.Grants) {
		r.w.t.Errorf("the final closure is %s with %d of %d dead, want CLOSED with all", rv.Closure, rv.Dead, rv.Grants)
	}
	return nil
}

// ended checks the final state with the oracle.
func (r *run) ended() {
	for _, l := range r.got {
		if r.w.oracle.works(l.login) {
			r.w.t.Errorf("login %s works after the run", l.Username)
		}
	}
	r.w.oracle.untilNone(r.w.before, 5*time.Second)
}

// restart stops the broker cleanly and starts a new one on the same ledger.
func (r *run) restart() {
	if r.process != nil {
		r.process.end(r.w.t)
	} else {
		r.here.Close()
	}
	r.process, r.here = nil, r.w.here(nil, nil)
}

// remembered checks that the ledger has every acknowledged change.
func (r *run) remembered() {
	have := map[string]bool{}
	o := r.w.operator()
	all, err := o.Revocations(r.w.t.Context())
	if err != nil {
		r.w.t.Fatal(err)
	}
	for _, rv := range all {
		if have[rv.ID] = true; rv.Closure != string(broker.ClosureClosed) || rv.Settled.IsZero() {
			r.w.t.Errorf("after the run revocation %s is %s, final since %v", rv.ID, rv.Closure, rv.Settled)
		}
	}
	for _, g := range r.w.grants() {
		have[g.ID], have[g.Chain] = true, true
	}
	for _, id := range slices.Concat(r.granted, r.fenced, r.chains) {
		if !have[id] {
			r.w.t.Errorf("%s was acknowledged, but the ledger does not have it", id)
		}
	}
	if r.w.t.Failed() {
		r.w.t.Logf("%+v passed %v", r.cell, r.walked())
	}
}
