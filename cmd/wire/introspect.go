package wire

import (
	"context"
	"errors"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/server"
	"github.com/pawlsec/pawl/plugins/jwt"
)

// The abilities of a backend that signs tokens, found by type assertion.
type (
	// tokenVerifier checks that a tool's key has signed a token. An error that is not Unavailable means
	// that it is not a token of this backend.
	tokenVerifier interface {
		Verify(ctx context.Context, t broker.Tool, token string) (jwt.Token, error)
	}
	// statusLister keeps a status list of its tokens, if HasStatusList reports true. Restore fills it after
	// a restart from the grants of the last [jwt.Remember].
	statusLister interface {
		HasStatusList() bool
		StatusList() ([]byte, error)
		Restore(grants []broker.Grant, active func(broker.GrantID) (bool, error)) error
	}
)

// active reports whether a grant's token is still good. Introspection answers it, so it also proves a
// token dead. Backends are made before the broker, and call it only once the broker runs.
func (s *Server) active(ctx context.Context, id broker.GrantID) (bool, error) {
	return s.Broker.Active(ctx, id)
}

// introspect answers about tokens of the jwt backends; nil when there is none. The signature is
// the tool's key's matter, whether the grant stands the ledger's: so what was revoked stays refused
// over a restart.
func introspect(active func(context.Context, broker.GrantID) (bool, error), running *policy.Running, backends map[string]broker.Backend) server.Introspect {
	issues := false
	for _, backend := range backends {
		_, is := backend.(tokenVerifier)
		issues = issues || is
	}
	if !issues {
		return nil
	}
	return func(ctx context.Context, token string) (api.Introspection, error) {
		claimed, err := jwt.Read(token)
		if err != nil {
			return api.Introspection{}, nil // whoever made it, it is no token of ours
		}
		tool, _ := running.Current().Tool(claimed.Tool)
		backend, ok := backends[tool.Backend].(tokenVerifier)
		if !ok {
			return api.Introspection{}, nil
		}
		t, err := backend.Verify(ctx, tool, token)
		if broker.KindOf(err) == broker.Unavailable {
			return api.Introspection{}, err
		}
		if err != nil {
			return api.Introspection{}, nil
		}
		good, err := active(ctx, t.Grant)
		if err != nil || !good {
			return api.Introspection{}, err
		}
		return api.Introspection{Active: true, Issuer: t.Issuer, Subject: t.Subject, Audience: t.Audience, Scope: t.Scope,
			Expires: t.Expires, Issued: t.Issued, ID: string(t.Grant)}, nil
	}
}

// sign signs a status list with the broker's own key. The tokens' key is Vault's, and the broker's
// token may not sign with it: then it could make tokens without a step.
func (s *Server) sign(typ string, payload []byte) ([]byte, error) {
	if s.signer == nil {
		return nil, errors.New("there is no signing_key")
	}
	return s.signer.SignAs(typ, payload)
}

// restore tells the backends that have status lists what the ledger knows of tokens that may not be
// past their end.
func (s *Server) restore(ctx context.Context, backends map[string]broker.Backend) error {
	for name, backend := range backends {
		b, ok := backend.(statusLister)
		if !ok || !b.HasStatusList() {
			continue
		}
		grants, err := s.Broker.Recent(ctx, name, time.Now().Add(-jwt.Remember))
		if err != nil {
			return err
		}
		if err := b.Restore(grants, func(id broker.GrantID) (bool, error) { return s.active(ctx, id) }); err != nil {
			return err
		}
	}
	return nil
}

// statusLists gives the backends' status lists; nil when none has one.
func statusLists(backends map[string]broker.Backend) server.StatusList {
	lists := map[string]statusLister{}
	for name, backend := range backends {
		if b, ok := backend.(statusLister); ok && b.HasStatusList() {
			lists[name] = b
		}
	}
	if len(lists) == 0 {
		return nil
	}
	return func(name string) ([]byte, error) {
		if b, ok := lists[name]; ok {
			return b.StatusList()
		}
		return nil, nil
	}
}
