package wire

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/broker/server"
	"github.com/pawlsec/pawl/plugins/vault"
	"github.com/pawlsec/pawl/store/bolt"
)

// Server is a running broker with its listeners. Make one with [Start].
type Server struct {
	Broker *engine.Engine
	Policy *policy.Running
	Ledger *bolt.Ledger
	Vault  *vault.Client

	metrics           *metrics
	shadow            *policy.Shadow
	checking          bool // the backends only check tools: see [plugin]
	targets           map[string]broker.Backend
	log               *slog.Logger
	signer            *audit.Signer // nil without a key
	agents, operators net.Addr
	failed            chan error
	closers           []func() // in the order of making; Close runs them backwards
	closing           sync.Once
}

// Start puts the parts together and serves. ctx bounds the start, not the serving. Neither Vault nor
// the Workload API need be up: fencing over the operators' socket works without them, nothing is
// issued, and the broker goes on trying. What is wrong with the configuration is an error.
func Start(ctx context.Context, c Config, log *slog.Logger) (s *Server, err error) {
	return start(ctx, c, log, func(*engine.Config) {}, 0)
}

// StartWith is Start with a last word on the engine's parts, for tests that put faults between
// them.
func StartWith(ctx context.Context, c Config, log *slog.Logger, change func(*engine.Config)) (s *Server, err error) {
	return start(ctx, c, log, change, 0)
}

// StartRolledBack is Start for a policy bundle that is not newer than the one that was in force
// last: exactly this version of it is taken, and the audit says that it was, and for whom. Zero is
// Start.
func StartRolledBack(ctx context.Context, c Config, log *slog.Logger, version int64) (s *Server, err error) {
	return start(ctx, c, log, func(*engine.Config) {}, version)
}

func start(ctx context.Context, c Config, log *slog.Logger, change func(*engine.Config), rollback int64) (s *Server, err error) {
	s = &Server{failed: make(chan error, 3), log: log}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.Policy, err = LoadPolicy(c.Policy); err != nil {
		return s, err
	}
	warn(log, s.Policy.Current())
	me, err := newOwn(c, log)
	if err != nil {
		return s, err
	}
	attestor, err := newAttestor(c, me)
	if err != nil {
		return s, err
	}
	s.identify(me, c.JWTAudience != "")
	if s.Vault, err = s.login(c.Vault, me, log); err != nil {
		return s, err
	}
	if s.Ledger, err = bolt.Open(bolt.Config{Path: c.Ledger}); err != nil {
		return s, err
	}
	s.later(func() { logClose(log, "ledger", s.Ledger.Close()) })
	if s.signer, err = LoadSigner(c); err != nil {
		return s, err
	}
	if s.targets, err = s.backends(c.Backends); err != nil {
		return s, err
	}
	backends := s.targets
	if err := checkTools(s.Policy.Current().Tools(), backends); err != nil {
		return s, err
	}
	parts := engine.Config{
		Ledger: s.Ledger, Policy: func() broker.Policy { return s.shadow.Beside(s.Policy.Current()) }, Vault: leaseLister{s.Vault, s.Policy, backends}, Backends: backends,
		Now: time.Now, Random: rand.Reader, Alarm: func(op string, err error) { log.Error("alarm", "op", op, "error", err) },
		MintTimeout: c.Vault.MintTimeout, MintBound: c.Vault.MintBound, SweepEvery: c.SweepEvery,
	}
	change(&parts)
	tester, err := SelfTester(c)
	if err != nil {
		return s, err
	}
	s.metrics = newMetrics(func(name broker.ToolName) bool { _, ok := s.Policy.Current().Tool(name); return ok }, s.Vault.Ready)
	s.metrics.tester = tester
	s.shadow = newShadow(log, s.metrics)
	s.later(s.shadow.Close)
	parts.Ledger, parts.Alarm = counted{parts.Ledger, s.metrics}, s.metrics.alarm(parts.Alarm)
	if s.Broker, err = engine.New(parts); err != nil {
		return s, err
	}
	s.later(s.Broker.Stop)
	if err := s.adopt(ctx, s.Policy.Current(), rollback); err != nil {
		return s, err
	}
	s.tryCandidate(c)
	if err := s.metrics.begin(ctx, s.Broker); err != nil {
		return s, err
	}
	if err := s.restore(ctx, backends); err != nil {
		return s, err
	}
	if err := s.Broker.Resume(ctx); err != nil {
		return s, err
	}
	if err := s.listen(ctx, c, attestor, me, backends, log); err != nil {
		return s, err
	}
	if err := errors.Join(s.tell(c, me, parts.Alarm, log), s.testSelf(c, parts.Alarm)); err != nil {
		return s, err
	}
	wait, cancel := context.WithTimeout(ctx, identityWait)
	defer cancel()
	me.await(wait)
	return s, nil
}

