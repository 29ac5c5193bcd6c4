package e2e_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
)

// tally counts the requests to the next handler by kind.
type tally struct {
	next http.Handler

	mu      sync.Mutex // guards the fields below
	kills   int
	fetched int // revocation lists, and lists of leases
	made    int // times that the lists were rebuilt
}

func (a *tally) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	switch path := r.URL.Path; {
	case path == killPath:
		a.kills++
	case path == "/v1/pki/crl/rotate":
		a.made++
	case path == "/v1/pki/crl", strings.HasSuffix(path, "/crl/der"), r.Method == "LIST":
		a.fetched++
	}
	a.mu.Unlock()
	a.next.ServeHTTP(w, r)
}

// TestManyCertificates revokes chains with some hundred certificates while Vault updates its revocation list late. When
// they are CLOSED the served list has each certificate. Vault was asked once to end each token, and a few times for a
// list, not once for each certificate.
func TestManyCertificates(t *testing.T) {
	need(t, false)
	const chains, each = 8, 30
	env := newEnv(t, dev.Config{NoPostgres: true})
	root, err := env.Vault.Client()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.Logical().WriteWithContext(t.Context(), "pki/config/crl", map[string]any{"auto_rebuild": true, "expiry": "72h"}); err != nil {
		t.Fatal(err)
	}
	p := newProxy(t, env)
	count := &tally{next: p}
	p.server.Config.Handler = count
	w := newWorld(t, env, nil)
	p.use(t, &w.config)
	w.here(nil, nil)

	var wg sync.WaitGroup
	serials := make([][]string, chains)
	for c := range chains {
		wg.Go(func() {
			d, err := w.agent(fmt.Sprintf("planner-%d", c)).Open(t.Context(), agent.Chain{Task: "many", Rights: []agent.Right{{Tool: "tls.call", Use: true}}})
			for range each {
				var s *agent.Step
				if err == nil {
					s, err = d.Begin(t.Context(), agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}})
				}
				if err == nil {
					serials[c] = append(serials[c], s.Secret().Field("serial_number"))
				}
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	rv, err := w.operator().Revoke(ctx, api.RevokeRequest{Selector: "tool:tls.call", Reason: "many"})
	if err == nil {
		err = w.operator().Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil })
	}
	if err != nil || rv.Closure != string(broker.ClosureClosed) || rv.Dead != chains*each {
		t.Fatalf("Revoke() = %s with %d dead, %v; want CLOSED with %d", rv.Closure, rv.Dead, err, chains*each)
	}
	list, err := x509.ParseRevocationList(w.oracle.fetch("/v1/pki/crl"))
	if err != nil {
		t.Fatal(err)
	}
	on := map[string]bool{}
	for _, e := range list.RevokedCertificateEntries {
		on[e.SerialNumber.Text(16)] = true
	}
	for _, some := range serials {
		for _, s := range some {
			if !on[strings.TrimLeft(strings.ReplaceAll(s, ":", ""), "0")] {
				t.Fatal("a certificate that was called dead is not on the list that Vault serves")
			}
		}
	}
	count.mu.Lock()
	defer count.mu.Unlock()
	t.Logf("for %d certificates: %d tokens ended, %d lists fetched, %d rebuilt", chains*each, count.kills, count.fetched, count.made)
	if count.kills > chains*each+2*chains || count.fetched > 60 || count.made > 20 || count.made == 0 {
		t.Errorf("Vault was asked to end %d tokens, for %d lists and for %d rebuilds; want at most %d, 60 and 20",
			count.kills, count.fetched, count.made, chains*each+2*chains)
	}
}
