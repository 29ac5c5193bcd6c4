// Package demo plays Pawl's main scenario on real parts: a task of two agents, their allowed and refused
// requests, and the revocation of all their secrets when one agent breaks policy.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/cmd/dev"
)

// Config configures a run of the demonstration.
type Config struct {
	Out        io.Writer // gets the timeline as text; required
	Progress   io.Writer // gets a line for each part that is started; nil discards it
	JSON       string    // file to write the timeline to; empty: none
	NoPostgres bool      // play without PostgreSQL, even if it is installed

	// Inspect is called at the end, before the environment is closed. It can check the demonstration's claims
	// independently. Nil: no check.
	Inspect func(context.Context, *dev.Env) error
}

// play is one run.
type play struct {
	timeline
	env  *dev.Env
	door *tlsServer // accepts the certificates

	planner, writer, stranger *agent.Client
	root, part                *agent.Delegation // planner's root delegation, and its delegation to writer
	partID                    agent.DelegationID
	live                      []*held
	session                   *session // open when the chain is revoked
}

// Run plays the demonstration once. It returns the first deviation from the expected outcome as an error.
func Run(ctx context.Context, c Config) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	env, err := dev.Start(ctx, dev.Config{Progress: c.Progress, NoPostgres: c.NoPostgres})
	if err != nil {
		return err
	}
	defer env.Close()
	p := &play{timeline: timeline{out: c.Out, began: time.Now()}, env: env}
	if err := p.connect(); err != nil {
		return err
	}
	defer p.close()
	scenes := []func(context.Context) error{p.firstStep, p.refusedByTheBackend, p.delegate, p.replay, p.violate, p.prove}
	if env.Postgres == nil {
		fmt.Fprintln(c.Out, "\nThere is no PostgreSQL on this machine: the database scenes (1 and 2) are left out, "+
			"and certificates replace the logins.")
		scenes = []func(context.Context) error{p.openOnly, p.delegate, p.replay, p.violate, p.prove}
	}
	for _, scene := range scenes {
		if err := scene(ctx); err != nil {
			return fmt.Errorf("the demonstration failed: %w", err)
		}
	}
	if c.Inspect != nil {
		if err := c.Inspect(ctx, env); err != nil {
			return err
		}
	}
	if c.JSON != "" {
		if err := p.write(c.JSON); err != nil {
			return err
		}
		fmt.Fprintf(c.Out, "\nThe timeline as JSON, with figures: %s\n", c.JSON)
	}
	return nil
}

// connect makes the clients of the three agents, each with its own SVID, and the server that accepts
// certificates.
func (p *play) connect() (err error) {
	clients := map[string]**agent.Client{"planner": &p.planner, "writer": &p.writer, "stranger": &p.stranger}
	for name, client := range clients {
		if *client, err = agent.New(agent.Config{Address: "https://" + p.env.Broker.Agents().String(),
			Source: p.env.Identities.Source(dev.Agent(name)), ServerID: dev.BrokerID}); err != nil {
			return err
		}
	}
	p.door, err = newTLSServer(p.env)
	return err
}

func (p *play) close() {
	p.session.close()
	for _, c := range []*agent.Client{p.planner, p.writer, p.stranger} {
		_ = c.Close() // the broker is closed next
	}
	p.door.close()
}

// rights are the chain's rights: to use both tools and to delegate them.
func (p *play) rights() []agent.Right {
	rights := []agent.Right{{Tool: "tls.call", Use: true, Delegate: true}}
	if p.env.Postgres != nil {
		rights = append(rights, agent.Right{Tool: "db.read", Use: true, Delegate: true})
	}
	return rights
}

func (p *play) open(ctx context.Context) (err error) {
	if p.root, err = p.planner.Open(ctx, agent.Chain{Task: "weekly report", Rights: p.rights(), Depth: 2}); err != nil {
		return err
	}
	p.note("chain_opened", "planner proved its SPIFFE ID and opened a chain for the task %q", "weekly report")
	return nil
}

func (p *play) openOnly(ctx context.Context) error {
	p.scene("1  A chain")
	return p.open(ctx)
}

func (p *play) firstStep(ctx context.Context) error {
	p.scene("1  One secret for one step")
	if err := p.open(ctx); err != nil {
		return err
	}
	h, err := p.login(ctx, p.root, "orders")
	if err != nil {
		return err
	}
	p.note("step_issued", "planner asked for db.read on table orders: Vault made login %s, good for a minute",
		h.login.Username)
	rows, err := h.read(ctx, "orders")
	if err != nil {
		return err
	}
	p.note("table_read", "planner read %d rows of orders with it", rows)
	return nil
}

// refusedByTheBackend tries the same raw secret outside its scope.
func (p *play) refusedByTheBackend(ctx context.Context) error {
	p.scene("2  The secret itself can do no more: PostgreSQL refuses, Pawl is not asked")
	h := p.live[0]
	for _, try := range []struct{ name, what, sql string }{
		{"other_table_refused", "reading table customers", "SELECT * FROM customers"},
		{"write_refused", "a write to orders", "INSERT INTO orders (item, price) VALUES ('nothing', 0)"},
	} {
		refusal, err := h.refused(ctx, try.sql)
		if err != nil {
			return fmt.Errorf("%s: %w", try.what, err)
		}
		p.note(try.name, "%s: %s", try.what, refusal)
	}
	if err := h.step.Close(ctx); err != nil {
		return err
	}
	p.live = nil
	if err := h.works(ctx); err == nil {
		return errors.New("the login still works after its step was closed")
	}
	p.note("step_closed", "planner closed the step: the login is gone")
	return nil
}

