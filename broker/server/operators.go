package server

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/selector"
)

func (s *Server) operatorRoutes() []route {
	page := []string{"after", "limit"}
	routes := append(s.commonRoutes(func(x *exchange) bool { _, err := s.operator(x); return err == nil }),
		route{"GET", "/v1/chains", []string{"all", "after", "limit"}, forOperator(s, s.chains)},
		route{"GET", "/v1/chains/{id}", page, forOperator(s, s.chain)},
		route{"GET", "/v1/chains/{id}/audit", page, forOperator(s, s.chainAudit)},
		route{"POST", "/v1/plans", nil, forOperator(s, s.plan)},
		route{"POST", "/v1/revocations", nil, forOperator(s, s.revoke)},
		route{"GET", "/v1/revocations", page, forOperator(s, s.revocations)},
		route{"GET", "/v1/revocations/{id}", nil, forOperator(s, s.revocation)},
		route{"GET", "/v1/revocations/{id}/events", nil, s.revocationEvents},
		route{"POST", "/v1/revocations/{id}/unfreeze", nil, forOperator(s, s.unfreeze)},
		route{"POST", "/v1/canaries", nil, forOperator(s, s.plant)},
		route{"GET", "/v1/canaries", page, forOperator(s, s.canaries)},
		route{"POST", "/v1/canaries/{id}/pull", nil, forOperator(s, s.pull)},
		route{"GET", "/v1/audit", page, forOperator(s, s.audit)},
	)
	routes = append(routes, s.notaryRoutes()...)
	if s.cfg.Metrics != nil {
		routes = append(routes, route{"GET", "/metrics", nil, func(x *exchange) error {
			o, err := s.operator(x)
			if err != nil {
				return err
			}
			end, err := s.beginRead(o)
			if err != nil {
				return err
			}
			defer end()
			s.cfg.Metrics.ServeHTTP(x.w, x.Request)
			return nil
		}})
	}
	return routes
}

func (s *Server) chains(x *exchange, _ broker.Operator, _ none) (answer, error) {
	all := false
	switch x.URL.Query().Get("all") {
	case "true":
		all = true
	case "", "false":
	default:
		return answer{}, malformed("all must be true or false")
	}
	p, err := pageAfter(x, checked(broker.ParseChainID))
	if err != nil {
		return answer{}, err
	}
	list, next, err := s.cfg.Broker.Chains(x.Context(), all, p)
	return answer{status: http.StatusOK, body: api.Chains{Chains: each(list, wireSummary), Next: next}}, err
}

func (s *Server) chain(x *exchange, _ broker.Operator, _ none) (answer, error) {
	id, err := pathID(x, "chain", broker.ParseChainID)
	if err != nil {
		return answer{}, err
	}
	p, err := pageAfter(x, checked(broker.ParseDelegationID), checked(broker.ParseGrantID))
	if err != nil {
		return answer{}, err
	}
	v, err := s.cfg.Broker.Chain(x.Context(), id, p)
	return answer{status: http.StatusOK, body: api.ChainView{
		Chain: wireChain(v.Chain), Delegations: each(v.Delegations, wireDelegation), Grants: each(v.Grants, wireRecord),
		Next: v.Next,
	}}, err
}

func (s *Server) plan(x *exchange, o broker.Operator, in api.PlanRequest) (answer, error) {
	sel, err := selector.Parse(in.Selector)
	if err != nil {
		return answer{}, malformed("%v", err)
	}
	p, err := s.cfg.Broker.Plan(x.Context(), o, sel)
	return answer{status: http.StatusOK, body: wirePlan(p)}, err
}

// revoke answers once nothing more is handed out. Proving that all is dead takes longer, so the status is 202.
func (s *Server) revoke(x *exchange, o broker.Operator, in api.RevokeRequest) (answer, error) {
	sel, err := selector.Parse(in.Selector)
	if err != nil {
		return answer{}, malformed("%v", err)
	}
	rv, err := s.cfg.Broker.Revoke(x.Context(), o, selector.Request{
		Selector: sel, Reason: in.Reason, Plan: in.Plan, IncludeNew: in.IncludeNew, Freeze: in.Freeze,
	})
	x.note(slog.String("revocation", string(rv.ID)))
	out := wireRevocation(rv)
	if rv.Freeze {
		out.Warning = s.cfg.FreezeWarning
	}
	return answer{status: http.StatusAccepted, body: out}, err
}

func (s *Server) unfreeze(x *exchange, o broker.Operator, _ api.Nothing) (answer, error) {
	id, err := pathID(x, "revocation", broker.ParseRevocationID)
	if err != nil {
		return answer{}, err
	}
	rv, err := s.cfg.Broker.Unfreeze(x.Context(), o, id)
	if p := problemOf(err); err != nil && p.Code == api.Code(broker.CodeSecondPerson) && s.cfg.FreezeWarning != "" {
		p.Remedy = s.cfg.FreezeWarning
		err = p
	}
	return answer{status: http.StatusOK, body: wireRevocation(rv)}, err
}

