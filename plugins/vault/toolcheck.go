package vault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

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