func (p *play) delegate(ctx context.Context) (err error) {
	p.scene("3  A narrower delegation")
	share := agent.Share{Rights: []agent.Right{{Tool: "tls.call", Use: true,
		Args: map[string]agent.Constraint{"name": agent.OneOf("writer.agents.pawl.dev")}}}}
	if p.env.Postgres != nil {
		share.Rights = append(share.Rights, agent.Right{Tool: "db.read", Use: true,
			Args: map[string]agent.Constraint{"tables": agent.Subset("orders")}})
	}
	if p.partID, err = p.root.Delegate(ctx, dev.Agent("writer").String(), share); err != nil {
		return err
	}
	if p.part, err = p.writer.Join(ctx, p.partID); err != nil {
		return err
	}
	p.note("delegated", "planner delegated a part of its rights to writer, %s", dev.Agent("writer"))
	tool, args := "tls.call", agent.Args{"name": "planner.agents.pawl.dev"}
	if p.env.Postgres != nil {
		tool, args = "db.read", agent.Args{"tables": []string{"customers"}}
	}
	_, err = p.part.Begin(ctx, agent.Call{Tool: tool, Args: args})
	return p.mustRefuse("wider_refused", "writer asked for more than its delegation allows", err, agent.ErrDenied)
}

func (p *play) replay(ctx context.Context) error {
	p.scene("4  A delegation is useless to other agents")
	_, err := p.stranger.Join(ctx, p.partID)
	return p.mustRefuse("replay_refused", "stranger presented writer's delegation", err, agent.ErrNotFound)
}

// mustRefuse adds an event for a refusal of the expected kind. Every other outcome is an error.
func (p *play) mustRefuse(name, what string, err, want error) error {
	var refusal *agent.Error
	if !errors.Is(err, want) || !errors.As(err, &refusal) {
		return fmt.Errorf("%s: got %v, want %v", what, err, want)
	}
	p.note(name, "%s: refused (%s)", what, refusal.Code)
	return nil
}

// violate makes ten live secrets. Then writer asks for a tool that policy forbids with revoke-chain.
func (p *play) violate(ctx context.Context) error {
	p.scene("5  Ten secrets are live when one agent breaks policy")
	if err := p.holdTen(ctx); err != nil {
		return err
	}
	var cancelled sync.WaitGroup
	contexts := map[string]context.Context{"planner": p.root.Context(), "writer": p.part.Context()}
	asked := time.Now()
	for _, ctx := range contexts {
		cancelled.Go(func() {
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Second):
			}
		})
	}
	tool, args := "tls.call", agent.Args{"name": "root.agents.pawl.dev"}
	if p.env.Postgres != nil {
		tool, args = "db.admin", agent.Args{"tables": []string{"orders"}}
	}
	_, err := p.part.Begin(ctx, agent.Call{Tool: tool, Args: args})
	fenced := milliseconds(time.Since(asked))
	var refusal *agent.Error
	if !errors.Is(err, agent.ErrDenied) || !errors.As(err, &refusal) || refusal.Revocation == "" {
		return fmt.Errorf("the request for the forbidden tool was answered with %v", err)
	}
	p.note("violation", "writer asked for %s, which policy forbids with revoke-chain (%s): refused and fenced in %.1f ms",
		tool, refusal.Policies[0], fenced)
	dead, alive := p.untilDead(ctx, asked)
	secrets := len(p.live)
	e := p.note("revoked", "every one of the %d secrets was refused by its backend %.0f ms after the violation",
		secrets, dead)
	e.FencedMS, e.DeadMS, e.Secrets, e.AliveAfter = &fenced, &dead, &secrets, &alive
	if p.session != nil && p.session.ended(ctx) {
		p.note("session_cut", "the open session was terminated: its cursor returns nothing more")
	}
	cancelled.Wait()
	for name, ctx := range contexts {
		if !errors.Is(context.Cause(ctx), agent.ErrRevoked) {
			return fmt.Errorf("the SDK of %s was not notified of the revocation: %w", name, context.Cause(ctx))
		}
	}
	p.note("agents_heard", "the SDKs of planner and writer were notified and cancelled the contexts of their steps")
	return p.askAgain(ctx)
}

// askAgain requests another step for both agents. Their SDKs know of the revocation and would refuse without
// the broker, so these requests use new connections to the broker.
func (p *play) askAgain(ctx context.Context) error {
	for name, d := range map[string]*agent.Delegation{"planner": p.root, "writer": p.part} {
		c, err := client.New(client.Config{Address: "https://" + p.env.Broker.Agents().String(),
			Source: p.env.Identities.Source(dev.Agent(name)), ServerID: dev.BrokerID})
		if err != nil {
			return err
		}
		step := api.StepRequest{Tool: "tls.call", Args: []byte(`{"name":"writer.agents.pawl.dev"}`)}
		err = c.Call(ctx, http.MethodPost, "/v1/delegations/"+string(d.ID())+"/steps", nil, step, new(api.Issued))
		c.Close()
		var refusal *agent.Error
		if !errors.As(err, &refusal) || refusal.Kind != agent.ErrRevoked || refusal.Status != http.StatusConflict {
			return fmt.Errorf("the next step of %s was answered with %v", name, err)
		}
	}
	p.note("asked_again", "both asked for another step without their SDKs: the broker refused, "+
		"and hands out no secret under this chain")
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
