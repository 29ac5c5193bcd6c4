package policy

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	scope "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/pawlsec/pawl/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// rule is one Cedar policy with its parsed annotations.
type rule struct {
	id     cedar.PolicyID
	where  string // file:line
	policy *cedar.Policy
	when   *cedar.Policy // its conditions alone, to evaluate once the scope matches
	forbid bool
	reads  reads

	trusts      bool // @trusts_claims
	named, per  bool // @id, @per
	violation   bool // sets a consequence
	consequence broker.Consequence

	approval  approval
	ttl       time.Duration // zero: no limit
	narrowing broker.Narrowing
	domains   []string
	caps      broker.Caps
	limit     broker.Limit
	window    time.Duration // of context.caller; zero: it is not read
	remedy    string
	open      []string // the parts that @any leaves open
}

// approval is "2 of oncall"; the zero approval requires none.
type approval struct {
	count int
	group string
}

// newRule returns a rule with its position even if it fails.
func newRule(p *cedar.Policy, id cedar.PolicyID) (*rule, error) {
	at := p.Position()
	r := &rule{id: id, policy: p, forbid: p.Effect() == cedar.Forbid, where: fmt.Sprintf("%s:%d", at.Filename, at.Line)}
	for _, a := range r.scope().Annotations {
		if err := r.annotate(string(a.Key), string(a.Value)); err != nil {
			return r, fmt.Errorf("@%s: %w", a.Key, err)
		}
	}
	conditions := *r.scope()
	conditions.Principal, conditions.Action, conditions.Resource = scope.ScopeTypeAll{}, scope.ScopeTypeAll{}, scope.ScopeTypeAll{}
	r.when = cedar.NewPolicyFromAST((*ast.Policy)(&conditions))
	r.reads = readsOf(r.scope(), every())
	if err := r.checkReach(); err != nil {
		return r, err
	}
	if err := r.checkClaims(); err != nil {
		return r, err
	}
	if err := r.checkCaller(); err != nil {
		return r, err
	}
	return r, r.checkOpen()
}

// checkCaller refuses a limit or a window that has no effect, and a rule over the caller's history without a window. A
// limit counts under the id of its policy, so the id must not change when another policy is added before it.
func (r *rule) checkCaller() error {
	_, reads := r.reads["caller"]
	limited := r.limit.Steps > 0
	switch {
	case r.per && !limited:
		return errors.New("@per: there is no @limit")
	case limited && !r.named:
		return errors.New("@limit: needs an @id, under which the steps are counted")
	case r.window > 0 && !reads:
		return errors.New("@window: the conditions do not read context.caller")
	case reads && r.window == 0:
		return errors.New("reads context.caller; say over which time with @window(\"24h\")")
	case (limited || r.window > 0) && !slices.Equal(r.actions(), []broker.Action{broker.ActionUse}):
		return errors.New("@limit and @window apply to Action::\"use\" only; write a separate policy for the other actions")
	}
	if limited {
		r.limit.Policy = string(r.id)
	}
	return nil
}

// checkClaims refuses a permit that depends on what an agent says of itself, unless it says so. A forbid may read
// claims, since it only takes away.
func (r *rule) checkClaims() error {
	_, reads := r.reads["claimed"]
	switch {
	case r.forbid || reads == r.trusts:
		return nil
	case reads:
		return errors.New("permits by context.claimed, or by the whole context with it, which is the agent's own word; read context.task, context.labels " +
			"or context.on_behalf_of of a signed envelope, or add @trusts_claims")
	}
	return errors.New("@trusts_claims: the conditions do not read context.claimed")
}

// checkReach refuses limits that nothing would enforce. The broker enforces approval, TTL and narrowing only for a
// step, caps only when a chain is opened, and trust domains only for a delegation.
func (r *rule) checkReach() error {
	limits := r.approval.count > 0 || r.ttl > 0 || r.narrowing > broker.NarrowNone
	if limits && !slices.Equal(r.actions(), []broker.Action{broker.ActionUse}) {
		return errors.New("@approval, @ttl and @narrowing apply to Action::\"use\" only; write a separate permit for the other actions")
	}
	if !reflect.ValueOf(r.caps).IsZero() && !slices.Equal(r.actions(), []broker.Action{broker.ActionOpen}) {
		return errors.New("@max_steps, @max_depth, @max_ttl, @labels and @requires_labels apply to Action::\"open\" only; " +
			"write a separate permit for the other actions")
	}
	if len(r.domains) > 0 && !slices.Contains(r.actions(), broker.ActionDelegate) {
		return errors.New("@domains: the scope does not include Action::\"delegate\"")
	}
	return nil
}

func (r *rule) scope() *scope.Policy { return (*scope.Policy)(r.policy.AST()) }

