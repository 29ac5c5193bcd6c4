// Package agent is the Go SDK for agents. An agent opens a chain or joins one, passes a narrower part
// of it on, and takes steps. Each step has a secret of its own, which works until the step is closed.
//
//	client, err := agent.FromEnvironment(ctx)
//	…
//	rights := []agent.Right{{Tool: "postgres", Use: true}}
//	d, err := client.Open(ctx, agent.Chain{Task: "weekly report", Rights: rights})
//	…
//	call := agent.Call{Tool: "postgres", Args: agent.Args{"table": "orders"}}
//	err = d.Step(ctx, call, func(ctx context.Context, s *agent.Secret) error {
//		return query(ctx, s.Field("username"), s.Field("password"))
//	})
//
// A planner can pass a secret to a worker without seeing it. The worker makes the key, the planner
// takes the step, and the worker collects the secret, once:
//
//	key, err := agent.NewSealKey() // in the worker; key.Public() goes to the planner
//	…
//	seal := &agent.Seal{Key: public, Collector: worker}
//	step, err := d.Begin(ctx, agent.Call{Tool: "postgres", Args: args, Seal: seal})
//	… // step.Grant().ID goes to the worker
//	secret, err := client.Collect(ctx, grant, key)
//
// When the broker revokes a delegation, the context of every running step under it ends with the
// cause [ErrRevoked], and the client acknowledges the revocation to the broker. Errors have the
// broker's kinds: use errors.Is(err, agent.ErrDenied), and errors.As with an *[Error] for the code and
// the advice. The package does not retry a request of the caller, and it logs nothing.
package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
)

// Source gives the agent's SVID and the trust bundles. A *workloadapi.X509Source is one.
type Source = client.Source

// Config names the broker and the agent's identity. Besides Address it has exactly one of Source, TLS
// and HTTPClient; a unix socket needs none of them.
type Config struct {
	Address  string      // "https://host:port", or "unix:/path" of a socket; required
	Source   Source      // the agent's identity; the client follows its rotations; requires ServerID
	ServerID spiffeid.ID // the broker's identity; required with Source, and refused without it

	// ID is the SPIFFE ID, or the hint of the entry, of the agent's own SVID, where the Workload API can give this process
	// several. FromEnvironment alone reads it. Empty: PAWL_ID, and without that the only SVID.
	ID string

	TLS        *tls.Config  // for an agent without a Source
	HTTPClient *http.Client // used unchanged; an http:// address is accepted too

	// FailClosed ends the contexts of running steps with ErrUnavailable when the broker has been
	// silent for this long, because a revocation could not arrive either. The broker sends an event at
	// least every 15 s. Zero: steps continue while the client reopens a lost stream; their secrets
	// still expire on time.
	FailClosed time.Duration
}

// Client speaks to one broker as one agent. Make one with [FromEnvironment] or [New]. It is safe for
// concurrent use.
type Client struct {
	http       *client.Client
	failClosed time.Duration
	source     io.Closer       // the identity that FromEnvironment opened; nil: the caller owns it
	ctx        context.Context // ends with Close: the lifetime of the background work
	stop       context.CancelFunc

	mu   sync.Mutex     // guards additions to work: none may follow Close
	work sync.WaitGroup // the goroutines in the background
}

// New validates cfg and makes a client. It opens no connection.
func New(cfg Config) (*Client, error) {
	if cfg.ID != "" {
		return nil, errors.New("agent: Config.ID is for FromEnvironment: a Source, TLS or HTTPClient has its identity")
	}
	h, err := client.New(client.Config{
		Address: cfg.Address, Source: cfg.Source, ServerID: cfg.ServerID, TLS: cfg.TLS, HTTP: cfg.HTTPClient,
	})
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	c := &Client{http: h, failClosed: cfg.FailClosed}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c, nil
}

