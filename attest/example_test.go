package attest_test

import (
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/attest/workload"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// A server that authenticates its callers. In production the source is a *workloadapi.X509Source.
func Example() {
	spiffe, err := workload.New(workload.Config{TrustDomain: "example.org"})
	if err != nil {
		panic(err)
	}
	defer spiffe.Close()

	a, err := attest.New(attest.Config{
		TrustDomains: []string{"example.org"},
		Source:       spiffe.Source(spiffe.ID("/pawl")),
	})
	if err != nil {
		panic(err)
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	limits := attest.Limits{} // the defaults
	server := attest.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := a.Identify(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		fmt.Fprintf(w, "%s by %s", caller.ID, caller.Proof)
	}), limits)
	go server.Serve(attest.Listener(inner, a.ServerTLS(), limits))
	defer server.Close()

	agent := spiffe.Source(spiffe.ID("/agent/planner"))
	client := http.Client{Transport: &http.Transport{
		TLSClientConfig: tlsconfig.MTLSClientConfig(agent, agent, tlsconfig.AuthorizeID(spiffe.ID("/pawl"))),
	}}
	resp, err := client.Get("https://" + inner.Addr().String())
	if err != nil {
		panic(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	fmt.Println(string(body))
	// Output: spiffe://example.org/agent/planner by x509-svid
}
