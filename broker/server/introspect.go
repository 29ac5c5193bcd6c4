package server

import (
	"context"
	"net/http"
	"net/url"

	"github.com/pawlsec/pawl/broker/api"
)

// Introspect checks whether a token is active. An unknown token, or one of another issuer, is not active. An error
// means that the check itself failed.
type Introspect func(ctx context.Context, token string) (api.Introspection, error)

// StatusList returns the signed status list of a backend (draft-ietf-oauth-status-list), or nil if it has none.
// Requests need no identity, so it must cost little.
type StatusList func(backend string) ([]byte, error)

// statusListRoute serves verifiers, who need no identity. The list is signed and does not disclose the owner of a
// token.
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

// introspectRoute serves the services that accept tokens (RFC 7662). The standard makes its request a form, so it
// does not go through forAgent.
func (s *Server) introspectRoute() []route {
	if s.cfg.Introspect == nil {
		return nil
	}
	return []route{{"POST", "/v1/introspect", nil, func(x *exchange) error {
		if given := x.Header.Values("Content-Type"); len(given) != 1 || given[0] != api.FormType {
			return api.NewProblem(api.KindMalformed, api.CodeMediaType, "the Content-Type must be "+api.FormType)
		}
		caller, err := s.identify(x, s.introspections)
		if err != nil {
			return err
		}
		token, err := s.formToken(x)
		if err != nil {
			return err
		}
		return reply(s, x, func(none) (answer, error) {
			result, err := s.cfg.Introspect(x.Context(), token)
			if !result.Active {
				s.cfg.Broker.Present(x.Context(), caller, token)
			}
			return answer{status: http.StatusOK, body: result}, err
		})
	}}}
}

// formToken reads the one token of a form. Other members, such as the hint, are ignored.
func (s *Server) formToken(x *exchange) (string, error) {
	body, err := s.body(x, api.MaxBody)
	if err != nil {
		return "", err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil || len(form["token"]) != 1 || form.Get("token") == "" {
		return "", malformed("the form must have one token")
	}
	return form.Get("token"), nil
}
