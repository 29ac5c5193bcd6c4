package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/dev"
)

// TestOperatorSeesStandby has the node at vault.address step down. While it forwards requests to the active node nothing
// is wrong. When the network between the nodes is cut, it redirects clients, and that is named like every fault.
func TestOperatorSeesStandby(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s := newSeen(ctx, t, dev.Config{NoPostgres: true, StandbyVault: true})
	node := s.env.Vault
	s.healthy("before")

	if err := node.StepDown(ctx); err != nil {
		t.Fatal(err)
	}
	s.answers(http.StatusTooManyRequests)
	s.within("a standby that forwards", func() string { // once it has found the new active node
		if found := s.env.Broker.Vault.Check(ctx); len(found) > 0 {
			return fmt.Sprintf("the check found %+v, want nothing", found)
		}
		return ""
	})
	s.healthy("with a standby that forwards")
	if out, err := runDoctor(ctx, s.env.ConfigFile); err != nil || !strings.Contains(out, "is unsealed, a standby") {
		t.Errorf("a standby that forwards: pawl doctor = %v\n%s\nwant everything ok, and the standby", err, out)
	}

	row := fault{name: "a standby that does not reach the active node", ready: 503,
		tool: "notes.read", code: "vault_unavailable", retryable: true, condition: `code="vault_standby",part="vault"`,
		detail:   "Vault is a standby that does not reach an active node",
		names:    []string{"vault_standby", "Vault at " + node.Address() + " is a standby that does not get requests to an active node"},
		sabotage: node.Cut, repair: node.Mend}
	if err := row.sabotage(); err != nil {
		t.Fatal(err)
	}
	s.named(ctx, row)
	s.answers(474) // Vault's own heartbeats fail too
	if found := s.env.Broker.Vault.Check(ctx); len(found) != 1 || found[0].Code != "vault_standby" {
		t.Errorf("%s: the check found %+v, want vault_standby", row.name, found)
	}
	if err := row.repair(); err != nil {
		t.Fatal(err)
	}
	s.answers(http.StatusTooManyRequests)
	s.healthy("after " + row.name)
}

// answers waits until Vault answers a request for its health with a status. A standby takes its own time to find the
// active node, or to notice that it has lost it.
func (s *seen) answers(status int) {
	s.t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.env.Vault.CAPEM())
	c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{RootCAs: roots}}}
	s.withinTime(time.Minute, "the health of Vault", func() string {
		answer, err := c.Get(s.env.Vault.Address() + "/v1/sys/health")
		if err != nil {
			return err.Error()
		}
		_ = answer.Body.Close() // only the status counts
		if answer.StatusCode != status {
			return fmt.Sprintf("GET sys/health = %d, want %d", answer.StatusCode, status)
		}
		return ""
	})
}
