package policy_test

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/policy"
)

// TestClaimsAreNotTrusted checks that no permit depends on an agent's own word by accident. An agent that writes
// "urgent" is an agent that writes.
func TestClaimsAreNotTrusted(t *testing.T) {
	permit := func(when string) string {
		return `permit(principal in TrustDomain::"acme.example", action == Action::"use", resource == Tool::"db.read") ` + when + ";"
	}
	for _, tt := range []struct{ cedar, want string }{
		{permit(`when { context.claimed.task == "urgent" }`), "permits by context.claimed"},
		{permit(`when { context.claimed.labels has team }`), "permits by context.claimed"},
		{permit(`when { context has claimed }`), "permits by context.claimed"},
		{permit(`unless { context.claimed.task == "idle" }`), "permits by context.claimed"},
		{permit(`when { context["claimed"]["task"] == "urgent" }`), "permits by context.claimed"},
		{permit(`when { (if true then context else context).claimed.task == "urgent" }`), "permits by context.claimed"},
		{permit(`when { {c: context}.c.claimed.task == "urgent" }`), "permits by context.claimed"},
		{permit(`when { [context].contains(context) }`), "permits by context.claimed"},
		{permit(`when { context.args.env == "x" } when { context.claimed.task like "*urgent*" }`), "permits by context.claimed"},
		{`@trusts_claims ` + permit(`when { context.claimed.task == "urgent" }`), ""},
		{`@trusts_claims("task") ` + permit(`when { context.claimed.task == "urgent" }`), "@trusts_claims: takes no value"},
		{`@trusts_claims ` + permit(`when { context has task }`), "do not read context.claimed"},
		{`@trusts_claims forbid(principal, action, resource) when { context.claimed.task == "x" };`, "belongs on a permit"},
		{`forbid(principal, action, resource) when { context.claimed.task == "x" };`, ""},
	} {
		_, err := policy.Build(sources(tt.cedar))
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("Build of %s = %v, want %q", tt.cedar, err, tt.want)
		}
	}
}