// Close stops watching for revocations and ends the contexts of running steps with the cause
// context.Canceled. It returns when no goroutine of the client is left. Secrets of steps that were not
// closed expire on time. Close may be repeated. The error is nil unless FromEnvironment made the
// client; then it is that of closing the identity's source.
func (c *Client) Close() error {
	c.mu.Lock()
	c.stop()
	c.mu.Unlock()
	c.work.Wait()
	c.http.Close()
	if c.source != nil {
		return c.source.Close()
	}
	return nil
}

// background runs f unless the client is closed. Close waits for f.
func (c *Client) background(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() == nil {
		c.work.Go(f)
	}
}

// Chain describes a new chain.
type Chain struct {
	Task   string            // the purpose, in the words of the person or system that gave the task; 1 to 256 bytes
	Rights []Right           // its rights
	Budget Budget            // over the whole chain; zero: no limits
	Depth  int               // how many times it may be passed on, 0 to 8
	TTL    time.Duration     // its lifetime, in whole seconds; zero: one hour
	Labels map[string]string // for selectors, and for policies as the agent's claim

	// Envelope is a signed statement about the chain, from the system that gave the task: a JWT of an issuer that the
	// policy bundle names. Empty: none.
	Envelope string

	// Heartbeat is the interval, in whole seconds, within which the agent promises to send a request;
	// zero: no promise. The client keeps the promise until Leave or Close. Policy decides the
	// consequence of a missed heartbeat.
	Heartbeat time.Duration
}

// Open opens a chain. The agent holds its root delegation. Open blocks for one request.
func (c *Client) Open(ctx context.Context, ch Chain) (*Delegation, error) {
	info, err := c.open(ctx, ch)
	if err != nil {
		return nil, fmt.Errorf("opening a chain: %w", err)
	}
	return c.hold(info), nil
}

func (c *Client) open(ctx context.Context, ch Chain) (Info, error) {
	rights, err := wireRights(ch.Rights)
	if err != nil {
		return Info{}, err
	}
	in := api.OpenRequest{
		Task: ch.Task, Rights: rights, Budget: ch.Budget, Depth: ch.Depth, TTLSeconds: seconds(ch.TTL),
		Labels: ch.Labels, HeartbeatSeconds: seconds(ch.Heartbeat), Envelope: ch.Envelope,
	}
	var out api.Delegation
	if err := c.http.Call(ctx, http.MethodPost, "/v1/chains", nil, in, &out); err != nil {
		return Info{}, err
	}
	return infoOf(out)
}

// Join takes up a delegation that was passed on to the agent. Its id is the one that Delegate returned
// to the agent that passed it on. Join blocks for one request. A delegation under a final fence is
// refused with ErrRevoked.
func (c *Client) Join(ctx context.Context, id DelegationID) (*Delegation, error) {
	info, err := c.join(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("joining a delegation: %w", err)
	}
	return c.hold(info), nil
}

func (c *Client) join(ctx context.Context, id DelegationID) (Info, error) {
	var out api.Standing
	if err := c.http.Call(ctx, http.MethodGet, "/v1/delegations/"+segment(id), nil, nil, &out); err != nil {
		return Info{}, err
	}
	if out.Delegation == nil {
		return Info{}, api.NewProblem(ErrUnavailable, api.CodeNoAnswer, "the answer has no delegation")
	}
	if out.Fence != nil && !out.Fence.Frozen {
		return Info{}, revokedError(out.Fence.Revocation)
	}
	return infoOf(*out.Delegation)
}

// EndGrant ends a step by the id of its grant, such as the one in a *[Repeated]. It blocks until the
// secret is dead or the broker has waited long enough for that.
func (c *Client) EndGrant(ctx context.Context, id GrantID) (Grant, error) {
	var out api.Grant
	err := c.http.Call(ctx, http.MethodPost, "/v1/grants/"+segment(id)+"/close", nil, api.Nothing{}, &out)
	var g Grant
	if err == nil {
		g, err = grantOf(out)
	}
	if err != nil {
		return Grant{}, fmt.Errorf("closing a step: %w", err)
	}
	return g, nil
}
