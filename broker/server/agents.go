package server

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/args"
)

const violations = "/v1/violations"

func (s *Server) agentRoutes() []route {
	return append(slices.Concat(s.commonRoutes(func(*exchange) bool { return false }), s.signalRoutes(), s.introspectRoute(), s.statusListRoute()),
		route{"POST", "/v1/chains", nil, forAgent(s, whileIssuing(s, s.openChain))},
		route{"GET", "/v1/delegations/{id}", nil, forAgent(s, s.standing)},
		route{"POST", "/v1/delegations/{id}/delegate", nil, forAgent(s, whileIssuing(s, s.delegate))},
		route{"POST", "/v1/delegations/{id}/steps", nil, forAgent(s, whileIssuing(s, s.step))},
		route{"GET", "/v1/delegations/{id}/events", nil, s.standingEvents},
		route{"POST", "/v1/delegations/{id}/heartbeat", nil, forEnding(s, s.heartbeat)},
		route{"POST", "/v1/delegations/{id}/acknowledge", nil, forEnding(s, s.acknowledge)},
		route{"POST", "/v1/grants/{id}/collect", nil, forAgent(s, s.collect)},
		route{"POST", "/v1/grants/{id}/close", nil, forEnding(s, s.closeGrant)},
		route{"GET", "/v1/grants/{id}/hold", nil, s.hold},
		route{"POST", violations, nil, forAgent(s, s.report)},
	)
}

// whileIssuing refuses a call that would give out authority while the broker gives out none.
func whileIssuing[In any](
	s *Server, call func(*exchange, broker.Caller, In) (answer, error),
) func(*exchange, broker.Caller, In) (answer, error) {
	return func(x *exchange, c broker.Caller, in In) (answer, error) {
		leave, err := s.cfg.Issuing()
		if err != nil {
			return answer{}, err
		}
		x.done = leave
		return call(x, c, in)
	}
}

// commonRoutes are on both listeners and require no identity. known authenticates an operator.
func (s *Server) commonRoutes(known func(*exchange) bool) []route {
	return []route{
		{"GET", "/v1/openapi.json", nil, func(x *exchange) error {
			x.w.Header().Set("Content-Type", "application/json")
			return x.write(http.StatusOK, api.OpenAPI)
		}},
		{"GET", "/livez", nil, s.health(known, false)},
		{"GET", "/readyz", nil, s.health(known, true)},
		{"GET", "/healthz", nil, s.health(known, true)},
	}
}

// health answers a probe. A broker that cannot issue still fences and revokes: it lives, and is not ready. The texts of
// conditions name policies and addresses, so that only an operator gets them.
func (s *Server) health(known func(*exchange) bool, readiness bool) endpoint {
	return func(x *exchange) error {
		found := s.cfg.Conditions()
		detailed := len(found) > 0 && known(x)
		var list []api.Condition
		var blocking []error
		for _, c := range found {
			wire := api.Condition{Part: c.Part, Code: api.Code(c.Code), Blocks: c.Blocks}
			if detailed {
				wire.Detail = c.Text
			}
			list = append(list, wire)
			if c.Blocks {
				blocking = append(blocking, errors.New(c.Text))
			}
		}
		if readiness && len(blocking) > 0 {
			p := api.NewProblem(api.KindUnavailable, api.Code(broker.CodeIssuingStopped), "").Because(errors.Join(blocking...))
			p.Conditions = list
			return p
		}
		return reply(s, x, func(none) (answer, error) {
			return answer{status: http.StatusOK, body: api.Health{Status: "ok", Conditions: list}}, nil
		})
	}
}

func (s *Server) openChain(x *exchange, c broker.Caller, in api.OpenRequest) (answer, error) {
	rights, err := rightsOf(in.Rights)
	if err != nil {
		return answer{}, err
	}
	ttl, err := seconds("ttl_seconds", in.TTLSeconds)
	if err != nil {
		return answer{}, err
	}
	beat, err := seconds("heartbeat_seconds", in.HeartbeatSeconds)
	if err != nil {
		return answer{}, err
	}
	d, err := s.cfg.Broker.Open(x.Context(), c, broker.OpenRequest{
		Task: in.Task, Rights: rights, Budget: budgetOf(in.Budget), Depth: in.Depth, TTL: ttl, Labels: in.Labels,
		Heartbeat: beat, Envelope: in.Envelope,
	})
	x.note(slog.String("chain", string(d.Chain)), slog.String("delegation", string(d.ID)))
	return answer{status: http.StatusCreated, body: wireDelegation(d)}, err
}

