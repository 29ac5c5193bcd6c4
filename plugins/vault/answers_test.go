package vault_test

import (
	"cmp"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
)

var update = flag.Bool("update", false, "write the table of docs/vault.md")

// case_ brings Vault to one answer. It returns the error of the request that got it.
type case_ func(t *testing.T, cfg func(*vault.Config)) error

// spoilt makes a step's token at a real Vault, spoils that Vault, and mints.
func spoilt(spoil func(t *testing.T, s *site, m *broker.Mint)) case_ {
	return func(t *testing.T, change func(*vault.Config)) error {
		return mintAt(t, newSite(t, parts.NeedVault(t)), change, spoil)
	}
}

// broken is spoilt with a Vault of its own.
func broken(spoil func(t *testing.T, s *site, m *broker.Mint)) case_ {
	return func(t *testing.T, change func(*vault.Config)) error {
		return mintAt(t, newSite(t, parts.OwnVault(t, parts.VaultConfig{})), change, spoil)
	}
}

// mintAt returns the error of a mint, which must not succeed. A quota or a connection may let a few mints pass.
func mintAt(
	t *testing.T, s *site, change func(*vault.Config), spoil func(t *testing.T, s *site, m *broker.Mint),
) error {
	t.Helper()
	cfg := s.config()
	cfg.MintTimeout = time.Second
	change(&cfg)
	c := newClient(t, cfg)
	branch(t, c, delegation(rootID, ""), s.a())
	const most = 5
	var handles [most]broker.Handle
	for i := range handles {
		handles[i] = child(t, c, rootID, time.Minute, s.a())
	}
	s.made = handles[:]
	m := s.mint("a")
	spoil(t, s, &m)
	var err error
	for _, h := range handles {
		if _, _, err = c.Mint(t.Context(), h, m); err != nil && !strings.Contains(err.Error(), "broken pipe") {
			return err
		}
	}
	return err
}

// faked returns the error of a mint that gets a made-up answer, since the real Vault here cannot be brought to it.
func faked(answer http.HandlerFunc) case_ {
	return func(t *testing.T, change func(*vault.Config)) error {
		c := newFake(t, answer).client(t, change)
		_, _, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), plainMint(brokertest.Path("pki/issue/a")))
		return err
	}
}

// token returns the error of a request for a token at a real Vault.
func token(make func(*testing.T, *site, *vault.Client) error) case_ {
	return func(t *testing.T, change func(*vault.Config)) error {
		s := newSite(t, parts.NeedVault(t))
		cfg := s.config()
		change(&cfg)
		return make(t, s, newClient(t, cfg))
	}
}

func (s *site) remove(t *testing.T, path string) {
	t.Helper()
	if err := s.admin.Write(t.Context(), vault.Write{Method: "DELETE", Path: path}); err != nil {
		t.Fatal(err)
	}
}

// permit replaces the paths that the policy of tool a permits.
func (s *site) permit(t *testing.T, path string) {
	t.Helper()
	s.write(t, "sys/policies/acl/"+s.a(), map[string]any{"policy": fmt.Sprintf("path %q {capabilities = [\"create\", \"update\"]}", path)})
}

// sign makes the mint one of a signature by a version of a key that was rotated.
func (s *site) sign(t *testing.T, m *broker.Mint, version int) {
	t.Helper()
	mount := strings.Replace(s.pki, "pki", "transit", 1)
	s.write(t, "sys/mounts/"+mount, map[string]any{"type": "transit"})
	s.write(t, mount+"/keys/k", map[string]any{"type": "ecdsa-p256"})
	s.write(t, mount+"/keys/k/rotate", nil)
	s.write(t, mount+"/keys/k/config", map[string]any{"min_encryption_version": 2})
	s.permit(t, mount+"/sign/k/sha2-256")
	m.Path, m.Leased = brokertest.Path(mount+"/sign/k/sha2-256"), false
	m.Data = map[string]any{"input": "YQ==", "key_version": version}
}

