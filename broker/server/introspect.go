package server

import (
	"context"
	"net/http"
	"net/url"

	"github.com/pawlsec/pawl/broker/api"
)

// Introspect tells whether a token is good still. A token that is not ours, or of which nothing is
// known, is not active; an error says that nobody could find out.
type Introspect func(ctx context.Context, token string) (api.Introspection, error)

// StatusList gives the signed status list of a backend (draft-ietf-oauth-status-list), nil when it
// has none. It is asked by anybody, so it must cost little.
type StatusList func(backend string) ([]byte, error)

// statusListRoute is for verifiers, who need no identity: the list is signed, and says nothing of
// whose a token is.
func (s *Server) statusListRoute() []route {
	if s.cfg.StatusList == nil {
		return nil
	}
	return []route{{"GET", "/v1/status-lists/{backend}", nil, func(x *exchange) error {
		list, err := s.cfg.StatusList(x.PathValue("backend"))
		if err != nil {
			return err
		}
		if list == nil {
			return api.NewProblem(api.KindNotFound, api.CodeNoEndpoint, "")
		}
		x.w.Header().Set("Content-Type", api.StatusListType)
		return x.write(http.StatusOK, list)
	}}}
}

// introspectRoute is where the services that take tokens ask (RFC 7662). Its request is a form, as
// the standard has it, so it does not go through forAgent.
func (s *Server) introspectRoute() []route {
	if s.cfg.Introspect == nil {
		return nil
	}
	return []route{{"POST", "/v1/introspect", nil, func(x *exchange) error {
		if given := x.Header.Values("Content-Type"); len(given) != 1 || given[0] != api.FormType {
			return api.NewProblem(api.KindMalformed, api.CodeMediaType, "the Content-Type must be "+api.FormType)
		}
		caller, err := s.identify(x)
		if err != nil {
			return err
		}
		token, err := formToken(x)
		if err != nil {
			return err
		}
		return reply(x, func(none) (answer, error) {
			said, err := s.cfg.Introspect(x.Context(), token)
			if !said.Active {
				s.cfg.Broker.Present(x.Context(), caller, token)
			}
			return answer{status: http.StatusOK, body: said}, err
		})
	}}}
}

// formToken reads the one member that a form may have beside its hint.
func formToken(x *exchange) (string, error) {
	body, err := x.body()
	if err != nil {
		return "", err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil || len(form["token"]) != 1 || form.Get("token") == "" {
		return "", malformed("the form must have one token")
	}
	return form.Get("token"), nil
}
