// Package demo plays Pawl's main job on real parts: a task of two agents, what they may do, what
// they may not, and how all they hold ends at once when one of them breaks policy.
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

// Config says how to play.
type Config struct {
	Out        io.Writer // the timeline for people; required
	Progress   io.Writer // what is being started; nil: nobody is told
	JSON       string    // file of the timeline; empty: none
	NoPostgres bool      // as on a machine without PostgreSQL

	// Inspect is called at the end, before everything is stopped, for whoever does not take the
	// demonstration's word. Nil: nobody looks.
	Inspect func(context.Context, *dev.Env) error
}

// play is one run.
type play struct {
	timeline
	env  *dev.Env
	door *tlsServer // what the certificates open

	planner, writer, stranger *agent.Client
	root, part                *agent.Delegation // what planner opened, and what it passed on to writer
	passed                    agent.DelegationID
	live                      []*held
	session                   *session // open when the chain is revoked
}

// Run plays the demonstration once. The error says which scene went otherwise than it must.
func Run(ctx context.Context, c Config) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	env, err := dev.Start(ctx, dev.Config{Progress: c.Progress, NoPostgres: c.NoPostgres})
	if err != nil {
		return err
	}
	defer env.Close()
	p := &play{timeline: timeline{out: c.Out, began: time.Now()}, env: env}
	if err := p.meet(); err != nil {
		return err
	}
	defer p.leave()
	scenes := []func(context.Context) error{p.firstStep, p.refusedByTheBackend, p.delegate, p.replay, p.violate, p.prove}
	if env.Postgres == nil {
		fmt.Fprintln(c.Out, "\nThere is no PostgreSQL on this machine: the database scenes (1 and 2) are left out, and certificates stand in for logins.")
		scenes = []func(context.Context) error{p.openOnly, p.delegate, p.replay, p.violate, p.prove}
	}
	for _, scene := range scenes {
		if err := scene(ctx); err != nil {
			return fmt.Errorf("the demonstration went wrong: %w", err)
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
		fmt.Fprintf(c.Out, "\nThe same with figures: %s\n", c.JSON)
	}
	return nil
}

// meet makes the three agents, each with an SVID of its own, and the server that certificates open.
func (p *play) meet() (err error) {
	for name, to := range map[string]**agent.Client{"planner": &p.planner, "writer": &p.writer, "stranger": &p.stranger} {
		if *to, err = agent.New(agent.Config{Address: "https://" + p.env.Broker.Agents().String(),
			Source: p.env.Identities.Source(dev.Agent(name)), ServerID: dev.BrokerID}); err != nil {
			return err
		}
	}
	p.door, err = newTLSServer(p.env)
	return err
}

func (p *play) leave() {
	p.session.close()
	for _, c := range []*agent.Client{p.planner, p.writer, p.stranger} {
		_ = c.Close() // the broker goes next
	}
	p.door.close()
}

// rights are what the chain may do: pass on both tools, and use them.
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
	h, err := p.login(ctx, "planner", p.root, "orders")
	if err != nil {
		return err
	}
	p.note("step_issued", "planner asked for db.read on table orders: Vault made login %s, good for a minute", h.login.Username)
	rows, err := h.read(ctx, "orders")
	if err != nil {
		return err
	}
	p.note("table_read", "planner read %d rows of orders with it", rows)
	return nil
}

// refusedByTheBackend uses the same raw secret for more than it was made for.
func (p *play) refusedByTheBackend(ctx context.Context) error {
	p.scene("2  The secret itself can do no more: PostgreSQL refuses, Pawl is not asked")
	h := p.live[0]
	for _, try := range []struct{ name, what, sql string }{
		{"other_table_refused", "reading table customers", "SELECT * FROM customers"},
		{"write_refused", "a write to orders", "INSERT INTO orders (item, price) VALUES ('nothing', 0)"},
	} {
		said, err := h.refused(ctx, try.sql)
		if err != nil {
			return fmt.Errorf("%s: %w", try.what, err)
		}
		p.note(try.name, "%s: %s", try.what, said)
	}
	if err := h.step.Close(ctx); err != nil {
		return err
	}
	p.live = nil
	if err := h.works(ctx); err == nil {
		return errors.New("the login works after its step was closed")
	}
	p.note("step_closed", "planner closed the step: the login is gone")
	return nil
}

