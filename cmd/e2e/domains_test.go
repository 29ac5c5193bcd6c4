package e2e_test

import (
	"slices"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

const partnerTools = `
tools:
  - {name: db.read, backend: shop, narrowing: native, vault: {policy: pawl-read, path: database/read}}
  - {name: db.write, backend: shop, narrowing: native, vault: {policy: pawl-write, path: database/write}}
  - {name: mail.send, backend: shop, narrowing: native, vault: {policy: pawl-mail, path: database/mail}}
`

const partnerPolicy = `
@id("work")
@any("tool")
permit (principal in TrustDomain::"acme.example", action in [Action::"open", Action::"delegate", Action::"use"], resource);

@id("partner-reads")
@domains("acme.example partner.example")
permit (principal in TrustDomain::"acme.example", action == Action::"delegate", resource == Tool::"db.read");

@id("other-mails")
@domains("acme.example other.example")
permit (principal in TrustDomain::"acme.example", action == Action::"delegate", resource == Tool::"mail.send");
`

// TestDelegationAcrossTrustDomains: a delegation to another trust domain needs a permit of the signed bundle that names
// both domains, regardless of all other permits. The refusal names that permit as missing.
func TestDelegationAcrossTrustDomains(t *testing.T) {
	const partner = "spiffe://partner.example/agent"
	s := newStage(t, authors(map[string]string{"bundle.yaml": "{name: partners, version: 1}", "tools.yaml": partnerTools, "main.cedar": partnerPolicy}))
	planner := s.open("/planner", agent.Chain{Rights: rights("db.read", "db.write", "mail.send"), Depth: 2})
	for _, row := range []struct {
		tools    []string
		policies []string // that decided
	}{
		{[]string{"db.write"}, []string{"work"}},
		{[]string{"mail.send"}, []string{"other-mails", "work"}}, // its permit names two other domains
		{[]string{"db.read", "db.write"}, []string{"work"}},
	} {
		_, err := planner.Delegate(t.Context(), partner, agent.Share{Rights: rights(row.tools...)})
		p := refusal(t, "Delegate", err, api.KindDenied, broker.CodeForeignDomain)
		if !slices.Equal(p.Policies, row.policies) || !slices.Equal(p.Missing, []string{"domain:partner.example"}) || p.Remedy == "" {
			t.Errorf("Delegate of %v: decided by %v, missing %v, remedy %q; want %v and both trust domains", row.tools, p.Policies, p.Missing, p.Remedy, row.policies)
		}
	}
	// Inside one trust domain no permit needs to name it.
	s.do(s.share(planner, "/writer", agent.Share{Rights: rights("db.write")}), "db.write", nil)

	id, err := planner.Delegate(t.Context(), partner, agent.Share{Rights: rights("db.read")})
	if err != nil {
		t.Fatalf("Delegate of a tool with a permit that names both trust domains = %v", err)
	}
	chains, err := s.operator().Chains(t.Context(), false)
	if err != nil || len(chains) != 1 {
		t.Fatalf("chains = %v, %v; want the one", chains, err)
	}
	v, err := s.operator().Chain(t.Context(), chains[0].Chain.ID)
	if err != nil {
		t.Fatal(err)
	}
	var abroad []string
	for _, d := range v.Delegations {
		if d.Holder == partner {
			abroad = append(abroad, d.ID)
		}
	}
	if !slices.Equal(abroad, []string{string(id)}) {
		t.Errorf("%s holds %v, want only %s", partner, abroad, id)
	}
}
