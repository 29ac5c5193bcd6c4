package attest_test

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// TestSPIRE authenticates this process by the X.509-SVID and the JWT-SVID from a real SPIRE.
func TestSPIRE(t *testing.T) {
	spire := parts.NeedSPIRE(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	server, agent := "spiffe://"+spire.TrustDomain()+"/attest/pawl", "spiffe://"+spire.TrustDomain()+"/attest/agent"
	for _, id := range []string{server, agent} {
		if err := spire.Entry(ctx, id); err != nil {
			t.Fatalf("Entry(%s) = %v", id, err)
		}
	}
	api := workloadapi.WithClientOptions(workloadapi.WithAddr(spire.WorkloadAPI()))
	source := func(id string) *workloadapi.X509Source {
		s, err := workloadapi.NewX509Source(ctx, api, workloadapi.WithDefaultX509SVIDPicker(pick(id)))
		if err != nil {
			t.Fatalf("NewX509Source = %v", err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	ours, theirs := source(server), source(agent)
	jwts, err := workloadapi.NewJWTSource(ctx, api)
	if err != nil {
		t.Fatalf("NewJWTSource = %v", err)
	}
	defer jwts.Close()
	// This SPIRE issues SVIDs for one hour, JWT-SVIDs too.
	a := newAttestor(t, attest.Config{
		TrustDomains: []string{spire.TrustDomain()}, Source: ours, JWT: jwts, Audience: server, MaxJWTLife: time.Hour,
		Companions: []string{"mail"},
	})
	url := serve(t, a, a.ServerTLS(), attest.Limits{})

	expected := tlsconfig.AuthorizeID(spiffeid.RequireFromString(server))
	byCert := &http.Client{Transport: &http.Transport{
		TLSClientConfig: tlsconfig.MTLSClientConfig(theirs, theirs, expected), ForceAttemptHTTP2: true,
	}}
	defer byCert.CloseIdleConnections()
	for range 2 {
		if got := get(t, byCert, url, ""); got.status != http.StatusOK || got.id != agent {
			t.Errorf("X.509-SVID: got %d %q, want 200 %q", got.status, got.id, agent)
		}
	}

	fetch := func(audience string, more ...string) string {
		svid, err := jwts.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, ExtraAudiences: more,
			Subject: spiffeid.RequireFromString(agent)})
		if err != nil {
			t.Fatalf("FetchJWTSVID = %v", err)
		}
		return svid.Marshal()
	}
	byToken := &http.Client{Transport: &http.Transport{TLSClientConfig: tlsconfig.TLSClientConfig(theirs, expected)}}
	defer byToken.CloseIdleConnections()
	if got := get(t, byToken, url, fetch(server)); got.status != http.StatusOK || got.id != agent {
		t.Errorf("JWT-SVID: got %d %q, want 200 %q", got.status, got.id, agent)
	}
	if got := get(t, byToken, url, fetch("vault")); got.status != http.StatusUnauthorized {
		t.Errorf("JWT-SVID for another audience: got %d, want 401", got.status)
	}
	if got := get(t, byToken, url, fetch(server, "mail")); got.status != http.StatusOK || got.id != agent {
		t.Errorf("JWT-SVID with a companion: got %d %q, want 200 %q", got.status, got.id, agent)
	}
	if got := get(t, byToken, url, fetch(server, "mail", "orders")); got.status != http.StatusUnauthorized {
		t.Errorf("JWT-SVID with another audience: got %d, want 401", got.status)
	}

	svid, err := theirs.GetX509SVID()
	if err != nil {
		t.Fatalf("GetX509SVID = %v", err)
	}
	other := newAttestor(t, attest.Config{TrustDomains: []string{"example.org"}, Source: ours})
	_, err = other.Identify(request(svid.Certificates))
	refused(t, "SPIRE's X.509-SVID where its domain is not listed", err, broker.Unauthenticated)
}

// pick selects one of the process's identities.
func pick(id string) func([]*x509svid.SVID) *x509svid.SVID {
	return func(svids []*x509svid.SVID) *x509svid.SVID {
		for _, svid := range svids {
			if svid.ID.String() == id {
				return svid
			}
		}
		return svids[0]
	}
}
