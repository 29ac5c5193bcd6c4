package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// The codes of conditions. An operator sees them in /readyz, in the metric pawl_condition and in the doctor.
const (
	codeUnreachable   broker.Code = "vault_unreachable"   // no answer
	codeSealed        broker.Code = "vault_sealed"        // sealed
	codeUninitialized broker.Code = "vault_uninitialized" // not initialised
	codeStandby       broker.Code = "vault_standby"       // a standby that does not get requests to an active node
	codeErrors        broker.Code = "vault_errors"        // it answers with errors
	codeLogin         broker.Code = "vault_login"         // it refuses the login
	codeBrokerPolicy  broker.Code = "vault_broker_policy" // the broker's own policy lacks a path
)

// Condition is something about Vault that keeps the broker from issuing. The zero value is none.
type Condition struct {
	Code broker.Code
	Tool broker.ToolName // the only tool that it affects; empty: all
	Text string          // for operators: it names addresses, policies and paths
	Why  string          // for agents
	Warn bool            // it keeps no tool from working
}

// checkTimeout bounds one request of a check.
const checkTimeout = 2 * time.Second

// silentChecks is the number of checks in a row without an answer after which steps are refused without a request: each
// would wait for its timeout, and its agent would give up without a reason.
const silentChecks = 2

// checkLoop checks Vault every [Config.CheckEvery].
func (c *Client) checkLoop(ctx context.Context) {
	if c.cfg.CheckEvery <= 0 {
		return
	}
	tick := time.NewTicker(c.cfg.CheckEvery)
	defer tick.Stop()
	select {
	case <-c.firstLogin:
	case <-ctx.Done():
	}
	for ctx.Err() == nil {
		c.Check(ctx)
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// Check checks Vault now: that it answers the broker's own requests, that the broker's entity has no policy of its own, and
// that each tool's policy permits its path. [Client.Conditions] returns the result until the next check.
func (c *Client) Check(ctx context.Context) []Condition {
	var found []Condition
	wrong := c.checkSelf(ctx)
	if wrong != (Condition{}) {
		found = []Condition{wrong}
	} else {
		found = c.checkTools(ctx)
	}
	before := c.Conditions()
	if wrong.Code == codeLogin && len(before) > 0 && before[0].Code != codeLogin {
		c.recheckLogin() // Vault is back: the next login must not wait for the end of its backoff
	}
	if ctx.Err() == nil {
		c.mu.Lock()
		c.conditions = found
		if c.silent++; wrong.Code != codeUnreachable {
			c.silent = 0
		}
		c.mu.Unlock()
	}
	return found
}

// Conditions returns the result of the last check; without a check, that there is no login.
func (c *Client) Conditions() []Condition {
	c.mu.Lock()
	found := c.conditions
	c.mu.Unlock()
	if err := c.loggedIn(); err != nil && !slices.ContainsFunc(found, Condition.general) {
		found = append([]Condition{{Code: codeLogin, Text: err.Error(), Why: "the broker is not logged in to Vault"}}, found...)
	}
	return found
}

// general reports whether the condition affects every tool.
func (w Condition) general() bool { return w.Tool == "" && !w.Warn }

// Ready returns nil while the broker is logged in and the last check found nothing that affects every tool, and
// otherwise the reason.
func (c *Client) Ready() error {
	if err := c.loggedIn(); err != nil {
		return err
	}
	for _, w := range c.Conditions() {
		if w.general() {
			return errors.New(w.Text)
		}
	}
	return nil
}

// checkSelf makes a request that needs Vault's storage and its active node, and none but the broker's own policy.
func (c *Client) checkSelf(ctx context.Context) Condition {
	c.mu.Lock()
	s, loginErr := c.session, c.loginErr
	c.mu.Unlock()
	if s == nil {
		if loginErr == nil {
			loginErr = errNoSession
		}
		return c.diagnose(ctx, loginErr)
	}
	resp, err := c.ask(ctx, s, "auth/token/lookup-accessor", map[string]any{"accessor": s.accessor})
	var f *failure
	switch {
	case errors.As(err, &f) && f.status == http.StatusTooManyRequests:
		return Condition{} // it answers; whether steps are refused too is for Vault's quotas
	case errors.Is(err, errForbidden):
		if c.recheckLogin(); c.loggedIn() == nil && !f.badToken() {
			return c.brokerPolicy("auth/token/lookup-accessor")
		}
		return c.diagnose(ctx, err)
	case err != nil:
		return c.diagnose(ctx, err)
	}
	entity, _ := resp.Data["entity_id"].(string)
	return c.foreignPolicies(textsOf(resp.Data["identity_policies"]), entity)
}

// brokerPolicy is the condition when the broker's own policy lacks a path.
func (c *Client) brokerPolicy(path string) Condition {
	return Condition{Code: codeBrokerPolicy, Why: "Vault refuses the broker's own requests",
		Text: fmt.Sprintf("Vault refuses %q to the broker: its policy (that of the auth role %q) is gone or lacks the path; "+
			"`pawl vault plan` prints it", path, c.cfg.Login.role())}
}

// foreignPolicies returns a condition if Vault's identity gives the broker's tokens a policy that the configuration does
// not allow. Every token that the broker makes has these policies too.
func (c *Client) foreignPolicies(given []string, entity string) Condition {
	extra := c.refusedPolicies(given)
	if len(extra) == 0 {
		return Condition{}
	}
	where := "identity/entity/id/" + entity
	return Condition{Code: broker.CodeVaultIdentity,
		Why: fmt.Sprintf("Vault gives every token of the broker the policy %s beside those of its tool", quoted(extra)),
		Text: fmt.Sprintf("the broker's entity in Vault has the policy %s, by %s or an identity group with it as a member "+
			"(`vault read %s` lists both): take it off, or list it in vault.identity_policies", quoted(extra), where, where)}
}

// refusedPolicies returns those of the identity's policies that the configuration does not allow.
func (c *Client) refusedPolicies(given []string) (extra []string) {
	for _, p := range given {
		if !slices.Contains(c.cfg.IdentityPolicies, p) {
			extra = append(extra, p)
		}
	}
	return extra
}

func quoted(names []string) string {
	var list []string
	for _, n := range names {
		list = append(list, fmt.Sprintf("%.80q", n))
	}
	return strings.Join(list, ", ")
}

// textsOf returns the texts of a list; nil if it is none.
func textsOf(v any) (texts []string) {
	list, _ := v.([]any)
	for _, e := range list {
		if s, ok := e.(string); ok {
			texts = append(texts, s)
		}
	}
	return texts
}

// ask sends one request of a check.
func (c *Client) ask(ctx context.Context, s *node, path string, body any) (response, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	return c.wire.send(ctx, call{method: "POST", path: path, token: s.token, body: body})
}

// diagnose asks for Vault's health, which needs no login, and says why a request failed.
func (c *Client) diagnose(ctx context.Context, cause error) Condition {
	err := cause
	if !errors.Is(cause, context.DeadlineExceeded) { // else it would not answer this either
		ctx, cancel := context.WithTimeout(ctx, checkTimeout)
		defer cancel()
		_, err = c.wire.send(ctx, call{method: "GET", path: "sys/health", root: true, newConn: true})
	}
	at := "Vault at " + c.cfg.Address
	wrong := func(code broker.Code, why, format string, args ...any) Condition {
		return Condition{Code: code, Text: at + " " + fmt.Sprintf(format, args...), Why: why}
	}
	var f *failure
	switch {
	case err != nil && !errors.As(err, &f):
		return wrong(codeUnreachable, "Vault does not answer", "does not answer: %v", err)
	case err == nil && (errors.Is(cause, errNoSession) || rejected(cause)):
		return wrong(codeLogin, "Vault refuses the broker's login", "refuses the broker's login: %v", cause)
	case err == nil:
		return wrong(codeErrors, "Vault answers with errors", "is active and unsealed, and a request failed: %v", cause)
	}
	switch f.status {
	case http.StatusTooManyRequests, 472, 473, 474: // a standby; of disaster recovery; for performance; without the active node
		return wrong(codeStandby, "Vault is a standby that does not reach an active node",
			"is a standby that does not get requests to an active node: %v; is one active, and do the nodes reach each "+
				"other's cluster addresses?", cause)
	case 530:
		return wrong(codeErrors, "Vault was removed from its cluster", "was removed from its cluster")
	case http.StatusNotImplemented:
		return wrong(codeUninitialized, "Vault is not initialised", "is not initialised")
	case http.StatusServiceUnavailable:
		return wrong(codeSealed, "Vault is sealed", "is sealed")
	}
	return wrong(codeErrors, "Vault answers with errors", "answers a request for its health with status %d", f.status)
}

// told gives an error its kind and code for the agent. If the last check found what affects every tool, that is the
// reason of an error that tells no more than that Vault cannot be used.
func (c *Client) told(err error) error {
	var known *broker.Error
	if err = explain(err); !errors.As(err, &known) ||
		known.Code != broker.CodeVaultDown && known.Code != broker.CodeVaultPolicy {
		return err
	}
	for _, w := range c.Conditions() {
		if w.general() {
			return c.refusal(w).Because(err)
		}
	}
	return err
}

// reachable returns an error when Vault has not answered the last checks, or is a standby without the active node. Such a
// standby answers a mint in a way that leaves open whether something was made, so no mint is sent to it.
func (c *Client) reachable() error {
	c.mu.Lock()
	silent := c.silent >= silentChecks
	standby := slices.ContainsFunc(c.conditions, func(w Condition) bool { return w.Code == codeStandby })
	c.mu.Unlock()
	switch {
	case silent:
		return c.told(errSilent)
	case standby:
		return c.told(errStandby)
	}
	return nil
}

var (
	errSilent  = errors.New("not asked: vault did not answer the last checks")
	errStandby = errors.New("not asked: vault was a standby without the active node at the last check")
)

// refusal is the error for an agent when its step meets the condition. Only a person can end the wrong setup of Vault, so
// that the agent should not try again.
func (c *Client) refusal(w Condition) *broker.Error {
	e := broker.Errorf(broker.Unavailable, "issue", "%s; nothing was minted", w.Why)
	switch w.Code {
	case broker.CodeVaultPolicy, broker.CodeVaultIdentity:
		return e.With(w.Code)
	}
	return e.With(broker.CodeVaultDown).After(time.Second)
}

// probes are tokens with the policy of one tool each, by policy. The client keeps their accessors alone: Vault is asked
// for the rights of such a token, and nothing can use it. They end by themselves, or with the login.
type probes struct {
	mu   sync.Mutex // guards of; checks do not overlap, except of the doctor with itself
	of   map[string]probe
	next int // of the round, in the list of tools
}

type probe struct {
	accessor string
	parent   *node
	until    time.Time
}

// Limits of a round of checks.
const (
	probeLife     = 5 * time.Minute
	probesInRound = 64 // with more tools each round takes the next ones
)

// checkTools asks Vault whether each tool's policy permits its path, and the delegations' policy theirs.
func (c *Client) checkTools(ctx context.Context) []Condition {
	if c.cfg.Tools == nil {
		return nil
	}
	c.probes.mu.Lock()
	defer c.probes.mu.Unlock()
	c.mu.Lock()
	s, before := c.session, c.conditions
	c.mu.Unlock()
	all := c.cfg.Tools()
	if s == nil || len(all) == 0 {
		return nil
	}
	round := all
	if len(all) > probesInRound {
		at := c.probes.next % len(all)
		round = append(slices.Clone(all[at:]), all[:at]...)[:probesInRound]
		c.probes.next = at + probesInRound
	}
	found := make([]Condition, len(round)+1)
	_ = forEach(ctx, len(round), func(ctx context.Context, i int) error { // no f fails
		found[i] = c.checkTool(ctx, s, round[i])
		return nil
	})
	found[len(round)] = c.checkDelegation(ctx, s)
	for _, w := range before { // of tools that are not in this round
		if !slices.ContainsFunc(round, func(a Access) bool { return a.Tool == w.Tool }) &&
			slices.ContainsFunc(all, func(a Access) bool { return a.Tool == w.Tool }) {
			found = append(found, w)
		}
	}
	var distinct []Condition
	for _, w := range found {
		if w != (Condition{}) && !slices.Contains(distinct, w) {
			distinct = append(distinct, w)
		}
	}
	return distinct
}

func (c *Client) checkTool(ctx context.Context, s *node, a Access) Condition {
	can, wrong := c.capabilities(ctx, s, a.Policy, a.Path.String())
	if wrong != (Condition{}) {
		if wrong.Code == broker.CodeVaultPolicy {
			wrong.Tool = a.Tool
		}
		return wrong
	}
	need := []string{"read"}
	if a.Write {
		need = []string{"create", "update"}
	}
	if slices.ContainsFunc(need, func(n string) bool { return slices.Contains(can, n) }) {
		return Condition{}
	}
	return toolPolicyWrong(a.Tool, a.Policy, a.Path.String())
}

// toolPolicyWrong is the condition when a tool's policy does not permit its path.
func toolPolicyWrong(tool broker.ToolName, policy, path string) Condition {
	return Condition{Code: broker.CodeVaultPolicy, Tool: tool,
		Why: fmt.Sprintf("the policy %q in Vault is gone, or does not permit the tool's path", policy),
		Text: fmt.Sprintf("tool %s: the policy %q in Vault is gone, or does not permit %q; `pawl vault plan` prints it",
			tool, policy, path)}
}

// checkDelegation asks whether a delegation's token may create the tokens below it.
func (c *Client) checkDelegation(ctx context.Context, s *node) Condition {
	const path = "auth/token/create"
	can, wrong := c.capabilities(ctx, s, c.cfg.Delegation, path)
	if wrong != (Condition{}) || slices.Contains(can, "update") || slices.Contains(can, "create") {
		wrong.Tool = ""
		return wrong
	}
	return Condition{Code: codeBrokerPolicy, Why: "Vault refuses the tokens of delegations",
		Text: fmt.Sprintf("the policy %q of the delegations in Vault is gone, or does not permit %q; `pawl vault plan` prints it",
			c.cfg.Delegation, path)}
}

// capabilities asks for the rights of a token with one policy at a path. A failure that says nothing about the policy, as of a
// Vault that has just gone, gives the capabilities that the tool needs: the check of Vault itself reports that.
func (c *Client) capabilities(ctx context.Context, s *node, policy, path string) (can []string, wrong Condition) {
	unknown := []string{"read", "create", "update"}
	p, err := c.probe(ctx, s, policy)
	if err == nil {
		var resp response
		resp, err = c.ask(ctx, s, "sys/capabilities-accessor", map[string]any{"accessor": p.accessor, "paths": []string{path}})
		if err == nil {
			return textsOf(resp.Data[path]), Condition{}
		}
	}
	var f *failure
	if !errors.As(err, &f) {
		return unknown, Condition{}
	}
	if f.status != 429 {
		c.forgetProbe(policy)
	}
	switch {
	case errors.Is(err, errWider):
		return nil, Condition{Code: broker.CodeVaultPolicy, Why: "Vault's token role refuses the tool's policy",
			Text: fmt.Sprintf("the token role %q in Vault does not allow the policy %q", c.cfg.TokenRole, policy)}
	case f.status == 400 && f.phrase == "unknown role":
		return nil, Condition{Code: codeBrokerPolicy, Why: "Vault's token role for the broker is gone",
			Text: fmt.Sprintf("the token role %q in Vault is gone; `pawl vault plan` prints it", c.cfg.TokenRole)}
	case errors.Is(err, errForbidden) && !f.badToken():
		if p.accessor == "" {
			return nil, c.brokerPolicy("auth/token/create/" + c.cfg.TokenRole)
		}
		wrong = c.brokerPolicy("sys/capabilities-accessor")
		wrong.Warn = true // steps work; whether a tool's policy is there is not known
		return nil, wrong
	}
	return unknown, Condition{}
}

// probe returns the token with one policy, and makes it when there is none or its end is near.
func (c *Client) probe(ctx context.Context, s *node, policy string) (probe, error) {
	c.mu.Lock()
	p, ok := c.probes.of[policy]
	c.mu.Unlock()
	now := c.cfg.Now()
	if ok && p.parent == s && now.Before(p.until) {
		return p, nil
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	n, err := c.create(ctx, s, "auth/token/create/"+c.cfg.TokenRole, newToken{Policies: []string{policy},
		DisplayName: "pawl-check", TTL: formatTTL(probeLife), ExplicitMaxTTL: formatTTL(probeLife)})
	if err != nil {
		return probe{}, err
	}
	p = probe{accessor: n.accessor, parent: s, until: now.Add(probeLife / 2)}
	c.mu.Lock()
	c.probes.of[policy] = p
	c.mu.Unlock()
	return p, nil
}

func (c *Client) forgetProbe(policy string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.probes.of, policy)
}
