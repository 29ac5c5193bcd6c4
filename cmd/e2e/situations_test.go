package e2e_test

import (
	"os"
	"slices"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

// Four situations of the product's users, each with an example bundle. broker/policy tests each decision of these
// bundles; here agents with their own SVIDs play them end to end.

func situation(t *testing.T, name string) *stage {
	t.Helper()
	return newStage(t, os.DirFS("../../broker/policy/testdata/"+name))
}

// refused fails unless a step is refused with the code, decided by exactly these policies.
func (s *stage) refused(d *agent.Delegation, tool string, args agent.Args, code broker.Code, policies ...string) *agent.Error {
	s.t.Helper()
	step, err := d.Begin(s.t.Context(), agent.Call{Tool: tool, Args: args})
	if err == nil {
		s.t.Fatalf("Begin(%s, %v) gave grant %s, want %s", tool, args, step.Grant().ID, code)
	}
	p := refusal(s.t, tool, err, api.KindDenied, code)
	if !slices.Equal(p.Policies, policies) {
		s.t.Errorf("Begin(%s, %v) was decided by %v, want %v", tool, args, p.Policies, policies)
	}
	return p
}

// approval fails unless the step is refused only for a missing approval, and the refusal names the approvers.
func (s *stage) approval(d *agent.Delegation, tool string, args agent.Args, by string, policies ...string) *agent.Error {
	s.t.Helper()
	p := s.refused(d, tool, args, broker.CodeApprovalNeeded, policies...)
	if !slices.Equal(p.Missing, []string{"approval:" + by}) || p.Remedy == "" || p.Revocation != "" {
		s.t.Errorf("Begin(%s) is missing %v, with remedy %q and revocation %q; want only the approval of %s", tool, p.Missing, p.Remedy, p.Revocation, by)
	}
	return p
}

// advises fails unless a refusal has the bundle's own remedy.
func advises(t *testing.T, p *agent.Error, want string) {
	t.Helper()
	if p.Remedy != want {
		t.Errorf("the remedy of %s is %q, want %q", p.Code, p.Remedy, want)
	}
}

// ended fails unless a chain is revoked: its secrets are dead, its agents are notified, and further steps are refused.
func (s *stage) ended(d *agent.Delegation, tool string, args agent.Args, revocation string, held ...holding) {
	s.t.Helper()
	s.closed(revocation, len(held))
	for _, h := range held {
		if s.target.Login(h.secret) {
			s.t.Error("a secret works after the revocation was closed")
		}
		endsRevoked(s.t, "its holder", h.step.Context())
	}
	mustRefuse(s.t, "a step after the chain was revoked", s.asks(d, tool, args), agent.ErrRevoked)
}

// TestSupportAgentAsksBeforeARestart: the agent reads its ticket and inspects hosts alone. It gets no secret for a
// restart without an approval.
func TestSupportAgentAsksBeforeARestart(t *testing.T) {
	desk := newHelpDesk(t)
	s := newStage(t, desk.names(t, "../../broker/policy/testdata/support"))
	all := rights("tickets.read", "host.inspect", "host.restart")
	claimed := s.open("/support/agent", agent.Chain{Rights: all, Labels: map[string]string{"ticket": "T-17"}})
	s.refused(claimed, "tickets.read", agent.Args{"ticket": "T-17"}, broker.CodePolicyDenied)
	d := s.open("/support/agent", agent.Chain{Rights: all,
		Envelope: desk.ticket(t, s.identities.ID("/support/agent").String(), "T-17")})
	restart := agent.Args{"host": "test-3", "service": "web"}

	s.do(d, "tickets.read", agent.Args{"ticket": "T-17"})
	advises(t, s.refused(d, "tickets.read", agent.Args{"ticket": "T-18"}, broker.CodePolicyDenied), "open the chain with the help desk's envelope for the ticket, and ask for that ticket")
	advises(t, s.refused(d, "host.restart", restart, broker.CodePolicyDenied, "look-before-restart"), "inspect the host first")
	s.do(d, "host.inspect", agent.Args{"host": "test-3"})
	advises(t, s.approval(d, "host.restart", restart, "1 of oncall", "support-restarts"), "raise it in the channel of whoever is on call, with the ticket")
	advises(t, s.approval(d, "host.restart", agent.Args{"host": "prod-1", "service": "web"}, "2 of oncall", "support-restarts", "support-restarts-production"),
		"production: two of those on call, with the change number; raise it in the channel of whoever is on call, with the ticket")
	s.refused(d, "host.restart", agent.Args{"host": "test-3", "service": "database"}, broker.CodeArgumentOutside)
	s.do(d, "host.inspect", agent.Args{"host": "prod-1"}) // the refusals used no budget
	if alive := s.target.Alive(); len(alive) != 0 {
		t.Errorf("%d secrets are alive although every step was closed", len(alive))
	}
}

// TestCIAssistantStaysInItsPolicy: the assistant chooses its steps, inside the repositories and environments of the
// signed bundle. A deployment to production revokes its chain.
func TestCIAssistantStaysInItsPolicy(t *testing.T) {
	s := situation(t, "ci")
	assistant := s.open("/ci/assistant", agent.Chain{Rights: rights("repo.read", "repo.write", "deploy"), Depth: 1})
	web := agent.Args{"repository": "web"}

	s.do(assistant, "repo.read", web)
	s.do(assistant, "repo.write", agent.Args{"repository": "api"})
	s.refused(assistant, "repo.read", agent.Args{"repository": "payroll"}, broker.CodePolicyDenied)
	// The assistant itself may never deploy.
	s.refused(assistant, "deploy", agent.Args{"repository": "web", "environment": "staging"}, broker.CodePolicyDenied)

	deployer := s.share(assistant, "/ci/deployer", agent.Share{Rights: []agent.Right{{Tool: "deploy", Use: true, Args: map[string]agent.Constraint{"repository": agent.OneOf("web")}}}})
	s.refused(deployer, "deploy", agent.Args{"repository": "api", "environment": "test"}, broker.CodeArgumentOutside)
	s.do(deployer, "deploy", agent.Args{"repository": "web", "environment": "staging"})
	advises(t, s.refused(deployer, "deploy", agent.Args{"repository": "web", "environment": "staging"}, broker.CodePolicyDenied, "ten-minutes-between-stagings"),
		"pawl explain lists the policies that were evaluated; ask their owners") // the bundle has no remedy of its own

	reading := s.hold(assistant, "repo.read", web)
	deploying := s.hold(deployer, "deploy", agent.Args{"repository": "web", "environment": "test"})
	p := s.refused(deployer, "deploy", agent.Args{"repository": "web", "environment": "production"}, broker.CodeViolation, "production-is-for-people")
	s.ended(assistant, "repo.read", web, p.Revocation, reading, deploying)
}

// TestProcurementBotConnectsToWhatIsNamed: an integration in the policy waits for approval, and any other one revokes
// the chain.
func TestProcurementBotConnectsToWhatIsNamed(t *testing.T) {
	s := situation(t, "procurement")
	bot := s.open("/procurement/bot", agent.Chain{Rights: rights("catalogue.read", "order.create", "integration.add")})
	catalogue := agent.Args{"tables": []string{"offers", "suppliers"}}

	s.do(bot, "catalogue.read", catalogue)
	s.do(bot, "order.create", agent.Args{"supplier": "paper-inc", "amount": 500})
	advises(t, s.approval(bot, "order.create", agent.Args{"supplier": "paper-inc", "amount": 501}, "1 of buyers", "bot-orders-more"), "have it approved by 1 of buyers")
	s.approval(bot, "integration.add", agent.Args{"integration": "erp", "scopes": []string{"read"}}, "1 of platform", "bot-adds-integrations")
	s.refused(bot, "integration.add", agent.Args{"integration": "erp", "scopes": []string{"read", "admin"}}, broker.CodePolicyDenied)
	s.refused(bot, "payment.send", nil, broker.CodeToolUnknown)

	held := s.hold(bot, "catalogue.read", catalogue)
	p := s.refused(bot, "integration.add", agent.Args{"integration": "pastebin", "scopes": []string{"read"}}, broker.CodeViolation, "unnamed-integrations")
	advises(t, p, "have the platform team name the integration in the bundle")
	s.ended(bot, "catalogue.read", catalogue, p.Revocation, held)
}

// TestCopilotStopsBeforeContainment: the copilot reads and proposes. Only the responder contains, with the incident
// lead's approval. Touching the evidence freezes the copilot everywhere.
func TestCopilotStopsBeforeContainment(t *testing.T) {
	s := situation(t, "copilot")
	all := rights("alert.read", "contain.isolate", "contain.disable", "evidence.delete")
	copilot := s.open("/security/copilot", agent.Chain{Rights: all, Depth: 1})
	alerts, host := agent.Args{"tables": []string{"alerts"}}, agent.Args{"host": "web-3"}

	reading := s.hold(copilot, "alert.read", alerts)
	p := s.refused(copilot, "contain.isolate", host, broker.CodeViolation, "copilot-stops-before-containment")
	advises(t, p, "delegate to spiffe://acme.example/security/responder")
	if p.Revocation != "" || !s.target.Login(reading.secret) {
		t.Error("asking for containment caused a revocation; the policy has revoke-step, and there was no step")
	}

	contain := agent.Share{Rights: rights("contain.isolate", "contain.disable")}
	if _, err := copilot.Delegate(t.Context(), s.identities.ID("/security/intern").String(), contain); err == nil {
		t.Error("containment was delegated to an intern")
	} else {
		refusal(t, "Delegate to an intern", err, api.KindDenied, broker.CodePolicyDenied)
	}
	responder := s.share(copilot, "/security/responder", contain)
	s.approval(responder, "contain.isolate", host, "1 of incident-lead", "responder-contains")
	s.refused(responder, "contain.disable", agent.Args{"account": "eve"}, broker.CodeNarrowingTooWeak, "responder-contains")

	elsewhere := s.open("/security/copilot", agent.Chain{Rights: all})
	p = s.refused(copilot, "evidence.delete", nil, broker.CodeViolation, "evidence-stays")
	s.ended(copilot, "alert.read", alerts, p.Revocation, reading)
	_, err := elsewhere.Begin(t.Context(), agent.Call{Tool: "alert.read", Args: alerts})
	refusal(t, "a step of the copilot in another chain", err, api.KindRevoked, broker.CodeFrozen)
}
