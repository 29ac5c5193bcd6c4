package e2e_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestLoginByJWTSVID: a broker that logs in to Vault with its JWT-SVID can do everything that one with an X.509-SVID
// can, including its own database logins.
func TestLoginByJWTSVID(t *testing.T) {
	t.Parallel()
	need(t, true)
	env := newEnv(t, dev.Config{})
	tokens, err := workloadapi.NewJWTSource(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(env.Config.WorkloadAPI)))
	if err != nil {
		t.Fatal(err)
	}
	defer tokens.Close() //nolint:errcheck // closing only stops the watch
	loginByJWT(t, env, tokens)
	w := newWorld(t, env, func(c *wire.Config) { c.Vault.Auth, c.Vault.Audience = "jwt", vaultAudience })
	w.here(nil, nil)
	d, err := w.agent("planner").Open(t.Context(), agent.Chain{Task: "login", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		t.Fatal(err)
	}
	w.healthy(d)
	w.allClosed(2 * bound)
	w.oracle.untilNone(w.before, bound)
}