func (p *play) delegate(ctx context.Context) (err error) {
	p.scene("3  Passing on less")
	share := agent.Share{Rights: []agent.Right{{Tool: "tls.call", Use: true, Args: map[string]agent.Constraint{"name": agent.OneOf("writer.agents.pawl.dev")}}}}
	if p.env.Postgres != nil {
		share.Rights = append(share.Rights, agent.Right{Tool: "db.read", Use: true, Args: map[string]agent.Constraint{"tables": agent.Subset("orders")}})
	}
	if p.passed, err = p.root.Delegate(ctx, dev.Agent("writer").String(), share); err != nil {
		return err
	}
	if p.part, err = p.writer.Join(ctx, p.passed); err != nil {
		return err
	}
	p.note("delegated", "planner passed less on to writer, whose SPIFFE ID is %s", dev.Agent("writer"))
	tool, args := "tls.call", agent.Args{"name": "planner.agents.pawl.dev"}
	if p.env.Postgres != nil {
		tool, args = "db.read", agent.Args{"tables": []string{"customers"}}
	}
	_, err = p.part.Begin(ctx, agent.Call{Tool: tool, Args: args})
	return p.mustRefuse("wider_refused", "writer asked for more than it was given", err, agent.ErrDenied)
}

func (p *play) replay(ctx context.Context) error {
	p.scene("4  A delegation is worth nothing to anybody else")
	_, err := p.stranger.Join(ctx, p.passed)
	return p.mustRefuse("replay_refused", "stranger presented writer's delegation", err, agent.ErrNotFound)
}

// mustRefuse notes a refusal of the wanted kind; anything else is an error.
func (p *play) mustRefuse(name, what string, err, want error) error {
	var refusal *agent.Error
	if !errors.Is(err, want) || !errors.As(err, &refusal) {
		return fmt.Errorf("%s: got %v, want %v", what, err, want)
	}
	p.note(name, "%s: refused (%s)", what, refusal.Code)
	return nil
}

// violate holds ten secrets and then asks for what policy forbids with revoke-chain.
func (p *play) violate(ctx context.Context) error {
	p.scene("5  Ten secrets are live when one agent breaks policy")
	if err := p.holdTen(ctx); err != nil {
		return err
	}
	var heard sync.WaitGroup
	hearing := map[string]context.Context{"planner": p.root.Context(), "writer": p.part.Context()}
	asked := time.Now()
	for _, ctx := range hearing {
		heard.Go(func() {
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
		return fmt.Errorf("the forbidden tool was answered with %v", err)
	}
	p.note("violation", "writer asked for %s, which policy forbids with revoke-chain (%s): refused and fenced in %.1f ms", tool, refusal.Policies[0], fenced)
	dead, alive := p.untilDead(ctx, asked)
	secrets := len(p.live)
	e := p.note("revoked", "every one of the %d secrets was refused by its backend %.0f ms after the violation", secrets, dead)
	e.FencedMS, e.DeadMS, e.Secrets, e.AliveAfter = &fenced, &dead, &secrets, &alive
	if p.session != nil && p.session.cut(ctx) {
		p.note("session_cut", "the session that was open was cut: its cursor gives nothing more")
	}
	heard.Wait()
	for name, ctx := range hearing {
		if !errors.Is(context.Cause(ctx), agent.ErrRevoked) {
			return fmt.Errorf("%s did not hear of the revocation: %w", name, context.Cause(ctx))
		}
	}
	p.note("agents_heard", "planner's and writer's SDKs heard it and ended the contexts of their steps")
	return p.askAgain(ctx)
}

// askAgain has both agents ask for another step. Their SDKs have heard of the revocation and would
// refuse by themselves; these requests go to the broker, over connections of their own.
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
			return fmt.Errorf("%s asked again and was answered with %v", name, err)
		}
	}
	p.note("asked_again", "both asked again, past their SDKs: the broker refused, nothing more is handed out under this chain")
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
