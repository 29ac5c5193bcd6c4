package server

import (
	"net/http"
	"time"

	"github.com/pawlsec/pawl/broker/api"
)

// signalRoutes are where transmitters push security events (RFC 8935). They are known by the signature
// of what they send, so no identity is asked for; Config.Signals answers in that protocol's words.
func (s *Server) signalRoutes() []route {
	if s.cfg.Signals == nil {
		return nil
	}
	return []route{{"POST", "/v1/security-events", nil, func(x *exchange) error {
		if x.ContentLength > api.MaxSecurityEvent {
			return api.NewProblem(api.KindMalformed, api.CodeTooLarge, "")
		}
		control := http.NewResponseController(x.w)
		_ = control.SetReadDeadline(time.Now().Add(socketTime)) // a recorder in a test has no socket
		_ = control.SetWriteDeadline(time.Now().Add(2 * socketTime))
		x.Body = http.MaxBytesReader(x.w, x.Body, api.MaxSecurityEvent)
		s.cfg.Signals.ServeHTTP(x.w, x.Request)
		_ = control.SetReadDeadline(time.Time{})
		return nil
	}}}
}
