// Package server is Pawl over HTTP. It authenticates the client, decodes strictly, makes one call and encodes the
// answer. One handler serves agents; another, for a separate listener, serves operators. It alone maps the broker's
// errors to problems.
package server

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// Broker has the calls that the handlers make; *broker.Broker with the Entries of its ledger implements it. Every
// method is safe for concurrent use. An error that is not a *broker.Error is answered with 500.
type Broker interface {
	Delegations
	Steps
	Watcher
	Revoker
	Revocations
	Chains
	Canaries
	Audit
}

// Delegations opens chains, delegates, and reads the status of a delegation.
type Delegations interface {
	Open(context.Context, broker.Caller, broker.OpenRequest) (broker.Delegation, error)
	Delegate(context.Context, broker.Caller, broker.DelegateRequest) (broker.Delegation, error)
	Status(context.Context, broker.Caller, broker.DelegationID) (broker.Status, error)
	Peek(context.Context, broker.Caller, broker.DelegationID) (broker.Status, error) // like Status, but does not count as a request by the holder
	Heartbeat(context.Context, broker.Caller, broker.DelegationID) error
	Acknowledge(context.Context, broker.Caller, broker.DelegationID, broker.RevocationID) error
}

// Steps issues and ends the secrets of steps. Close waits for proof as long as its context allows.
type Steps interface {
	Issue(context.Context, broker.Caller, broker.StepRequest) (broker.Issued, error)
	Close(context.Context, broker.Caller, broker.GrantID) (broker.Grant, error)
	Collect(context.Context, broker.Caller, broker.GrantID) (broker.Grant, []byte, error)
	Report(context.Context, broker.Caller, broker.ReportRequest) (broker.Reported, error)
	Hold(context.Context, broker.Caller, broker.GrantID) (release func(), err error)
}

// Watcher notifies of changes. The channel of Watch is closed, or sent on, at the next change of the chain, or of any
// chain when the id is empty. The channel of WatchFences is limited to fences that may cover the chain: one is set or
// lifted. cancel must be called.
type Watcher interface {
	Watch(broker.ChainID) (changed <-chan struct{}, cancel func())
	WatchFences(broker.ChainID) (changed <-chan struct{}, cancel func())
}

// Revoker plans and starts revocations, and lifts freezes.
type Revoker interface {
	Plan(context.Context, broker.Operator, selector.Selector) (broker.Plan, error)
	Revoke(context.Context, broker.Operator, selector.Request) (broker.Revocation, error)
	Unfreeze(context.Context, broker.Operator, broker.RevocationID) (broker.Revocation, error)
}

// Revocations reads the progress of revocations.
type Revocations interface {
	Revocation(context.Context, broker.RevocationID) (broker.Revocation, error)
	Revocations(context.Context, broker.Page) (list []broker.Revocation, next string, err error)
	Acknowledgements(context.Context, broker.RevocationID) ([]broker.Acknowledgement, error)
	Awaited(context.Context, broker.RevocationID) ([]broker.Awaited, error)
}

// Chains lists chains and reads one.
type Chains interface {
	Chains(ctx context.Context, all bool, p broker.Page) (list []broker.ChainSummary, next string, err error)
	Chain(context.Context, broker.ChainID, broker.Page) (broker.ChainView, error)
}

// Canaries plants values that no caller has a reason to use. Present receives each value that was presented as a
// token and is not one. It must not take longer for a canary's value than for any other.
type Canaries interface {
	Plant(context.Context, broker.Operator, broker.PlantRequest) (c broker.Canary, value string, err error)
	Canaries(context.Context, broker.Page) (list []broker.Canary, next string, err error)
	Pull(context.Context, broker.Operator, broker.CanaryID) (broker.Canary, error)
	Present(ctx context.Context, c broker.Caller, value string)
}

// Audit reads the log.
type Audit interface {
	Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error)
	ChainEntries(ctx context.Context, id broker.ChainID, after broker.Revision, limit int) ([]broker.Entry, error)
}