func (s *Server) delegate(x *exchange, c broker.Caller, in api.DelegateRequest) (answer, error) {
	from, err := pathID(x, "delegation", broker.ParseDelegationID)
	if err != nil {
		return answer{}, err
	}
	to, err := receiver(in.To)
	if err != nil {
		return answer{}, err
	}
	rights, err := rightsOf(in.Rights)
	if err != nil {
		return answer{}, err
	}
	ttl, err := seconds("ttl_seconds", in.TTLSeconds)
	if err != nil {
		return answer{}, err
	}
	beat, err := seconds("heartbeat_seconds", in.HeartbeatSeconds)
	if err != nil {
		return answer{}, err
	}
	d, err := s.cfg.Broker.Delegate(x.Context(), c, broker.DelegateRequest{
		From: from, To: to, Rights: rights, Budget: budgetOf(in.Budget), Depth: in.Depth, TTL: ttl, Heartbeat: beat,
	})
	x.note(slog.String("chain", string(d.Chain)), slog.String("child", string(d.ID)), slog.String("to", to.String()))
	return answer{status: http.StatusCreated, body: wireDelegation(d)}, err
}

// maxSPIFFEID is the limit of the SPIFFE standard in bytes. go-spiffe does not enforce it.
const maxSPIFFEID = 2048

func receiver(s string) (spiffeid.ID, error) {
	if len(s) > maxSPIFFEID {
		return spiffeid.ID{}, malformed("to is longer than %d bytes", maxSPIFFEID)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, malformed("to is not a SPIFFE ID")
	}
	return id, nil
}

func (s *Server) standing(x *exchange, c broker.Caller, _ none) (answer, error) {
	id, err := pathID(x, "delegation", broker.ParseDelegationID)
	if err != nil {
		return answer{}, err
	}
	st, err := s.cfg.Broker.Status(x.Context(), c, id)
	d := wireDelegation(st.Delegation)
	return answer{status: http.StatusOK, body: api.Standing{Delegation: &d, Fence: wireFence(st.Fence), Ended: texts(st.Ended)}}, err
}

func (s *Server) heartbeat(x *exchange, c broker.Caller, _ api.Nothing) (answer, error) {
	id, err := pathID(x, "delegation", broker.ParseDelegationID)
	if err != nil {
		return answer{}, err
	}
	return answer{status: http.StatusOK, body: api.Nothing{}}, s.cfg.Broker.Heartbeat(x.Context(), c, id)
}

func (s *Server) acknowledge(x *exchange, c broker.Caller, in api.AcknowledgeRequest) (answer, error) {
	id, err := pathID(x, "delegation", broker.ParseDelegationID)
	if err != nil {
		return answer{}, err
	}
	rv, err := broker.ParseRevocationID(in.Revocation)
	if err != nil {
		return answer{}, malformed("%v", err)
	}
	x.note(slog.String("revocation", in.Revocation))
	return answer{status: http.StatusOK, body: api.Nothing{}}, s.cfg.Broker.Acknowledge(x.Context(), c, id, rv)
}

// step is the only place where a secret is encoded. The secret is wiped when the answer has been sent.
func (s *Server) step(x *exchange, c broker.Caller, in api.StepRequest) (answer, error) {
	r, err := stepRequest(x, in)
	if err != nil {
		return answer{}, err
	}
	issued, err := s.cfg.Broker.Issue(x.Context(), c, r)
	if err != nil {
		return answer{}, err
	}
	g := issued.Grant
	x.note(slog.String("chain", string(g.Chain)), slog.String("grant", string(g.ID)),
		slog.String("decision", "allow"), slog.Any("policies", g.Policies))
	out := api.Issued{Grant: wireGrant(g), Repeated: issued.Repeated}
	if issued.Repeated {
		return answer{status: http.StatusOK, body: out}, nil
	}
	if r.Seal == nil {
		out.Secret = jsontext.Value(issued.Secret.Reveal())
	}
	return answer{status: http.StatusCreated, body: out, sent: func(err error) {
		issued.Secret.Wipe()
		if err != nil { // not delivered, so no agent will close it
			s.abandon(x.Context(), c, g.ID)
		}
	}}, nil
}

