package server

import (
	"fmt"
	"time"
)

// Routes lists "METHOD path" for every endpoint of a listener.
func (s *Server) Routes(listener string) (all []string) {
	routes := s.agentRoutes()
	if listener == "operators" {
		routes = s.operatorRoutes()
	}
	for _, r := range routes {
		all = append(all, r.method+" "+r.path)
	}
	return all
}

// ParseSealKey parses the key of a seal.
var ParseSealKey = parseSealKey

// Arriving returns the number of request bodies that are arriving.
func (s *Server) Arriving() int {
	s.bodies.mu.Lock()
	defer s.bodies.mu.Unlock()
	return s.bodies.arriving.Len()
}

// RememberedCallers returns how many callers are remembered after a request of each of n callers.
func RememberedCallers(n int) int {
	r := newRates(LimitRequests, 1)
	for i := range n {
		r.take(fmt.Sprint(i), time.Unix(int64(i), 0))
	}
	return len(r.byCaller)
}

// Apart runs a function beside its request.
var Apart = apart