func (r *rule) annotate(key, value string) (err error) {
	switch key {
	case "id":
		r.id, r.named = cedar.PolicyID(value), true
		if !plainName(strings.NewReplacer("/", "-", "#", "-", ":", "-").Replace(value)) {
			return fmt.Errorf("%.60q must be letters, digits and any of -_./#:", value)
		}
		return nil
	case "description", "remedy":
		if key == "remedy" {
			r.remedy = value
		}
		if len(value) > 256 {
			return errors.New("longer than 256 bytes")
		}
		return nil
	case "window":
		r.window, err = parseWindow(value)
		return err
	case "violation":
		if !r.forbid {
			return errors.New("belongs on a forbid")
		}
		if r.consequence, r.violation = broker.ParseConsequence(value); !r.violation {
			return fmt.Errorf("%.40q is not deny, revoke-step, revoke-subtree, revoke-chain or freeze-caller", value)
		}
		return nil
	}
	if r.forbid && slices.Contains(onPermits, key) {
		return errors.New("belongs on a permit")
	}
	switch key {
	case "approval":
		r.approval, err = parseApproval(value)
	case "ttl":
		r.ttl, err = parseTTL(value)
	case "narrowing":
		r.narrowing, err = broker.ParseNarrowing(value)
	case "domains":
		r.domains, err = parseDomains(value)
	case "limit":
		per := r.limit.Label
		r.limit, err = parseLimit(value)
		r.limit.Label = per
	case "per":
		r.per = true
		r.limit.Label, err = parsePer(value)
	case "trusts_claims":
		if r.trusts = true; value != "" {
			err = errors.New("takes no value")
		}
	case "any":
		r.open = strings.Fields(value)
	default:
		return parseCap(&r.caps, key, value)
	}
	return err
}

// onPermits are the annotations of permits alone.
var onPermits = []string{"approval", "ttl", "narrowing", "domains", "any", "trusts_claims", "limit", "per", "max_steps", "max_depth",
	"max_ttl", "labels", "requires_labels"}

func parseApproval(s string) (approval, error) {
	n, group, ok := strings.Cut(s, " of ")
	count, err := strconv.Atoi(n)
	if _, bad := broker.ParseToolName(group); !ok || err != nil || bad != nil || count < 1 || count > 9 || n != strconv.Itoa(count) {
		return approval{}, fmt.Errorf("%.60q is not like \"2 of oncall\"", s)
	}
	return approval{count, group}, nil
}

func parseDomains(s string) ([]string, error) {
	domains := strings.Fields(s)
	for _, d := range domains {
		if td, err := spiffeid.TrustDomainFromString(d); err != nil || td.Name() != d {
			return nil, fmt.Errorf("%.60q is not a trust domain name", d)
		}
	}
	if len(domains) < 2 {
		return nil, errors.New("needs the trust domains of both sides, so at least two")
	}
	return domains, nil
}

// actions returns the actions that the scope names, or all four if it names none.
func (r *rule) actions() (names []broker.Action) {
	var uids []cedar.EntityUID
	switch s := r.scope().Action.(type) {
	case scope.ScopeTypeEq:
		uids = []cedar.EntityUID{s.Entity}
	case scope.ScopeTypeIn:
		uids = []cedar.EntityUID{s.Entity}
	case scope.ScopeTypeInSet:
		uids = s.Entities
	default:
		return actions()
	}
	for _, uid := range uids {
		if a := broker.Action(uid.ID); uid.Type == typeAction && !slices.Contains(names, a) {
			names = append(names, a)
		}
	}
	return names
}

// subject returns the principal entity in the scope ("==" or "in"), or the zero UID for any principal.
func (r *rule) subject() cedar.EntityUID { return target(r.scope().Principal) }

// object does the same for the resource.
func (r *rule) object() cedar.EntityUID { return target(r.scope().Resource) }

// canMatch reports whether the scope can match at all. The principal is always an Agent and the resource a Tool;
// neither can be equal to a group.
func (r *rule) canMatch() bool {
	return isOf(r.scope().Principal, typeAgent) && isOf(r.scope().Resource, typeTool)
}

func isOf(s scope.IsScopeNode, t cedar.EntityType) bool {
	switch s := s.(type) {
	case scope.ScopeTypeEq:
		return s.Entity.Type == t
	case scope.ScopeTypeIs:
		return s.Type == t
	case scope.ScopeTypeIsIn:
		return s.Type == t
	}
	return true
}

func target(s scope.IsScopeNode) cedar.EntityUID {
	switch s := s.(type) {
	case scope.ScopeTypeEq:
		return s.Entity
	case scope.ScopeTypeIn:
		return s.Entity
	case scope.ScopeTypeIsIn:
		return s.Entity
	}
	return cedar.EntityUID{}
}

// checkOpen requires @any on a permit for any principal, action or tool, and refuses @any elsewhere. A scope is then
// never left open by accident. A forbid needs no @any, because it only takes away.
func (r *rule) checkOpen() error {
	if r.forbid {
		return nil
	}
	var open []string
	if r.subject().IsZero() {
		open = append(open, "principal")
	}
	if _, any := r.scope().Action.(scope.ScopeTypeAll); any {
		open = append(open, "action")
	}
	if r.object().IsZero() {
		open = append(open, "tool")
	}
	for _, part := range open {
		if !slices.Contains(r.open, part) {
			return fmt.Errorf("permits any %s; if intended, add @any(%q)", part, strings.Join(open, " "))
		}
	}
	for _, part := range r.open {
		if !slices.Contains(open, part) {
			return fmt.Errorf("@any: %.20q is not left open by the scope", part)
		}
	}
	return nil
}
