package attest_test

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
)

// TestCompanions accepts a JWT-SVID that names a configured audience beside ours. The refusal of any other one names it
// and both remedies.
func TestCompanions(t *testing.T) {
	k, c := newKeys(t), &clock{start}
	for name, row := range map[string]struct {
		aud     string // JSON
		refusal string // part of its text; empty: accepted
	}{
		"ours":                {`"` + audience + `"`, ""},
		"a companion too":     {`["` + audience + `","vault"]`, ""},
		"in another order":    {`["vault","orders","` + audience + `"]`, ""},
		"a companion alone":   {`["vault"]`, "once"},
		"another too":         {`["` + audience + `","vault","mail"]`, `"mail" too`},
		"another alone":       {`["mail"]`, "jwt_companions"},
		"a companion twice":   {`["` + audience + `","vault","vault"]`, "once"},
		"ours twice":          {`["` + audience + `","` + audience + `"]`, "once"},
		"ours twice, and one": {`["` + audience + `","` + audience + `","vault"]`, "once"},
		"a companion's case":  {`["` + audience + `","Vault"]`, `"Vault" too`},
		"lines":               {`["` + audience + `","a\nb"]`, `"a\nb" too`},
		"long":                {`["` + audience + `","` + strings.Repeat("a", 4000) + `"]`, strings.Repeat("a", 90)},
		"not a text":          {`["` + audience + `",1]`, "once"},
		"empty":               {`["` + audience + `",""]`, `"" too`},
	} {
		a := k.attestor(t, c, func(conf *attest.Config) { conf.Companions = []string{"vault", "orders"} })
		token := compact(t, k["ES256"], "ES256", es256, claims(`"aud":`+row.aud))
		_, err := a.Identify(request(nil, "Bearer "+token))
		if row.refusal == "" {
			if err != nil {
				t.Errorf("%s: Identify() = %v, want accepted", name, err)
			}
			continue
		}
		refused(t, name, err, broker.Unauthenticated, token)
		if text := err.Error(); !strings.Contains(text, row.refusal) || strings.Contains(text, "\n") || len(text) > 400 {
			t.Errorf("%s: Identify() = %v, want %q in one line", name, err, row.refusal)
		}
	}
	for name, change := range map[string]func(*attest.Config){
		"an empty companion":             func(c *attest.Config) { c.Companions = []string{""} },
		"companions without an audience": func(c *attest.Config) { c.JWT, c.Audience, c.Companions = nil, "", []string{"vault"} },
	} {
		conf := attest.Config{TrustDomains: []string{"example.org"}, Source: newIssuer(t).source(), Audience: audience,
			JWT: jwtbundle.NewSet()}
		change(&conf)
		if _, err := attest.New(conf); err == nil {
			t.Errorf("New() with %s = nil, want an error", name)
		}
	}
}
