package server

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
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
	return func(x *exchange) error {
		if err := checkType[In](x); err != nil {
			return err
		}
		c, err := s.identify(x)
		if err != nil {
			return err
		}
		return reply(x, func(in In) (answer, error) { return call(x, c, in) })
	}
}

// forOperator is forAgent for operators.
func forOperator[In any](s *Server, call func(*exchange, broker.Operator, In) (answer, error)) endpoint {
	return func(x *exchange) error {
		if err := checkType[In](x); err != nil {
			return err
		}
		o, err := s.operator(x)
		if err != nil {
			return err
		}
		return reply(x, func(in In) (answer, error) { return call(x, o, in) })
	}
}

func (s *Server) identify(x *exchange) (broker.Caller, error) {
	c, err := s.cfg.Identify(x.Request)
	if err != nil {
		return broker.Caller{}, noIdentity(err)
	}
	x.note(slog.String("caller", c.ID.String()))
	return c, nil
}

func (s *Server) operator(x *exchange) (broker.Operator, error) {
	o, err := s.cfg.Operator(x.Request)
	if err != nil {
		return broker.Operator{}, noIdentity(err)
	}
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

func reply[In any](x *exchange, call func(In) (answer, error)) error {
	var in In
	if err := decode(x, &in); err != nil {
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
func decode[In any](x *exchange, in *In) error {
	if bodiless[In]() {
		return nil
	}
	body, err := x.body()
	if err != nil {
		return err
	}
	if err := api.Decode(body, in); err != nil {
		return malformed("%v", err)
	}
	return nil
}

// body reads the whole request body, within the limits of size and time.
func (x *exchange) body() ([]byte, error) {
	control := http.NewResponseController(x.w)
	_ = control.SetReadDeadline(time.Now().Add(socketTime)) // a recorder in a test has no socket
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.Body, api.MaxBody))
	_ = control.SetReadDeadline(time.Time{})
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, api.NewProblem(api.KindMalformed, api.CodeTooLarge, "")
	case err != nil:
		return nil, malformed("the body could not be read").Because(err)
	}
	return body, nil
}
