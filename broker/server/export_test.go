package server

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
