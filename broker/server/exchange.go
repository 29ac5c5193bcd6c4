package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
)

// answer is the result of a call.
type answer struct {
	status int
	body   any
	sent   func(error) // called with the result of sending; nil: not needed
}

// forAgent builds an endpoint from a call. The endpoint checks the media type and size, authenticates, decodes
// strictly, makes the call and encodes the answer. An In of none is a request without a body.
func forAgent[In any](s *Server, call func(*exchange, broker.Caller, In) (answer, error)) endpoint {
	return atRate(s, s.acts, call)
}

// forEnding is forAgent for a request that only ends something. It has a rate of its own.
func forEnding[In any](s *Server, call func(*exchange, broker.Caller, In) (answer, error)) endpoint {
	return atRate(s, s.endings, call)
}

func atRate[In any](s *Server, r *rates, call func(*exchange, broker.Caller, In) (answer, error)) endpoint {
	return func(x *exchange) error {
		if err := checkType[In](x); err != nil {
			return err
		}
		c, err := s.identify(x, r)
		if err != nil {
			return err
		}
		return reply(s, x, func(in In) (answer, error) { return call(x, c, in) })
	}
}

// forOperator is forAgent for operators. They have no rate. Their reads are bounded by number, so that a revocation
// never waits for them.
func forOperator[In any](s *Server, call func(*exchange, broker.Operator, In) (answer, error)) endpoint {
	return func(x *exchange) error {
		if err := checkType[In](x); err != nil {
			return err
		}
		o, err := s.operator(x)
		if err != nil {
			return err
		}
		if x.Method == http.MethodGet {
			leave, err := s.beginRead(o)
			if err != nil {
				return err
			}
			defer leave()
		}
		return reply(s, x, func(in In) (answer, error) { return call(x, o, in) })
	}
}

// identify authenticates an agent, and counts its request.
func (s *Server) identify(x *exchange, r *rates) (broker.Caller, error) {
	c, err := s.cfg.Identify(x.Request)
	if err != nil {
		return broker.Caller{}, noIdentity(err)
	}
	x.caller = c.ID.String()
	x.note(slog.String("caller", x.caller))
	if err := s.checkRate(x.Context(), r, x.caller); err != nil {
		return c, err
	}
	return c, s.checkShare(x, r)
}

func (s *Server) operator(x *exchange) (broker.Operator, error) {
	o, err := s.cfg.Operator(x.Request)
	if err != nil {
		return broker.Operator{}, noIdentity(err)
	}
	x.caller = "operator " + o.Name
	x.note(slog.String("operator", o.Name))
	return o, nil
}

// none is the In of a request without a body.
type none struct{}

func bodiless[In any]() bool { _, ok := any(*new(In)).(none); return ok }

// checkType requires exactly application/json for every body. A browser does not send such a request to another
// origin without a preflight.
func checkType[In any](x *exchange) error {
	given := x.Header.Values("Content-Type")
	switch {
	case bodiless[In]() && x.ContentLength != 0:
		return malformed("this request takes no body")
	case !bodiless[In]() && (len(given) != 1 || given[0] != "application/json"):
		return api.NewProblem(api.KindMalformed, api.CodeMediaType, "the Content-Type must be application/json")
	case x.ContentLength > api.MaxBody:
		return api.NewProblem(api.KindMalformed, api.CodeTooLarge, "")
	}
	return nil
}

func reply[In any](s *Server, x *exchange, call func(In) (answer, error)) error {
	var in In
	if err := decode(s, x, &in); err != nil {
		return err
	}
	a, err := call(in)
	if err != nil {
		return err
	}
	body, err := json.Marshal(a.body, json.Deterministic(true))
	switch {
	case err != nil:
		err = fmt.Errorf("encoding a %T", a.body) // the cause may quote a secret
	case x.Context().Err() != nil:
		err = x.Context().Err() // the client has disconnected. After the write it may, with the answer
	default:
		x.w.Header().Set("Content-Type", "application/json")
		err = x.write(a.status, body)
	}
	clear(body) // it may hold a secret
	if a.sent != nil {
		a.sent(err)
	}
	return err
}

// decode decodes the body into in.
func decode[In any](s *Server, x *exchange, in *In) error {
	if bodiless[In]() {
		return nil
	}
	body, err := s.body(x, api.MaxBody)
	if err != nil {
		return err
	}
	if err := api.Decode(body, in); err != nil {
		return malformed("%v", err)
	}
	return nil
}

// body reads the whole request body, within the limits of size, time and number.
func (s *Server) body(x *exchange, most int64) ([]byte, error) {
	control := http.NewResponseController(x.w)
	leave, limit := s.bodies.enter(x.caller, s.cfg.Limits.Bodies, control)
	if leave == nil {
		x.endConnection()
		return nil, s.limited(limit, api.CodeTooManyBodies, time.Second, "%d bodies of %s are arriving",
			s.cfg.Limits.Bodies, x.caller)
	}
	if limit != "" {
		s.cfg.Limits.Refused(limit)
	}
	arrived := x.withinSocketTime(control.SetReadDeadline)
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.Body, most))
	dropped := leave()
	arrived()
	if err != nil {
		x.endConnection()
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, api.NewProblem(api.KindMalformed, api.CodeTooLarge, "")
	case err != nil && (dropped || errors.Is(err, os.ErrDeadlineExceeded)):
		return nil, api.NewProblem(api.KindMalformed, api.CodeTooSlow, "").Because(err)
	case err != nil:
		return nil, malformed("the body could not be read").Because(err)
	}
	return body, nil
}

// endConnection ends a connection of HTTP/1.1 with the answer. Otherwise net/http would wait for the rest of the body
// before it answers.
func (x *exchange) endConnection() {
	if x.ProtoMajor == 1 {
		x.w.Header().Set("Connection", "close")
	}
}

// limited returns the refusal of a request that a limit refuses.
func (s *Server) limited(limit string, code api.Code, after time.Duration, format string, args ...any) error {
	s.cfg.Limits.Refused(limit)
	return api.NewProblem(api.KindOverLimit, code, fmt.Sprintf(format, args...)).After(after)
}

// beginRead counts a read of an operator. end reverses that.
func (s *Server) beginRead(o broker.Operator) (end func(), err error) {
	end, ok := s.reads.enter(o.Name, maxOperatorReads)
	if !ok {
		return nil, s.limited(LimitReads, api.CodeTooManyRequests, time.Second, "%d reads of %s are under way",
			maxOperatorReads, o.Name)
	}
	return end, nil
}

// checkRate refuses a caller that sends requests too fast.
func (s *Server) checkRate(ctx context.Context, r *rates, caller string) error {
	wait := r.take(caller, s.cfg.Now())
	if wait <= 0 {
		return nil
	}
	if leave, ok := s.held.enter(caller, maxHeld); ok {
		hold(ctx)
		leave()
	}
	return s.limited(r.name, api.CodeTooManyRequests, wait, "%s may send %d requests a second", caller, r.limit)
}

// checkShare refuses a caller that has written its share of the ledger, unless its request only reads, ends something
// or reports a violation.
func (s *Server) checkShare(x *exchange, r *rates) error {
	if r != s.acts || x.Method == http.MethodGet || x.URL.Path == violations || s.cfg.Limits.Share == nil {
		return nil
	}
	wait := s.cfg.Limits.Share(x.caller, s.cfg.Now())
	if wait <= 0 {
		return nil
	}
	return s.limited(LimitLedger, api.Code(broker.CodeLedgerShare), wait, "%s has written its share of the ledger", x.caller)
}