// identityWait is how long Start waits for the broker's identity with the listeners open already, so
// that whoever started a healthy broker finds it ready.
const identityWait = 5 * time.Second

// later has Close run f, before what was given to later earlier.
func (s *Server) later(f func()) { s.closers = append(s.closers, f) }

// Close stops serving, then the background work, then the parts, and waits for each. What was
// under way is in the ledger.
func (s *Server) Close() {
	s.closing.Do(func() {
		for i := len(s.closers) - 1; i >= 0; i-- {
			s.closers[i]()
		}
	})
}

// Failed gives the error of a listener that stopped by itself.
func (s *Server) Failed() <-chan error { return s.failed }

// Agents and Operators are the addresses that are listened on; Operators is nil without one.
func (s *Server) Agents() net.Addr    { return s.agents }
func (s *Server) Operators() net.Addr { return s.operators }

func logClose(log *slog.Logger, what string, err error) {
	if err != nil {
		log.Error("closing", "part", what, "error", err)
	}
}

func newAttestor(c Config, me *own) (*attest.Attestor, error) {
	config := attest.Config{TrustDomains: c.TrustDomains, Source: me}
	if c.JWTAudience != "" {
		config.JWT, config.Audience = me, c.JWTAudience
	}
	return attest.New(config)
}

// listen opens the operators' socket before all else. Agents can connect once the broker has an identity.
func (s *Server) listen(ctx context.Context, c Config, a *attest.Attestor, me *own, backends map[string]broker.Backend, log *slog.Logger) error {
	operators := newOperators(c.Operators, a)
	notary, err := s.notary()
	if err != nil {
		return err
	}
	receiver, err := s.receiver(ctx, c, log)
	if err != nil {
		return err
	}
	srv, err := server.New(server.Config{Broker: s.Broker, Identify: a.Identify, Operator: operators.identify,
		Notary: notary, Signals: receiver, Introspect: introspect(s.active, s.Policy, backends), StatusList: statusLists(backends), Metrics: s.metrics.handler(), Log: log, Now: time.Now,
		Ready: func() error { return errors.Join(me.ready(), s.Vault.Ready()) }})
	if err != nil {
		return err
	}
	if err := s.serveSocket(c.Listen.Socket, srv.Operators()); err != nil {
		return fmt.Errorf("listening on the operators' socket: %w", err)
	}
	defer s.later(srv.Close) // the first thing that Close does: it ends the streams
	if s.agents, err = s.serveTLS(c.Listen.Agents, a, srv.Agents(), log); err != nil {
		return fmt.Errorf("listening for agents: %w", err)
	}
	if c.Listen.Operators != "" {
		if s.operators, err = s.serveTLS(c.Listen.Operators, a, srv.Operators(), log); err != nil {
			return fmt.Errorf("listening for operators: %w", err)
		}
	}
	return nil
}

func (s *Server) serveTLS(address string, a *attest.Attestor, h http.Handler, log *slog.Logger) (net.Addr, error) {
	inner, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	limits := attest.Limits{Log: log}
	s.serve(attest.Server(h, limits), attest.Listener(inner, a.ServerTLS(), limits))
	return inner.Addr(), nil
}

// serve runs h on l until Close.
func (s *Server) serve(h *http.Server, l net.Listener) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.failed <- err
		}
	}()
	s.later(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if h.Shutdown(ctx) != nil {
			_ = h.Close() // what is still open after the grace is cut
		}
		<-done
	})
}

func (s *Server) login(c Vault, me *own, log *slog.Logger) (*vault.Client, error) {
	pem, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, fmt.Errorf("vault.ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("vault.ca %q holds no certificate", c.CA)
	}
	role := c.Role
	if role == "" {
		role = "pawl-broker"
	}
	login := vault.Login{Mount: c.Mount}
	if c.Auth == "jwt" {
		login.JWTRole, login.JWT = role, jwtFor(me, c.Audience)
	} else {
		login.CertRole = role
		login.Certificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			me.await(r.Context()) // else the first login of every start would come too soon
			return certificate(me)
		}
	}
	client, err := vault.New(vault.Config{Address: c.Address, Roots: roots, Namespace: c.Namespace, Login: login,
		MintTimeout: c.MintTimeout, Log: log})
	if err != nil {
		return nil, err
	}
	s.later(client.Close)
	return client, nil
}