func stepRequest(x *exchange, in api.StepRequest) (r broker.StepRequest, err error) {
	if r.Delegation, err = pathID(x, "delegation", broker.ParseDelegationID); err != nil {
		return r, err
	}
	if r.Tool, err = broker.ParseToolName(in.Tool); err != nil {
		return r, malformed("%v", err)
	}
	x.note(slog.String("tool", string(r.Tool)))
	if in.Args != nil {
		if r.Args, err = args.Parse(in.Args); err != nil {
			return r, malformed("%v", err)
		}
	}
	if keys := x.Header.Values(api.IdempotencyKey); len(keys) > 0 {
		if len(keys) > 1 || keys[0] == "" {
			return r, malformed("the header %s must be given once and not be empty", api.IdempotencyKey)
		}
		r.Key = keys[0]
	}
	if in.Seal != nil {
		if r.Seal, err = sealOf(*in.Seal); err != nil {
			return r, err
		}
		x.note(slog.String("sealed", r.Seal.Thumbprint))
	}
	r.Purpose, r.Held = in.Purpose, in.Held
	r.TTL, err = seconds("ttl_seconds", in.TTLSeconds)
	return r, err
}

// abandon closes a grant with an undelivered secret. It waits for the record, not for the proof.
func (s *Server) abandon(ctx context.Context, c broker.Caller, id broker.GrantID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if _, err := s.cfg.Broker.Close(ctx, c, id); err != nil {
		s.cfg.Log.Warn("closing an undelivered grant", "grant", string(id), "error", err.Error())
	}
}

// closeWait is how long closing a step waits for the proof.
const closeWait = 5 * time.Second

func (s *Server) closeGrant(x *exchange, c broker.Caller, _ api.Nothing) (answer, error) {
	id, err := pathID(x, "grant", broker.ParseGrantID)
	if err != nil {
		return answer{}, err
	}
	ctx, cancel := context.WithTimeout(x.Context(), closeWait)
	defer cancel()
	g, err := s.cfg.Broker.Close(ctx, c, id)
	return answer{status: http.StatusOK, body: wireGrant(g)}, err
}

func (s *Server) report(x *exchange, c broker.Caller, in api.ReportRequest) (answer, error) {
	r := broker.ReportRequest{Violation: broker.ViolationCode(in.Violation), Detail: in.Detail}
	var err error
	if r.Delegation, err = broker.ParseDelegationID(in.Delegation); err != nil {
		return answer{}, malformed("%v", err)
	}
	if in.Grant != "" {
		if r.Grant, err = broker.ParseGrantID(in.Grant); err != nil {
			return answer{}, malformed("%v", err)
		}
	}
	x.note(slog.String("delegation", in.Delegation), slog.String("grant", in.Grant))
	rep, err := s.cfg.Broker.Report(x.Context(), c, r)
	x.note(slog.String("revocation", string(rep.Revocation)))
	return answer{status: http.StatusOK, body: api.Reported{Consequence: rep.Consequence.String(), Revocation: string(rep.Revocation)}}, err
}

// standingEvents streams the status of a delegation until the delegation ends or the caller's SVID expires.
func (s *Server) standingEvents(x *exchange) error {
	if err := checkType[none](x); err != nil {
		return err
	}
	c, err := s.identify(x, s.acts)
	if err != nil {
		return err
	}
	id, err := pathID(x, "delegation", broker.ParseDelegationID)
	if err != nil {
		return err
	}
	var first broker.Status
	if err := apart(func() (err error) { first, err = s.cfg.Broker.Status(x.Context(), c, id); return err }); err != nil {
		return err
	}
	d := first.Delegation
	x.note(slog.String("chain", string(d.Chain)))
	return s.follow(x, feed{
		holder: c.ID.String(), most: s.cfg.Limits.Streams, event: api.EventStanding, until: c.NotAfter, apart: true,
		watch: func() (<-chan struct{}, func()) { return s.cfg.Broker.WatchFences(d.Chain) },
		read: func(ctx context.Context) (any, bool, error) {
			if !s.cfg.Now().Before(d.Expires) {
				return nil, true, broker.Errorf(broker.Expired, "standing", "the delegation has expired").With(broker.CodeExpired)
			}
			st, err := s.cfg.Broker.Peek(ctx, c, id)
			return api.Standing{Fence: wireFence(st.Fence), Ended: texts(st.Ended)}, st.Fence != nil && !st.Fence.Frozen, err
		},
	})
}