// Config configures a [Server].
type Config struct {
	Broker Broker // required

	// Identify authenticates the agent of every request to the agents' handler. Its errors are answered with 401
	// unless they have a kind. Required.
	Identify func(*http.Request) (broker.Caller, error)
	// Operator authenticates the operator of every request to the operators' handler. Errors as for Identify.
	// Required.
	Operator func(*http.Request) (broker.Operator, error)

	Notary  Notary       // signs reports and checkpoints; nil: both are refused
	Signals http.Handler // agents' POST /v1/security-events; nil: there is no such endpoint

	Introspect Introspect // agents' POST /v1/introspect; nil: there is no such endpoint
	StatusList StatusList // agents' GET /v1/status-lists/{backend}; nil: there is no such endpoint

	// FreezeWarning says that no two people can lift a freeze, with the remedy; empty: two can. It is in the answers to a
	// freeze and to a request to lift one.
	FreezeWarning string

	Log *slog.Logger     // one event for each request, never a body; nil: none
	Now func() time.Time // required
	// Conditions returns the broker's faults, for the health endpoints. One that blocks makes /readyz answer 503. Nil:
	// nothing is.
	Conditions func() []broker.Condition
	// Issuing is called before a request that gives out authority: to open a chain, to delegate, to take a step. An error
	// is the answer. leave is called once, after the answer was sent. Nil: always.
	Issuing   func() (leave func(), err error)
	Metrics   http.Handler  // operators' GET /metrics; nil: there is no such endpoint
	Heartbeat time.Duration // the longest silence on a stream; zero: 15 s
	Limits    Limits        // of one caller
}

// Server is the HTTP side of a broker. Create one with [New].
type Server struct {
	cfg    Config
	closed chan struct{} // closed by Close
	once   sync.Once     // of Close

	acts, endings, introspections *rates        // of agents
	bodies                        bodies        // that are arriving
	streams                       counted       // open ones, by holder
	turns                         chan struct{} // of streams that read apart
	held                          counted       // refusals that are held back, by caller
	reads                         counted       // of operators, under way
	limitLog                      rate.Sometimes
}

// New validates cfg and returns a server.
func New(cfg Config) (*Server, error) {
	for name, missing := range map[string]bool{
		"Broker": cfg.Broker == nil, "Identify": cfg.Identify == nil,
		"Operator": cfg.Operator == nil, "Now": cfg.Now == nil,
	} {
		if missing {
			return nil, fmt.Errorf("server: Config.%s is required", name)
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Notary == nil {
		cfg.Notary = unsigned{}
	}
	if cfg.Conditions == nil {
		cfg.Conditions = func() []broker.Condition { return nil }
	}
	if cfg.Issuing == nil {
		cfg.Issuing = func() (func(), error) { return func() {}, nil }
	}
	cfg.Heartbeat = cmp.Or(cfg.Heartbeat, 15*time.Second)
	cfg.Limits = cfg.Limits.orDefaults()
	return &Server{cfg: cfg, closed: make(chan struct{}), turns: make(chan struct{}, readsAtOnce), limitLog: rate.Sometimes{Interval: time.Second},
		acts:           newRates(LimitRequests, cfg.Limits.Requests),
		endings:        newRates(LimitRequests, cfg.Limits.Requests),
		introspections: newRates(LimitIntrospections, cfg.Limits.Introspections)}, nil
}

// Agents returns the handler of the agents' listener.
func (s *Server) Agents() http.Handler { return s.router(s.agentRoutes()) }

// Operators returns the handler of the operators' listener.
func (s *Server) Operators() http.Handler { return s.router(s.operatorRoutes()) }

// Close ends every open stream, so that http.Server.Shutdown does not wait for them. It may be called more than once.
func (s *Server) Close() { s.once.Do(func() { close(s.closed) }) }
