package server

import (
	"context"
	"net/http"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
)

// Notary signs the contents of the ledger, for readers who do not trust the broker. Errors as for [Broker].
type Notary interface {
	// Report returns the signed report of a revocation, as a compact JWS.
	Report(context.Context, broker.RevocationID) ([]byte, error)
	// Checkpoint returns a signed checkpoint of the audit log, as a note.
	Checkpoint(context.Context) ([]byte, error)
}

// unsigned is the Notary of a broker without a signing key.
type unsigned struct{}

func (unsigned) Report(context.Context, broker.RevocationID) ([]byte, error) { return nil, noKey() }
func (unsigned) Checkpoint(context.Context) ([]byte, error)                  { return nil, noKey() }

func noKey() error {
	return api.NewProblem(api.KindUnavailable, api.CodeNoSigningKey, "this broker has no signing key")
}

func (s *Server) notaryRoutes() []route {
	return []route{
		{"GET", "/v1/revocations/{id}/report", nil, s.signed(api.ReportType, func(x *exchange) ([]byte, error) {
			id, err := pathID(x, "revocation", broker.ParseRevocationID)
			if err != nil {
				return nil, err
			}
			return s.cfg.Notary.Report(x.Context(), id)
		})},
		{"GET", "/v1/audit/checkpoint", nil, s.signed(api.CheckpointType, func(x *exchange) ([]byte, error) {
			return s.cfg.Notary.Checkpoint(x.Context())
		})},
	}
}

// signed builds an operators' endpoint that answers with signed bytes instead of JSON.
func (s *Server) signed(mediaType string, call func(*exchange) ([]byte, error)) endpoint {
	return func(x *exchange) error {
		if err := checkType[none](x); err != nil {
			return err
		}
		o, err := s.operator(x)
		if err != nil {
			return err
		}
		end, err := s.beginRead(o)
		if err != nil {
			return err
		}
		defer end()
		body, err := call(x)
		if err != nil {
			return err
		}
		x.w.Header().Set("Content-Type", mediaType)
		return x.write(http.StatusOK, body)
	}
}
