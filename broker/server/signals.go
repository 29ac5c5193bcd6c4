package server

import (
	"bytes"
	"io"
	"net/http"
	"time"

	"github.com/pawlsec/pawl/broker/api"
)

// signalRoutes accepts security events that transmitters push (RFC 8935). The signature of an event authenticates it,
// so no identity is required. Config.Signals answers in the format of that protocol.
func (s *Server) signalRoutes() []route {
	if s.cfg.Signals == nil {
		return nil
	}
	return []route{{"POST", "/v1/security-events", nil, func(x *exchange) error {
		if x.ContentLength > api.MaxSecurityEvent {
			return api.NewProblem(api.KindMalformed, api.CodeTooLarge, "")
		}
		body, err := s.body(x, api.MaxSecurityEvent)
		if err != nil {
			return err
		}
		control := http.NewResponseController(x.w)
		_ = control.SetWriteDeadline(time.Now().Add(socketTime)) // a recorder in a test has no socket
		x.Body = io.NopCloser(bytes.NewReader(body))
		s.cfg.Signals.ServeHTTP(x.w, x.Request)
		return nil
	}}}
}
