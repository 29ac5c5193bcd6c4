package wire_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestOwnIdentity gives the broker's process several identities, in each order, while it runs. Another team's entry
// must not take the broker's identity.
func TestOwnIdentity(t *testing.T) {
	for name, row := range map[string]struct {
		want  string     // path of spiffe_id; empty: none is configured
		given [][]string // paths that the Workload API gives, one list after the other
		is    []string   // path of the broker's identity after each; empty: it has none
		log   string
	}{
		"an entry is added before": {"", [][]string{{"/pawl"}, {"/other", "/pawl"}}, []string{"/pawl", "/pawl"},
			"would not start again"},
		"several at the start": {"", [][]string{{"/other", "/pawl"}, {"/pawl"}}, []string{"", "/pawl"}, "chance decides which is first"},
		"another entry":        {"", [][]string{{"/pawl"}, {"/other"}, {"/pawl"}}, []string{"/pawl", "", "/pawl"}, "and no longer spiffe://example.org/pawl"},
		"one is chosen":        {"/pawl", [][]string{{"/other", "/pawl"}}, []string{"/pawl"}, "has an identity"},
		"the chosen one goes": {"/pawl", [][]string{{"/pawl"}, {"/other"}, {"/other", "/pawl"}}, []string{"/pawl", "", "/pawl"},
			"gives this process spiffe://example.org/other, and not spiffe://example.org/pawl, which was chosen"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "example.org")
			if row.want != "" {
				s.config.SPIFFEID = s.identities.ID("/pawl").String()
			}
			s.given.Store(row.given[0])
			s.identify()
			var log syncBuffer
			s.startLogging(&log)
			for i, is := range row.is {
				s.given.Store(row.given[i])
				before := s.serial()
				s.identities.Rotate()
				if is == "" {
					within(t, 20*time.Second, "the broker without an identity", func() bool { return s.ownID() == "" })
					continue
				}
				within(t, 20*time.Second, "a new SVID", func() bool { return s.serial() != before })
				if got := s.ownID(); got != "spiffe://example.org"+is {
					t.Errorf("the broker is %q after %q, want %s", got, row.given[i], is)
				}
			}
			within(t, 20*time.Second, "a line of the log with "+row.log, func() bool { return strings.Contains(log.String(), row.log) })
		})
	}
}

// waited is a context that says when something waits for its end.
type waited struct {
	context.Context
	once sync.Once
	by   chan struct{}
}

func (w *waited) Done() <-chan struct{} {
	w.once.Do(func() { close(w.by) })
	return w.Context.Done()
}

// TestFirstToken asks for a JWT-SVID before the Workload API has given an identity, as the first login at Vault may. It
// waits: a login that fails is tried again only after half a second, and every step fails until then.
func TestFirstToken(t *testing.T) {
	s := newSite(t, "example.org")
	s.identify()
	token, watch, err := wire.Tokens(s.config, "vault")
	if err != nil {
		t.Fatal(err)
	}
	ctx := &waited{Context: t.Context(), by: make(chan struct{})}
	type answer struct {
		token string
		err   error
	}
	got := make(chan answer, 1)
	go func() {
		jwt, err := token(ctx)
		got <- answer{jwt, err}
	}()
	select {
	case a := <-got:
		t.Fatalf("a token before the first identity = %q, %v, want it to wait", a.token, a.err)
	case <-ctx.by:
	}
	defer watch().Close()
	if a := <-got; a.err != nil || a.token == "" {
		t.Errorf("a token after the first identity = %q, %v", a.token, a.err)
	}
}

// TestTokenWithoutWorkloadAPI asks for a JWT-SVID of a Workload API that never answers. The login must end and be
// reported, so the wait has a bound.
func TestTokenWithoutWorkloadAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		token, _, err := wire.Tokens(wire.Config{WorkloadAPI: "unix:///nowhere.sock"}, "vault")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := token(ctx); err == nil || ctx.Err() != nil {
			t.Errorf("a token without an identity = %v, after a minute: %v; want an error before", err, ctx.Err())
		}
	})
}

// TestOwnIdentityWithSPIRE adds the entry of another team to a real SPIRE while the broker runs, in each way of choosing.
// Which of the identities is first is chance. The health endpoint and the metric name a choice that is not made.
func TestOwnIdentityWithSPIRE(t *testing.T) {
	spire := parts.OwnSPIRE(t, parts.SPIREConfig{})
	td := spiffeid.RequireTrustDomainFromString(spire.TrustDomain())
	own := spiffeid.RequireFromPath(td, "/pawl")
	if err := spire.EntryWithHint(t.Context(), own.String(), "broker"); err != nil {
		t.Fatal(err)
	}
	configured := func(chosen string) *site {
		s := newSite(t, spire.TrustDomain())
		s.config.WorkloadAPI, s.config.SPIFFEID = spire.WorkloadAPI(), chosen
		return s
	}
	running := map[string]*site{"": configured(""), own.String(): configured(own.String()), "broker": configured("broker")}
	for chosen, s := range running {
		s.start()
		within(t, 20*time.Second, "an identity with spiffe_id "+chosen, func() bool { return s.ownID() == own.String() })
	}
	if err := spire.EntryWithHint(t.Context(), spiffeid.RequireFromPath(td, "/mesh").String(), "mesh"); err != nil {
		t.Fatal(err)
	}
	within(t, 10*time.Second, "the second entry named", func() bool {
		return strings.Contains(readyz(t, running[""]), "identity_ambiguous")
	})
	body := readyz(t, running[""])
	if !strings.Contains(body, own.String()) || !strings.Contains(body, td.IDString()+"/mesh") || !strings.Contains(body, "set spiffe_id") {
		t.Errorf("GET /readyz = %s, want both identities named, and spiffe_id", body)
	}
	if page := metricsOf(t, running[""]); !strings.Contains(page, `pawl_condition{code="identity_ambiguous",part="identity"} 1`) {
		t.Errorf("the metrics lack identity_ambiguous")
	}
	for chosen, s := range running {
		if is := s.ownID(); is != own.String() {
			t.Errorf("the broker with spiffe_id %q is %s after another entry, want %s", chosen, is, own)
		}
		if body := readyz(t, s); chosen != "" && strings.Contains(body, `"identity"`) {
			t.Errorf("GET /readyz with spiffe_id %q = %s, want no word of identity", chosen, body)
		}
	}
	for chosen, want := range map[string]string{"": "", own.String(): own.String(), "broker": own.String(), "nobody": ""} {
		s := configured(chosen)
		s.start()
		if want == "" {
			within(t, 10*time.Second, "no identity with spiffe_id "+chosen, func() bool {
				return strings.Contains(readyz(t, s), "identity_ambiguous") && s.ownID() == ""
			})
			continue
		}
		within(t, 20*time.Second, "an identity with spiffe_id "+chosen, func() bool { return s.ownID() == want })
	}
}

