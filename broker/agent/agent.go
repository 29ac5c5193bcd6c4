// Package agent is the SDK for agents: open a chain or join one, pass less of it on, and take
// steps, each with a secret of its own that lives until the step is closed.
//
//	d, err := client.Open(ctx, agent.Chain{Task: "weekly report", Rights: []agent.Right{{Tool: "postgres", Use: true}}})
//	…
//	call := agent.Call{Tool: "postgres", Args: agent.Args{"table": "orders"}}
//	err = d.Step(ctx, call, func(ctx context.Context, s *agent.Secret) error {
//		return query(ctx, s.Field("username"), s.Field("password"))
//	})
//
// A planner can have a secret go to a worker without seeing it. The worker makes the key, the
// planner takes the step, and the worker collects, once:
//
//	key, err := agent.NewSealKey() // the worker, whose key.Public() goes to the planner
//	…
//	step, err := d.Begin(ctx, agent.Call{Tool: "postgres", Args: args, Seal: &agent.Seal{Key: public, Collector: worker}})
//	… // step.Grant().ID goes to the worker
//	secret, err := client.Collect(ctx, grant, key)
//
// When the broker revokes, the context of every running step under the delegation ends with
// the cause [ErrRevoked], and the broker is told that this was heard. Errors are of the broker's kinds: errors.Is(err, agent.ErrDenied);
// errors.As to *[Error] gives the code and what to do. Nothing is retried and nothing logged.
package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
)

// The kinds of errors, as targets of errors.Is.
const (
	ErrMalformed       = api.KindMalformed       // the request cannot mean anything
	ErrUnauthenticated = api.KindUnauthenticated // the broker does not accept the identity
	ErrDenied          = api.KindDenied          // policy, scope or budget says no
	ErrNotFound        = api.KindNotFound        // does not exist, or is not yours
	ErrRevoked         = api.KindRevoked         // fenced: stop
	ErrExpired         = api.KindExpired         // its time is over
	ErrConflict        = api.KindConflict        // the state moved, or the key was used before
	ErrUnavailable     = api.KindUnavailable     // no answer, or a part that is needed cannot answer
	ErrInternal        = api.KindInternal        // the broker failed
)

// Error is the one type of the broker's refusals and of lost answers. See [api.Problem].
type Error = api.Problem

// Budget limits how much may happen under a delegation. See [api.Budget].
type Budget = api.Budget

// Args are the arguments of a step: strings, integers, booleans and lists of strings.
type Args map[string]any

// Source gives the agent's SVID and the trust bundles; a *workloadapi.X509Source is one.
type Source = client.Source

// Config says where the broker is and who the agent is. Beside Address it has exactly one of
// Source, TLS and HTTPClient; a unix socket needs none.
type Config struct {
	Address    string       // "https://host:port", or "unix:/path" of a socket; required
	Source     Source       // the agent's identity, followed through its rotations; needs ServerID
	ServerID   spiffeid.ID  // the broker's identity; required with Source, and only with it
	TLS        *tls.Config  // for whoever does not use Source
	HTTPClient *http.Client // used as it is, http:// included

	// FailClosed ends the contexts of running steps with ErrUnavailable when the broker was not
	// heard of for so long, since a revocation could not be heard of either. The broker speaks
	// every 15 s. Zero: a lost stream is opened again and steps go on meanwhile; their secrets
	// still end with their time.
	FailClosed time.Duration
}

// Client speaks to one broker as one agent. Make one with [New]; it is safe for concurrent use.
type Client struct {
	http       *client.Client
	failClosed time.Duration
	source     io.Closer       // the identity that FromEnvironment opened; nil: the caller's own
	ctx        context.Context // ends with Close: the life of what runs in the background
	stop       context.CancelFunc

	mu   sync.Mutex     // guards adding to work, which must not happen after Close
	work sync.WaitGroup // what runs in the background
}

