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
	"github.com/pawlsec/pawl/store/archive"
	"github.com/pawlsec/pawl/store/bolt"
)

// Server is a running broker with its listeners. Make one with [Start].
type Server struct {
	Broker *engine.Engine
	Policy *policy.Running
	Ledger *bolt.Ledger
	Vault  *vault.Client

	archive *archive.Archive // of the ledger; nil: it has none

	metrics           *metrics
	shadow            *policy.Shadow
	targets           map[string]broker.Backend
	files             files
	shares            *shares
	configured        map[string]Backend
	log               *slog.Logger
	hooks             Hooks
	signer            *audit.Signer // nil without a key
	agents, operators net.Addr
	failed            chan error
	gate              gate            // for requests that give out authority
	stopSelfTest      func()          // nil without a self-test
	shutdown          context.Context // bounds the end of the listeners
	closeFuncs        []func()        // in the order of construction; Close runs them in reverse
	closeOnce         sync.Once
}

// Start connects the parts and serves. ctx bounds the start, not the serving. Neither Vault nor the
// Workload API need be up: fencing over the operators' socket works without them, the broker issues
// nothing, and it retries. A wrong configuration is an error.
func Start(ctx context.Context, c Config, log *slog.Logger) (s *Server, err error) {
	return start(ctx, c, log, Hooks{}, 0)
}

// Hooks change parts of a broker, for tests. Each may be nil.
type Hooks struct {
	Engine  func(*engine.Config)            // changes the engine's parts, such as to inject faults between them
	Handler func(http.Handler) http.Handler // wraps the handler of each listener
	Check   func()                          // runs before the check of the ledger, such as to hold it up
	// Now is another clock for the engine, for the plugins whose secrets end by Vault's clock, and for the client of
	// Vault.
	Now func() time.Time
}

// orNone returns the hooks with those that are nil as ones that change nothing.
func (h Hooks) orNone() Hooks {
	if h.Engine == nil {
		h.Engine = func(*engine.Config) {}
	}
	if h.Handler == nil {
		h.Handler = func(next http.Handler) http.Handler { return next }
	}
	if h.Now == nil {
		h.Now = time.Now
	}
	return h
}

// StartWith is Start with hooks.
func StartWith(ctx context.Context, c Config, log *slog.Logger, h Hooks) (s *Server, err error) {
	return start(ctx, c, log, h, 0)
}

// StartRolledBack is Start for a policy bundle that is not newer than the last one in force. It accepts
// exactly this version, and the audit log records the rollback and the user who started the broker. Version
// zero is Start.
func StartRolledBack(ctx context.Context, c Config, log *slog.Logger, version int64) (s *Server, err error) {
	return start(ctx, c, log, Hooks{}, version)
}

func start(ctx context.Context, c Config, log *slog.Logger, h Hooks, rollback int64) (s *Server, err error) {
	h = h.orNone()
	s = &Server{failed: make(chan error, 3), log: log, configured: c.Backends, hooks: h}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.Policy, err = LoadPolicy(c.Policy); err != nil {
		return s, err
	}
	logWarnings(log, s.Policy.Current())
	svids, err := newSVIDSource(c, log)
	if err != nil {
		return s, err
	}
	attestor, err := newAttestor(c, svids)
	if err != nil {
		return s, err
	}
	s.watchIdentity(svids, c.JWTAudience != "")
	if s.Vault, err = s.login(c.Vault, svids, log, h.Now); err != nil {
		return s, err
	}
	if s.Ledger, err = bolt.OpenUnchecked(bolt.Config{Path: c.Ledger, BeforeCheck: h.Check}); err != nil {
		return s, err
	}
	s.onClose(func() { logClose(log, "ledger", s.Ledger.Close()) })
	if s.signer, err = LoadSigner(c); err != nil {
		return s, err
	}
	if s.archive, err = openArchive(ctx, s.Ledger, c, s.signSegment()); err != nil {
		return s, err
	}
	opener := opener{vault: s.Vault, log: log, now: h.Now, onClose: s.onClose, active: s.active, sign: s.sign}
	if s.targets, err = backends(opener, c.Backends); err != nil {
		return s, err
	}
	if err := checkTools(s.Policy.Current().Tools(), s.targets); err != nil {
		return s, err
	}
	parts := s.parts(c, log)
	h.Engine(&parts)
	tester, err := SelfTester(c)
	if err != nil {
		return s, err
	}
	s.metrics = newMetrics(s.declares, s.Vault.Ready, func() []broker.Condition { return s.conditions(svids) }).
		withClock(s.Vault.Skew)
	s.metrics.tester = tester
	s.shadow = newShadow(log, s.metrics)
	s.onClose(s.shadow.Close)
	parts.Refused = s.metrics.limit("agents")
	parts.Ledger, parts.Alarm = counted{parts.Ledger, s.metrics, s.shares}, s.metrics.alarm(parts.Alarm)
	if s.Broker, err = engine.New(parts); err != nil {
		return s, err
	}
	s.onClose(s.Broker.Stop)
	if err := s.adopt(ctx, s.Policy.Current(), rollback); err != nil {
		return s, err
	}
	s.reloadCandidate(c)
	if err := s.metrics.seed(ctx, s.Broker); err != nil {
		return s, err
	}
	if err := s.restore(ctx, s.targets); err != nil {
		return s, err
	}
	if err := s.Broker.Resume(ctx); err != nil {
		return s, err
	}
	if err := s.listen(ctx, c, attestor, svids, s.targets, log); err != nil {
		return s, err
	}
	s.watchCheck(parts.Alarm)
	s.await(ctx, svids)
	return s, errors.Join(s.startSender(c, svids, parts.Alarm, log), s.startSelfTest(c, parts.Alarm))
}

