package attest_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"testing"
	"time"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/cmd/parts"
)

// TestBehindNginx puts a real nginx before the agents' listener, for agents with JWT-SVIDs. docs/configuration.md has
// the setting: with nginx's own default of TLS versions the broker refuses its connection, and agents get a 502.
func TestBehindNginx(t *testing.T) {
	c := &clock{time.Now()}
	s := newWorkload(t, c)
	a := newAttestor(t, config(s, c))
	broker := serve(t, a, a.ServerTLS(), attest.Limits{})
	svid, err := s.X509SVID(s.ID("/nginx"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := s.Source(s.ID("/nginx")).GetX509BundleForTrustDomain(s.ID("/nginx").TrustDomain())
	if err != nil {
		t.Fatal(err)
	}
	authorities, err := bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var pair bytes.Buffer
	for kind, der := range map[string][]byte{"CERTIFICATE": svid.Certificates[0].Raw, "PRIVATE KEY": key} {
		if err := pem.Encode(&pair, &pem.Block{Type: kind, Bytes: der}); err != nil {
			t.Fatal(err)
		}
	}
	agent := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, // the test is not about nginx's certificate
		Certificates:       []tls.Certificate{{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}}}}}
	for versions, want := range map[string]int{
		"TLSv1 TLSv1.1 TLSv1.2": http.StatusBadGateway, // the default before nginx 1.23.4
		"TLSv1.2":               http.StatusBadGateway,
		"TLSv1.3":               http.StatusOK,
	} {
		proxy := parts.OwnTLS(t, parts.TLSConfig{Program: "nginx", Certificate: pair.Bytes(), Authorities: authorities,
			Settings: []string{"location /v1/ { proxy_pass " + broker + "; proxy_ssl_protocols " + versions + "; }"}})
		got := get(t, agent, "https://"+proxy.Address()+"/v1/x", token(t, s, "/agent"))
		if got.status != want || want == http.StatusOK && got.id != s.ID("/agent").String() {
			t.Errorf("with proxy_ssl_protocols %s: got %d %q, want %d", versions, got.status, got.id, want)
		}
	}
}
