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
	// statusLister keeps a status list of its tokens, if HasStatusList reports true.
	statusLister interface {
		HasStatusList() bool
		StatusList() ([]byte, error)
	}
)

// restorer keeps a list of ended secrets. Restore fills it after a restart from the grants of the last [jwt.Remember],
// which is at least the longest life of a secret.
type restorer interface {
	Restore(grants []broker.Grant, active func(broker.GrantID) (bool, error)) error
}

// active reports whether introspection accepts a grant's token. Its answer is also the proof that a token is
// dead. Backends are made before the broker, and call it only after the broker started. No token is active by a
// ledger that was not checked: a fence may be missing from it.
func (s *Server) active(ctx context.Context, id broker.GrantID) (bool, error) {
	good, err := s.Broker.Active(ctx, id)
	if err != nil || !good {
		return false, err
	}
	return true, s.checked("introspect")
}

// introspect answers introspection requests about the tokens of the backends that sign; nil without such a
// backend. The tool's key verifies the signature, and the ledger decides whether the grant is still open, so
// that a revoked token stays refused after a restart.
func introspect(
	active func(context.Context, broker.GrantID) (bool, error), running *policy.Running,
	backends map[string]broker.Backend,
) server.Introspect {
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
			return api.Introspection{}, nil // not a token of this broker
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

// sign signs a status list with the broker's own key. The tokens' key is in Vault, and the broker's own
// Vault token must not sign with it: it could then make tokens without a step.
func (s *Server) sign(typ string, payload []byte) ([]byte, error) {
	if s.signer == nil {
		return nil, errors.New("no signing_key is configured")
	}
	return s.signer.SignAs(typ, payload)
}

// restore fills the backends' lists from the ledger, with the grants that are recent enough for their secrets to be
// unexpired.
func (s *Server) restore(ctx context.Context, backends map[string]broker.Backend) error {
	for name, backend := range backends {
		b, ok := backend.(restorer)
		if !ok {
			continue
		}
		grants, err := s.Broker.Recent(ctx, name, time.Now().Add(-jwt.Remember))
		if err != nil {
			return err
		}
		if err := b.Restore(grants, func(id broker.GrantID) (bool, error) { return s.Broker.Active(ctx, id) }); err != nil {
			return err
		}
	}
	return nil
}

// statusLists serves the backends' status lists by name, once checked returns nil; nil when no backend has one.
func statusLists(backends map[string]broker.Backend, checked func(op string) error) server.StatusList {
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
			if err := checked("status list"); err != nil {
				return nil, err
			}
			return b.StatusList()
		}
		return nil, nil
	}
}