// declares reports whether the running bundle has a tool.
func (s *Server) declares(name broker.ToolName) bool {
	_, ok := s.Policy.Current().Tool(name)
	return ok
}

// parts are the engine's, before the metrics wrap them.
func (s *Server) parts(c Config, log *slog.Logger) engine.Config {
	limits := c.Limits.orDefaults()
	s.shares = newShares(limits.LedgerPerDay)
	ledger, past := s.ledgers()
	return engine.Config{
		Ledger: ledger, Archive: past, Keep: c.Keep,
		Vault: leaseLister{s.Vault, s.Policy, s.targets}, Backends: s.targets,
		Policy: func() broker.Policy { return s.shadow.Beside(s.Policy.Current()) },
		Alarm:  func(op string, err error) { log.Error("alarm", "op", op, "error", err) },
		Now:    s.hooks.Now, Random: rand.Reader,
		MintTimeout: c.Vault.MintTimeout, MintBound: c.Vault.MintBound, SweepEvery: c.SweepEvery,
		Mints: limits.Mints, WaitingMints: limits.WaitingMints, Refusals: limits.Refusals,
		OpenChains: limits.OpenChains,
	}
}

// await waits for the identity and for the check of the ledger.
func (s *Server) await(ctx context.Context, svids *svidSource) {
	wait, cancel := context.WithTimeout(ctx, identityWait)
	defer cancel()
	svids.await(wait)
	select {
	case <-s.Ledger.Checked():
	case <-wait.Done():
	}
}

// identityWait is how long Start waits for the broker's identity after it opened the listeners, so that a
// healthy broker is ready when Start returns.
const identityWait = 5 * time.Second

// onClose registers f for Close, which runs it before the functions registered earlier.
func (s *Server) onClose(f func()) { s.closeFuncs = append(s.closeFuncs, f) }

// Close stops serving, then the background work, then the parts, and waits for each. Unfinished work is in
// the ledger; the next start resumes it.
func (s *Server) Close() {
	s.closeOnce.Do(func() {
		var cancel context.CancelFunc
		s.shutdown, cancel = context.WithTimeout(context.Background(), closeWait)
		defer cancel()
		for i := len(s.closeFuncs) - 1; i >= 0; i-- {
			s.closeFuncs[i]()
		}
	})
}

// Failed delivers the error of a listener that stopped by itself.
func (s *Server) Failed() <-chan error { return s.failed }

// Agents is the address of the agents' listener.
func (s *Server) Agents() net.Addr { return s.agents }

// Operators is the address of the operators' TLS listener; nil without one.
func (s *Server) Operators() net.Addr { return s.operators }

func logClose(log *slog.Logger, what string, err error) {
	if err != nil {
		log.Error("closing", "part", what, "error", err)
	}
}

func newAttestor(c Config, svids *svidSource) (*attest.Attestor, error) {
	config := attest.Config{TrustDomains: c.TrustDomains, Source: svids}
	if c.JWTAudience != "" {
		config.JWT, config.Audience, config.Companions = svids, c.JWTAudience, c.JWTCompanions
	}
	return attest.New(config)
}