// readyz is the body of /readyz, for an operator at the socket.
func readyz(t *testing.T, s *site) string { return get(t, s, "/readyz") }

func metricsOf(t *testing.T, s *site) string { return get(t, s, "/metrics") }

func get(t *testing.T, s *site, path string) string {
	t.Helper()
	resp, err := (&http.Client{Transport: socketTransport(s)}).Get("http://pawl" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// certificateOf is the broker's certificate at the agents' listener; nil if it refuses.
func (s *site) certificateOf() *tls.ConnectionState {
	conn, err := tls.Dial("tcp", s.config.Listen.Agents, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // only its name
	if err != nil {
		return nil
	}
	defer conn.Close() //nolint:errcheck // only the handshake counts
	state := conn.ConnectionState()
	return &state
}

func (s *site) ownID() string {
	if state := s.certificateOf(); state != nil && len(state.PeerCertificates[0].URIs) > 0 {
		return state.PeerCertificates[0].URIs[0].String()
	}
	return ""
}

func (s *site) serial() string {
	if state := s.certificateOf(); state != nil {
		return state.PeerCertificates[0].SerialNumber.String()
	}
	return ""
}

// syncBuffer is a buffer for a log. Safe for concurrent use.
type syncBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestStolenSVID replaces the authority of a stolen SVID in a real SPIRE. Only revoking the old authority makes the broker
// refuse it; tainting it makes the workload alone fetch another.
func TestStolenSVID(t *testing.T) {
	spire := parts.OwnSPIRE(t, parts.SPIREConfig{})
	td := spiffeid.RequireTrustDomainFromString(spire.TrustDomain())
	s := newSite(t, spire.TrustDomain())
	s.config.WorkloadAPI = spire.WorkloadAPI()
	own, agent := spiffeid.RequireFromPath(td, "/pawl"), spiffeid.RequireFromPath(td, "/agent")
	s.config.SPIFFEID = own.String()
	for _, id := range []spiffeid.ID{own, agent} {
		if err := spire.Entry(t.Context(), id.String()); err != nil {
			t.Fatal(err)
		}
	}
	s.start()
	within(t, 20*time.Second, "an identity", func() bool { return s.ownID() == own.String() })
	fetch := func() *x509svid.SVID {
		got, err := workloadapi.FetchX509Context(t.Context(), workloadapi.WithAddr(spire.WorkloadAPI()))
		if err != nil {
			t.Fatal(err)
		}
		var own client.Identity
		if own, err = client.ParseIdentity(agent.String()); err != nil {
			t.Fatal(err)
		}
		svid, err := own.Choose(got.SVIDs, agent, "choose")
		if err != nil {
			t.Fatal(err)
		}
		return svid
	}
	stolen := fetch()
	if err := s.admits(stolen); err != nil {
		t.Fatalf("the SVID before = %v, want it admitted", err)
	}
	for _, step := range []string{"prepare", "activate", "taint"} {
		if err := spire.Authority(t.Context(), step); err != nil {
			t.Fatal(err)
		}
	}
	within(t, time.Minute, "a new SVID of the workload", func() bool {
		return fetch().Certificates[0].SerialNumber.Cmp(stolen.Certificates[0].SerialNumber) != 0
	})
	if err := s.admits(stolen); err != nil {
		t.Errorf("the stolen SVID after taint = %v: SPIRE ends it sooner than docs/promises.md says", err)
	}
	if err := spire.Authority(t.Context(), "revoke"); err != nil {
		t.Fatal(err)
	}
	within(t, time.Minute, "the stolen SVID refused", func() bool { return s.admits(stolen) != nil })
	within(t, time.Minute, "the workload admitted", func() bool { return s.admits(fetch()) == nil })
}

// admits returns an error if the agents' listener refuses the SVID.
func (s *site) admits(svid *x509svid.SVID) error {
	c := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, cert := range svid.Certificates {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		Certificates: []tls.Certificate{c}, InsecureSkipVerify: true}}} //nolint:gosec // the broker's side is tested
	resp, err := client.Get("https://" + s.config.Listen.Agents + "/healthz")
	if err != nil {
		return err
	}
	return resp.Body.Close()
}