// New validates cfg. It opens no connection.
func New(cfg Config) (*Client, error) {
	h, err := client.New(client.Config{Address: cfg.Address, Source: cfg.Source, ServerID: cfg.ServerID, TLS: cfg.TLS, HTTP: cfg.HTTPClient})
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	c := &Client{http: h, failClosed: cfg.FailClosed}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c, nil
}

// Close stops listening for revocations, ends the contexts of running steps with the cause
// context.Canceled and returns when nothing of the client runs any more. Secrets that were not
// closed end with their time.
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

// background runs f unless the client is closed; Close waits for it.
func (c *Client) background(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() == nil {
		c.work.Go(f)
	}
}

// Chain asks for a new chain.
type Chain struct {
	Task   string            // what it is for, in the words of whoever gave the task; 1 to 256 bytes
	Rights []Right           // what may happen under it
	Budget Budget            // over the whole chain; zero: no limits
	Depth  int               // how many times it may be passed on, 0 to 8
	TTL    time.Duration     // its life, in whole seconds; zero: one hour
	Labels map[string]string // for policies and selectors

	// Heartbeat is how often the agent promises to be heard, in whole seconds; zero: no promise. The
	// client keeps it until Leave or Close. When it is broken, policy says what follows.
	Heartbeat time.Duration
}

// Open opens a chain whose root the agent holds. It blocks for one request.
func (c *Client) Open(ctx context.Context, ch Chain) (*Delegation, error) {
	info, err := c.open(ctx, ch)
	if err != nil {
		return nil, fmt.Errorf("opening a chain: %w", err)
	}
	return c.inUse(info), nil
}

func (c *Client) open(ctx context.Context, ch Chain) (Info, error) {
	rights, err := wireRights(ch.Rights)
	if err != nil {
		return Info{}, err
	}
	in := api.OpenRequest{
		Task: ch.Task, Rights: rights, Budget: ch.Budget, Depth: ch.Depth, TTLSeconds: seconds(ch.TTL),
		Labels: ch.Labels, HeartbeatSeconds: seconds(ch.Heartbeat),
	}
	var out api.Delegation
	if err := c.http.Call(ctx, http.MethodPost, "/v1/chains", nil, in, &out); err != nil {
		return Info{}, err
	}
	return infoOf(out)
}

// Join takes up a delegation that was passed on to the agent, by the id that Delegate gave to
// whoever passed it on. It blocks for one request; one that is fenced is refused with ErrRevoked.
func (c *Client) Join(ctx context.Context, id DelegationID) (*Delegation, error) {
	info, err := c.join(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("joining a delegation: %w", err)
	}
	return c.inUse(info), nil
}

func (c *Client) join(ctx context.Context, id DelegationID) (Info, error) {
	var st api.Standing
	if err := c.http.Call(ctx, http.MethodGet, "/v1/delegations/"+segment(id), nil, nil, &st); err != nil {
		return Info{}, err
	}
	if st.Delegation == nil {
		return Info{}, api.NewProblem(ErrUnavailable, api.CodeNoAnswer, "the answer has no delegation")
	}
	if st.Fence != nil && !st.Fence.Frozen {
		return Info{}, revoked(st.Fence.Revocation)
	}
	return infoOf(*st.Delegation)
}

// EndGrant ends a step by its grant's id, such as one that a *[Repeated] names. It blocks until
// the secret is dead or the broker has waited long enough for that.
func (c *Client) EndGrant(ctx context.Context, id GrantID) (Grant, error) {
	var out api.Grant
	if err := c.http.Call(ctx, http.MethodPost, "/v1/grants/"+segment(id)+"/close", nil, api.Nothing{}, &out); err != nil {
		return Grant{}, fmt.Errorf("closing a step: %w", err)
	}
	g, err := grantOf(out)
	if err != nil {
		return Grant{}, fmt.Errorf("closing a step: %w", err)
	}
	return g, nil
}