// listen opens the operators' socket first. Agents can connect once the broker has an identity.
func (s *Server) listen(
	ctx context.Context, c Config, a *attest.Attestor, svids *svidSource,
	backends map[string]broker.Backend, log *slog.Logger,
) error {
	if w := c.FreezeWarning(); w != "" {
		log.Warn(w)
	}
	var err error
	if s.files, err = countFiles(); err != nil {
		return err
	}
	s.files.log(log)
	limits := c.Limits.orDefaults()
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
		Notary: notary, Signals: receiver, Introspect: introspect(s.active, s.Policy, backends),
		StatusList: statusLists(backends, s.checked), Limits: limits.ofRequests(s.metrics.limit("agents"), s.shares),
		Metrics: s.metrics.handler(), Log: log, Now: time.Now, Issuing: s.enterIssuing, FreezeWarning: c.FreezeWarning(),
		Conditions: func() []broker.Condition { return s.conditions(svids) }})
	if err != nil {
		return err
	}
	s.metrics.addLimits(limits, s.files)
	forAgents, forOperators := s.hooks.Handler(srv.Agents()), s.hooks.Handler(srv.Operators())
	if err := s.serveSocket(c.Listen.Socket, forOperators, log); err != nil {
		return fmt.Errorf("listening on the operators' socket: %w", err)
	}
	defer s.onClose(srv.Close) // registered last, so that Close ends the streams first
	if s.agents, err = s.serveTLS("agents", c.Listen.Agents, a, forAgents, attest.Limits{Log: log, Each: limits.Connections,
		Address: limits.AddressConnections, Strangers: s.files.strangers, Most: s.files.agents}); err != nil {
		return fmt.Errorf("listening for agents: %w", err)
	}
	if c.Listen.Operators != "" {
		if s.operators, err = s.serveTLS("operators", c.Listen.Operators, a, forOperators,
			attest.Limits{Log: log, Each: max(s.files.operators/4, 4), Address: limits.AddressConnections,
				Strangers: max(s.files.operators/2, 4), Most: s.files.operators}); err != nil {
			return fmt.Errorf("listening for operators: %w", err)
		}
	}
	return nil
}

func (s *Server) serveTLS(name, address string, a *attest.Attestor, h http.Handler, limits attest.Limits,
) (net.Addr, error) {
	inner, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	s.serveBounded(name, h, inner, a.ServerTLS(), limits)
	return inner.Addr(), nil
}

// serveBounded runs h on inner within the limits until Close. A nil config means no TLS.
func (s *Server) serveBounded(name string, h http.Handler, inner net.Listener, config *tls.Config,
	limits attest.Limits) {
	limits.Refused = s.metrics.limit(name)
	l := attest.Listener(inner, config, limits)
	s.metrics.addListener(name, l.Open)
	s.serve(attest.Server(h, limits), l)
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
	s.onClose(func() {
		if h.Shutdown(s.shutdown) != nil {
			_ = h.Close() // it closes the connections that are still open after the grace period
		}
		<-done
	})
}

func (s *Server) login(c Vault, svids *svidSource, log *slog.Logger, now func() time.Time) (*vault.Client, error) {
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
		login.JWTRole, login.JWT = role, jwtFor(svids, c.Audience)
	} else {
		login.CertRole = role
		login.Certificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			svids.await(r.Context()) // as in jwtFor
			return certificate(svids)
		}
	}
	client, err := vault.New(vault.Config{Address: c.Address, Roots: roots, Namespace: c.Namespace, Login: login,
		MintTimeout: c.MintTimeout, BehindProxy: c.BehindProxy, Now: now, Log: log, IdentityPolicies: c.IdentityPolicies,
		Tools: s.vaultAccess, CheckEvery: checkVaultEvery})
	if err != nil {
		return nil, err
	}
	s.onClose(client.Close)
	return client, nil
}

// enterIssuing lets in a request that gives out authority, unless the ledger was not checked or the broker stops.
func (s *Server) enterIssuing() (leave func(), err error) {
	if err := s.checked("issue"); err != nil {
		return nil, err
	}
	return s.gate.enter()
}

// Drain prepares for [Server.Close]. From its first moment the broker is not ready and refuses to open chains, to
// delegate and to take steps. Everything else goes on, so fences are taken until Close. Drain waits for the steps that
// have begun, until their mints have ended or were given up. Then it ends the sealed secrets that were not collected,
// which live in this process alone. It returns within 12 s.
func (s *Server) Drain() {
	inside, idle := s.gate.stop()
	s.log.Info("stopping: no new steps; steps under way end", "steps", inside)
	if s.stopSelfTest != nil {
		s.stopSelfTest()
	}
	wait := time.NewTimer(mintWait)
	defer wait.Stop()
	select {
	case <-idle:
	case <-wait.C:
		inside, _ = s.gate.stop()
		s.log.Error("stopping although steps are under way; the next start ends what they made", "steps", inside)
	}
	if s.Broker == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), sealedWait)
	defer cancel()
	ended, err := s.Broker.EndWaiting(ctx)
	for _, g := range ended {
		s.log.Warn("a sealed secret was not collected, and is ended", "grant", g.ID, "chain", g.Chain,
			"collector", g.Collector.String(), "dead", g.State == broker.StateClosed)
	}
	if err != nil {
		s.log.Error("ending sealed secrets that were not collected; the next start ends them", "error", err)
	}
}