// cases has a case for each row of the table.
var cases = map[string]case_{
	"the broker is not logged in": token(func(t *testing.T, s *site, _ *vault.Client) error {
		cfg := s.config()
		cfg.Login.Certificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return s.ca.svid(t, brokerID+"/other", "pawl"), nil
		}
		_, err := newClient(t, cfg).CreateDelegationToken(t.Context(), delegation(rootID, ""), []string{s.a()})
		return err
	}),
	"no connection, or no handshake: the request was not sent": broken(func(t *testing.T, s *site, _ *broker.Mint) {
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
	}),
	"the clocks differ by more than 3s": func(t *testing.T, change func(*vault.Config)) error {
		return spoilt(func(_ *testing.T, _ *site, m *broker.Mint) { m.Absolute = true })(t, func(cfg *vault.Config) {
			change(cfg)
			cfg.Now = func() time.Time { return time.Now().Add(-5 * time.Second) }
		})
	},
	"a rate limit quota": spoilt(func(t *testing.T, s *site, _ *broker.Mint) {
		s.write(t, "sys/quotas/rate-limit/"+s.pki, map[string]any{"path": s.pki, "rate": 1, "interval": "1h"})
	}),
	"a lease count quota":                       faked(respond(429, errorBody("1 error occurred:\n\t* request path \"a\": lease count quota exceeded\n\n"))),
	"any other 429, such as a proxy's":          faked(respond(429, "<html>slow down")),
	"overloaded: refused before it was handled": faked(respond(503, errorBody("Vault server temporarily overloaded"))),
	"overloaded while it was handled":           faked(respond(503, errorBody("overloaded, try again later"))),
	"a standby that finds no active node":       faked(respond(500, errorBody("local node not active but active cluster node not found"))),
	"a standby that redirects: it forwards nothing, or lost the active node while it forwarded": faked(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://127.0.0.1:1"+r.URL.Path, http.StatusTemporaryRedirect)
	}),
	"a standby that lost the active node while it forwarded": faked(respond(503, errorBody("no active Vault instance found"))),
	"Vault closed a kept-alive connection before any of the request was written": func(t *testing.T, change func(*vault.Config)) error {
		r := newRelay(t, newSite(t, parts.NeedVault(t)))
		return r.cut(t, change, r.mint("a"), false)
	},
	"any other 500, also after a mint: an engine or an audit device failed": faked(respond(500, errorBody("internal error"))),
	"any other status, such as a proxy's":                                   faked(respond(502, "<html>bad gateway")),
	"an answer that is no acceptable secret or token":                       faked(respond(200, "<html>log in")),
	"an answer that is too large":                                           faked(respond(200, `{"data":{"a":"`+strings.Repeat("a", 1<<20)+`"}}`)),
	"sealed": broken(func(t *testing.T, s *site, _ *broker.Mint) {
		if err := s.Seal(t.Context()); err != nil {
			t.Fatal(err)
		}
	}),
	"a version of a signing key below `min_encryption_version`": spoilt(func(t *testing.T, s *site, m *broker.Mint) { s.sign(t, m, 1) }),
	"a version of a signing key that does not exist":            spoilt(func(t *testing.T, s *site, m *broker.Mint) { s.sign(t, m, 9) }),
	"the token that asks has ended": spoilt(func(t *testing.T, s *site, _ *broker.Mint) {
		root := s.rootClient(t)
		for _, h := range s.made {
			if err := root.Kill(t.Context(), h.Accessor); err != nil {
				t.Fatal(err)
			}
		}
	}),
	"no policy permits it: a policy is missing, or was changed": spoilt(func(t *testing.T, s *site, _ *broker.Mint) {
		s.remove(t, "sys/policies/acl/"+s.a())
	}),
	"any other 403": faked(respond(403, errorBody("no"))),
	"a token with more rights than its parent": token(func(t *testing.T, s *site, c *vault.Client) error {
		branch(t, c, delegation(rootID, ""), s.a())
		_, err := c.CreateDelegationToken(t.Context(), delegation(childID, rootID), []string{s.b()})
		return err
	}),
	"a token with other policies than the token role allows": token(func(t *testing.T, s *site, c *vault.Client) error {
		_, err := c.CreateDelegationToken(t.Context(), delegation(rootID, ""), []string{s.setup.Role})
		return err
	}),
	"a token with other rights than asked, such as an identity's": func(t *testing.T, change func(*vault.Config)) error {
		f := newFake(t, respond(204, ""))
		c := f.client(t, change)
		f.alterAuth = func(a map[string]any) { a["identity_policies"] = []string{"admin"} }
		g := broker.Grant{ID: grantID, Delegation: rootID, Expires: time.Now().Add(time.Minute)}
		_, err := c.CreateStepToken(t.Context(), g, "x", "pawl-tool-a")
		return err
	},
	"a role that does not exist": spoilt(func(t *testing.T, s *site, _ *broker.Mint) { s.remove(t, s.pki+"/roles/a") }),
	"any other 400, such as what a role does not allow": spoilt(func(t *testing.T, s *site, _ *broker.Mint) {
		s.write(t, s.pki+"/roles/a", map[string]any{"allowed_domains": "example.com", "key_type": "ec", "generate_lease": true})
	}),
	"a mount or a namespace that does not exist": spoilt(func(t *testing.T, s *site, _ *broker.Mint) { s.remove(t, "sys/mounts/"+s.pki) }),
	"any other 404": spoilt(func(t *testing.T, s *site, m *broker.Mint) {
		s.permit(t, s.pki+"/nothing")
		m.Path = brokertest.Path(s.pki + "/nothing")
	}),
	"a method that the path does not have": spoilt(func(t *testing.T, s *site, m *broker.Mint) {
		s.permit(t, s.pki+"/ca/pem")
		m.Path = brokertest.Path(s.pki + "/ca/pem")
	}),
	"a request with a value that is too large": spoilt(func(_ *testing.T, _ *site, m *broker.Mint) {
		m.Data = map[string]any{"common_name": strings.Repeat("a", 2<<20)}
	}),
	"a request that is too large": faked(respond(413, errorBody("http: request body too large"))),
	"no answer: a timeout, or a connection that broke when some of the request may have been written": broken(func(t *testing.T, s *site, _ *broker.Mint) {
		if err := s.Pause(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Continue() }) // the server is killed next
	}),
}