func (s *Server) revocations(x *exchange, _ broker.Operator, _ none) (answer, error) {
	p, err := pageAfter(x, checked(broker.ParseRevocationID))
	if err != nil {
		return answer{}, err
	}
	list, next, err := s.cfg.Broker.Revocations(x.Context(), p)
	return answer{status: http.StatusOK, body: api.Revocations{Revocations: each(list, wireRevocation), Next: next}}, err
}

func (s *Server) revocation(x *exchange, _ broker.Operator, _ none) (answer, error) {
	id, err := pathID(x, "revocation", broker.ParseRevocationID)
	if err != nil {
		return answer{}, err
	}
	out, _, err := s.progress(x.Context(), id)
	return answer{status: http.StatusOK, body: out}, err
}

// progress returns a revocation with its acknowledgements and the grants for which it waits, and whether it is final.
func (s *Server) progress(ctx context.Context, id broker.RevocationID) (out api.Revocation, final bool, err error) {
	rv, err := s.cfg.Broker.Revocation(ctx, id)
	if err != nil {
		return out, false, err
	}
	out = wireRevocation(rv)
	if rv.Freeze { // it ends no step and severs nothing, so there is nothing to wait for
		return out, true, nil
	}
	list, err := s.cfg.Broker.Acknowledgements(ctx, id)
	if err != nil {
		return out, false, err
	}
	out.Acknowledged = wireAcknowledged(list)
	if !rv.Settled.IsZero() {
		return out, true, nil
	}
	awaited, err := s.cfg.Broker.Awaited(ctx, id)
	if len(awaited) > 0 {
		out.Waiting = &api.Waiting{Grants: each(awaited, wireAwaited)}
	}
	return out, false, err
}

// minReadInterval limits how often a stream reads a revocation while a busy broker ends many grants.
const minReadInterval = 100 * time.Millisecond

func (s *Server) revocationEvents(x *exchange) error {
	if err := checkType[none](x); err != nil {
		return err
	}
	o, err := s.operator(x)
	if err != nil {
		return err
	}
	id, err := pathID(x, "revocation", broker.ParseRevocationID)
	if err != nil {
		return err
	}
	return s.follow(x, feed{
		holder: "operator " + o.Name, most: maxOperatorStreams, event: api.EventRevocation, interval: minReadInterval,
		watch: func() (<-chan struct{}, func()) { return s.cfg.Broker.Watch("") },
		read:  func(ctx context.Context) (any, bool, error) { return s.progress(ctx, id) },
	})
}

func (s *Server) audit(x *exchange, _ broker.Operator, _ none) (answer, error) {
	after, limit, err := pageOf(x)
	if err != nil {
		return answer{}, err
	}
	list, err := s.cfg.Broker.Entries(x.Context(), after, limit)
	return entries(list, after), err
}

func (s *Server) chainAudit(x *exchange, _ broker.Operator, _ none) (answer, error) {
	id, err := pathID(x, "chain", broker.ParseChainID)
	if err != nil {
		return answer{}, err
	}
	after, limit, err := pageOf(x)
	if err != nil {
		return answer{}, err
	}
	list, err := s.cfg.Broker.ChainEntries(x.Context(), id, after, limit)
	return entries(list, after), err
}

func entries(list []broker.Entry, after broker.Revision) answer {
	next := after
	if len(list) > 0 {
		next = list[len(list)-1].Revision
	}
	return answer{status: http.StatusOK, body: api.Entries{Entries: each(list, wireEntry), Next: uint64(next)}}
}

// pageOf returns the page of the audit log that a request asks for.
func pageOf(x *exchange) (after broker.Revision, limit int, err error) {
	p, err := pageAfter(x, func(text string) error {
		n, err := strconv.ParseUint(text, 10, 63)
		after = broker.Revision(n)
		return err
	})
	return after, p.Limit, err
}

// pageAfter returns the page that a request asks for. The cursor of a list is the next of the page before.
func pageAfter(x *exchange, check ...func(after string) error) (broker.Page, error) {
	p := broker.Page{Limit: broker.DefaultPage}
	query := x.URL.Query()
	if p.After = query.Get("after"); query.Has("after") {
		takes := func(f func(string) error) bool { return f(p.After) == nil }
		if !slices.ContainsFunc(check, takes) {
			return p, malformed("after must be what the page before has in next")
		}
	}
	if text := query.Get("limit"); query.Has("limit") {
		var err error
		if p.Limit, err = strconv.Atoi(text); err != nil || p.Limit < 1 || p.Limit > broker.MaxPage {
			return p, malformed("limit must be 1 to %d", broker.MaxPage)
		}
	}
	return p, nil
}

// checked makes the check of a cursor that is an id.
func checked[T any](parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		_, err := parse(text)
		return err
	}
}