// checked returns nil once the ledger's file was checked. Until then, and if the check failed, nothing may be handed out:
// a fence may be missing.
func (s *Server) checked(op string) error {
	select {
	case <-s.Ledger.Checked():
	default:
		return broker.Errorf(broker.Unavailable, op, "the broker has just started and checks its ledger").
			With(broker.CodeLedgerChecking).After(time.Second)
	}
	if err := s.Ledger.Unchecked(); err != nil {
		return broker.Errorf(broker.Unavailable, op, "the broker's ledger is damaged; operators must replace it").
			With(broker.CodeIssuingStopped).Because(err).After(time.Minute)
	}
	return nil
}

// watchCheck reports the end of the ledger's check.
func (s *Server) watchCheck(alarm func(string, error)) {
	began := time.Now()
	done := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-stop:
			return
		case <-s.Ledger.Checked():
		}
		if err := s.Ledger.Unchecked(); err != nil {
			alarm("the ledger failed its check: only fences and endings are taken", err)
			return
		}
		s.log.Info("the ledger was checked", "took", time.Since(began))
		if s.archive == nil {
			return
		}
		if err := s.archive.Missing(context.Background()); err != nil {
			alarm("the archive is not whole: reports and lists of that time are refused, and all else works", err)
		}
	}()
	s.onClose(func() { close(stop); <-done })
}

// checkVaultEvery is the time between two checks of Vault. A fault is named within this time and the two timeouts of a
// check, which is less than ten seconds.
const checkVaultEvery = 3 * time.Second

// conditions returns the present faults of the broker.
func (s *Server) conditions(svids *svidSource) (found []broker.Condition) {
	found = svids.conditions()
	if err := s.gate.open(); err != nil {
		found = append(found, broker.Condition{Part: "broker", Code: broker.CodeStopping, Text: err.Error(), Blocks: true})
	}
	switch err := s.Ledger.Err(); {
	case errors.Is(err, bolt.ErrChecking):
		found = append(found, broker.Condition{Part: "ledger", Code: broker.CodeLedgerChecking, Text: err.Error(), Blocks: true})
	case err != nil:
		found = append(found, broker.Condition{Part: "ledger", Code: broker.CodeLedgerDown, Text: err.Error(), Blocks: true})
	}
	if err := s.Vault.CheckClock(); err != nil {
		found = append(found, broker.Condition{Part: "vault", Code: broker.CodeClockSkew, Text: err.Error(), Blocks: true})
	}
	if s.Broker != nil { // nil before the end of the start
		found = append(found, leftovers(s.Broker.Leftovers())...)
	}
	tools := len(s.vaultAccess())
	broken := map[broker.ToolName]bool{}
	for _, w := range s.Vault.Conditions() {
		c := broker.Condition{Part: "vault", Code: w.Code, Text: w.Text, Blocks: w.Tool == "" && !w.Warn}
		if c.Blocks {
			c.Text = svids.asWhom(c.Text)
		}
		if w.Tool != "" {
			c.Part, broken[w.Tool] = "tool "+string(w.Tool), true
		}
		found = append(found, c)
	}
	if tools > 0 && len(broken) == tools { // no agent can do anything
		for i := range found {
			found[i].Blocks = true
		}
	}
	return found
}

// leftovers is the fault that Vault does not remove the leases of closed grants. It keeps nothing from being issued.
func leftovers(n, stuck int) []broker.Condition {
	if stuck == 0 {
		return nil
	}
	return []broker.Condition{{Part: "vault", Code: broker.CodeLeasesLeft, Text: fmt.Sprintf("leases still being "+
		"removed: %d, of which Vault has left %d for minutes. Their secrets are dead at the target. The broker retries, "+
		"and an operator must find the cause", n, stuck)}}
}

// vaultAccess lists the tools' access to Vault, by the bundle in force.
func (s *Server) vaultAccess() []vault.Access {
	return Access(s.Policy.Current().Tools(), s.configured)
}
