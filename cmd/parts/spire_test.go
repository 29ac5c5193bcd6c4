package parts_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func TestSPIREHandsOutShortIdentities(t *testing.T) {
	ctx := startContext(t)
	servers := parts.OwnSPIRE(t, parts.SPIREConfig{TrustDomain: "short.test", SVIDLifetime: time.Minute})
	const id = "spiffe://short.test/agent/a"
	if err := servers.Entry(ctx, id); err != nil {
		t.Fatalf("Entry(%s) = %v, want nil", id, err)
	}
	address := workloadapi.WithAddr(servers.WorkloadAPI())
	svid, err := workloadapi.FetchX509SVID(ctx, address)
	if err != nil {
		t.Fatalf("fetching the X.509-SVID: %v", err)
	}
	if svid.ID.String() != id {
		t.Errorf("the X.509-SVID is for %s, want %s", svid.ID, id)
	}
	if left := time.Until(svid.Certificates[0].NotAfter); left > time.Minute {
		t.Errorf("the X.509-SVID is valid for %v, want a minute at most", left)
	}
	token, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "vault"}, address)
	if err != nil {
		t.Fatalf("fetching the JWT-SVID: %v", err)
	}
	if token.ID.String() != id || time.Until(token.Expiry) > time.Minute {
		t.Errorf("the JWT-SVID is for %s until %v", token.ID, token.Expiry)
	}
	pem, err := servers.BundlePEM(ctx)
	if err != nil || !bytes.HasPrefix(pem, []byte("-----BEGIN CERTIFICATE-----")) {
		t.Errorf("BundlePEM() = %.40q, %v, want certificates", pem, err)
	}
}
