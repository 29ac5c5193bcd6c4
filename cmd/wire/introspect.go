package wire

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/server"
	"github.com/pawlsec/pawl/plugins/jwt"
)

// active is what introspection says of a grant's token, and so what proves it dead. Backends are
// made before the broker, and ask only once it runs.
func (s *Server) active(ctx context.Context, id broker.GrantID) (bool, error) {
	return s.Broker.Active(ctx, id)
}

// introspect answers about tokens of the jwt backends; nil when there is none. The signature is
// the tool's key's matter, whether the grant stands the ledger's: so what was revoked stays refused
// over a restart.
func introspect(active func(context.Context, broker.GrantID) (bool, error), running *policy.Running, backends map[string]broker.Backend) server.Introspect {
	issues := false
	for _, backend := range backends {
		_, is := backend.(*jwt.Backend)
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
		backend, ok := backends[tool.Backend].(*jwt.Backend)
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
