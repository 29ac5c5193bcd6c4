package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// The codes of conditions. An operator sees them in /readyz, in the metric pawl_condition and in the doctor.
const (
	codeUnreachable   broker.Code = "vault_unreachable"   // no answer
	codeSealed        broker.Code = "vault_sealed"        // sealed
	codeUninitialized broker.Code = "vault_uninitialized" // not initialised
	codeStandby       broker.Code = "vault_standby"       // a standby that reaches no active node
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
	case http.StatusTooManyRequests, 472, 473: // a standby, one of disaster recovery, one for performance
		return wrong(codeStandby, "Vault is a standby without an active node",
			"is a standby that does not reach an active node: %v", cause)
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
		known.Code != broker.CodeVaultDown && known.Code != broker.CodeVaultRefused {
		return err
	}
	for _, w := range c.Conditions() {
		if w.general() {
			return c.refusal(w).Because(err)
		}
	}
	return err
}

// reachable returns an error when Vault has not answered the last checks.
func (c *Client) reachable() error {
	c.mu.Lock()
	silent := c.silent >= silentChecks
	c.mu.Unlock()
	if silent {
		return c.told(errSilent)
	}
	return nil
}

var errSilent = errors.New("not asked: vault did not answer the last checks")

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