// TestAnswers brings Vault to each answer of the table, and compares the outcome of the mint, the code and the wait. It
// brings the real Vault to it where that can be done. Where a proxy may answer, no answer shows that nothing was made.
func TestAnswers(t *testing.T) {
	rows := vault.Rows()
	if len(rows) != len(cases) {
		t.Errorf("there are %d cases for %d rows", len(cases), len(rows))
	}
	for _, row := range rows {
		t.Run(row.When, func(t *testing.T) {
			meet, ok := cases[row.When]
			if !ok {
				t.Fatal("there is no case for this row")
			}
			err := meet(t, func(*vault.Config) {})
			var refusal *broker.Error
			known := errors.As(err, &refusal)
			switch {
			case err == nil:
				t.Fatal("the request succeeded")
			case strings.HasPrefix(err.Error(), "minting: ") && errors.Is(err, broker.ErrNotMinted) != row.Nothing:
				t.Errorf("%v, certainly nothing = %v, want %v", err, !row.Nothing, row.Nothing)
			case row.Nothing && (!known || refusal.Code != row.Code || refusal.Kind != row.Kind || refusal.RetryAfter != row.Wait):
				t.Errorf("%v: %+v, want kind %s, code %s, a retry after %v", err, refusal, row.Kind, row.Code, row.Wait)
			case !strings.Contains(err.Error(), row.Phrase):
				t.Errorf("%v, want the phrase %q", err, row.Phrase)
			}
			if !row.Answered || row.Kind == broker.Denied {
				return
			}
			if err := meet(t, func(cfg *vault.Config) { cfg.BehindProxy = true }); errors.Is(err, broker.ErrNotMinted) {
				t.Errorf("behind a proxy: %v, want an unknown outcome", err)
			}
		})
	}
}

// TestRetryAfter passes Vault's own wait on, in both forms of the header.
func TestRetryAfter(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	for header, want := range map[string]time.Duration{
		"7": 7 * time.Second, "0": time.Second, "": time.Second, "x": time.Second, "-3": time.Second,
		"86400": time.Second, "7200": time.Hour,
		now.Add(9 * time.Second).Format(http.TimeFormat):  9 * time.Second,
		now.Add(-9 * time.Second).Format(http.TimeFormat): time.Second,
	} {
		err := faked(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", header)
			w.Header().Set("Date", now.Format(http.TimeFormat))
			w.WriteHeader(429)
			_, _ = w.Write([]byte(errorBody("rate limit quota exceeded")))
		})(t, func(*vault.Config) {})
		var refusal *broker.Error
		if !errors.As(err, &refusal) || refusal.RetryAfter != want {
			t.Errorf("Retry-After: %q gives %+v, want %v", header, refusal, want)
		}
	}
}

const (
	tableBegins = "<!-- from plugins/vault, by go test ./plugins/vault -run AnswersPage -update -->\n"
	tableEnds   = "<!-- end -->\n"
)

// TestAnswersPage compares the table of docs/vault.md with the one in the code.
func TestAnswersPage(t *testing.T) {
	const page = "../../docs/vault.md"
	raw, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), tableBegins)
	old, after, ended := strings.Cut(rest, tableEnds)
	if !ok || !ended {
		t.Fatalf("%s has no place for the table", page)
	}
	var b strings.Builder
	b.WriteString("\n| Vault's answer | status, and Vault's text | a mint made | the agent gets | a retry |\n|---|---|---|---|---|\n")
	for _, r := range vault.Rows() {
		status, made, code, retry := "", "perhaps a secret", "`outcome_unknown`; at a token `"+string(r.Code)+"`", "changes nothing"
		if r.Answered {
			status = fmt.Sprint(r.Status)
			if r.Phrase != "" {
				status += ", " + r.Phrase
			}
		}
		if r.Nothing {
			made, code = "nothing", "`"+string(r.Code)+"`"
		}
		if r.Wait > 0 {
			retry = "after " + r.Wait.String()
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", r.When, cmp.Or(status, "none"), made, code, retry)
	}
	b.WriteString("\n")
	if b.String() == old {
		return
	}
	if !*update {
		t.Fatalf("the table of %s differs from the code: run go test ./plugins/vault -run AnswersPage -update", page)
	}
	if err := os.WriteFile(page, []byte(before+tableBegins+b.String()+tableEnds+after), 0o644); err != nil {
		t.Fatal(err)
	}
}
