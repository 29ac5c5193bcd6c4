package server

import (
	"net/http"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
)

func (s *Server) plant(x *exchange, o broker.Operator, in api.PlantRequest) (answer, error) {
	r := broker.PlantRequest{Note: in.Note, Like: broker.CanaryKind(in.Like)}
	if in.Chain != "" {
		var err error
		if r.Chain, err = broker.ParseChainID(in.Chain); err != nil {
			return answer{}, malformed("%v", err)
		}
	}
	c, value, err := s.cfg.Broker.Plant(x.Context(), o, r)
	return answer{status: http.StatusCreated, body: api.Planted{Canary: wireCanary(c), Value: value}}, err
}

func (s *Server) canaries(x *exchange, _ broker.Operator, _ none) (answer, error) {
	p, err := pageAfter(x, checked(broker.ParseCanaryID))
	if err != nil {
		return answer{}, err
	}
	list, next, err := s.cfg.Broker.Canaries(x.Context(), p)
	return answer{status: http.StatusOK, body: api.Canaries{Canaries: each(list, wireCanary), Next: next}}, err
}

func (s *Server) pull(x *exchange, o broker.Operator, _ api.Nothing) (answer, error) {
	id, err := pathID(x, "canary", broker.ParseCanaryID)
	if err != nil {
		return answer{}, err
	}
	c, err := s.cfg.Broker.Pull(x.Context(), o, id)
	return answer{status: http.StatusOK, body: wireCanary(c)}, err
}

func wireCanary(c broker.Canary) api.Canary {
	return api.Canary{ID: string(c.ID), Chain: string(c.Chain), Note: c.Note, By: c.By, Planted: utc(c.Planted), Touched: utc(c.Touched), Touches: c.Touches}
}
