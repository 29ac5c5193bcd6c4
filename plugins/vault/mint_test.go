package vault_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/plugins/vault"
)

const good = `{"lease_id":"pki/issue/a/x1","lease_duration":60,"data":{"key":"` + marker + `"}}`

func say(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

// cut closes the connection after the request was read.
func cut(w http.ResponseWriter, r *http.Request) {
	_, _ = new(bytes.Buffer).ReadFrom(r.Body)
	conn, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		_ = conn.Close()
	}
}

// TestMintAnswers holds the rows of hardening.md, "Vault answers": what each answer means, that
// it was asked for once, and that no text of the answer shows in the error.
func TestMintAnswers(t *testing.T) {
	elsewhere := newFake(t, say(200, good))
	rows := []struct {
		name   string
		answer http.HandlerFunc
		made   string // "yes", "no", or "unknown"
	}{
		{"good", say(200, good), "yes"},
		{"500 after the mint", say(500, `{"errors":["`+marker+`"]}`), "unknown"},
		{"502", say(502, "<html>"+marker), "unknown"},
		{"429", say(429, `{"errors":["rate limit quota exceeded"]}`), "unknown"},
		{"412", say(412, `{"errors":[]}`), "unknown"},
		{"408", say(408, ""), "unknown"},
		{"503 sealed", say(503, `{"errors":["Vault is sealed"]}`), "no"},
		{"472 of a DR secondary", say(472, `{"errors":[]}`), "unknown"},
		{"473 of a performance standby", say(473, `{"errors":[]}`), "unknown"},
		{"474 of a standby without an active node", say(474, `{"errors":[]}`), "unknown"},
		{"501 not initialised", say(501, `{"errors":[]}`), "unknown"},
		{"530 removed from its cluster", say(530, `{"errors":[]}`), "unknown"},
		{"503 of a proxy", say(503, "unavailable"), "unknown"},
		{"400", say(400, `{"errors":["`+marker+`"]}`), "no"},
		{"403", say(403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`), "no"},
		{"404", say(404, `{"errors":[]}`), "no"},
		{"redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
		}, "unknown"},
		{"200 empty", say(200, ""), "unknown"},
		{"204", say(204, ""), "unknown"},
		{"200 null", say(200, "null"), "unknown"},
		{"200 html", say(200, "<html>"+marker+"</html>"), "unknown"},
		{"truncated", say(200, good[:len(good)-4]), "unknown"},
		{"trailing", say(200, good+"{}"), "unknown"},
		{"huge", say(200, `{"data":{"a":"`+strings.Repeat("a", 1<<20)+`"}}`), "unknown"},
		{"drip", func(w http.ResponseWriter, r *http.Request) { drip(w, r) }, "unknown"},
		{"cut", cut, "unknown"},
		{"duplicate lease_id", say(200, `{"lease_id":"pki/issue/a/x1",`+good[1:]), "unknown"},
		{"lease_id in capitals too", say(200, `{"LEASE_ID":"pki/issue/a/x2",`+good[1:]), "unknown"},
		{"only Lease_id", say(200, strings.Replace(good, "lease_id", "Lease_id", 1)), "unknown"},
		{"duplicate in data", say(200, strings.Replace(good, `"key"`, `"key":"other","key"`, 1)), "unknown"},
		{"no lease", say(200, `{"lease_id":"","lease_duration":60,"data":{"key":"v"}}`), "unknown"},
		{"no data", say(200, `{"lease_id":"pki/issue/a/x1","lease_duration":60,"data":null}`), "unknown"},
		{"data is a list", say(200, strings.Replace(good, `{"key":"`+marker+`"}`, `["`+marker+`"]`, 1)), "unknown"},
		{"other mount", say(200, strings.Replace(good, "pki/issue/a/", "database/creds/a/", 1)), "unknown"},
		{"other role", say(200, strings.Replace(good, "pki/issue/a/", "pki/issue/ab/", 1)), "unknown"},
		{"lease climbs", say(200, strings.Replace(good, "/x1", "/../x1", 1)), "unknown"},
		{"duration zero", say(200, strings.Replace(good, "60", "0", 1)), "unknown"},
		{"duration negative", say(200, strings.Replace(good, "60", "-1", 1)), "unknown"},
		{"duration at the limit", say(200, good), "yes"},
		{"duration over the limit", say(200, strings.Replace(good, "60", "61", 1)), "unknown"},
		{"duration huge", say(200, strings.Replace(good, "60", "9223372036854775807", 1)), "unknown"},
		{"duration beyond integers", say(200, strings.Replace(good, "60", "1e99", 1)), "unknown"},
		{"wrapped", say(200, `{"wrap_info":{"token":"x"},`+good[1:]), "unknown"},
		{"a token instead", say(200, `{"auth":{"client_token":"x"},`+good[1:]), "unknown"},
		{"deep", say(200, `{"lease_id":"pki/issue/a/x1","lease_duration":60,"data":{"a":`+strings.Repeat("[", 40)+strings.Repeat("]", 40)+`}}`), "unknown"},
		{"lone surrogate", say(200, strings.Replace(good, marker, `\ud800`, 1)), "unknown"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, row.answer)
			c := f.client(t, func(cfg *vault.Config) { cfg.MintTimeout = 2 * time.Second })
			h := child(t, c, rootID, time.Minute, "pawl-tool-a")
			lease, secret, err := c.Mint(t.Context(), h, plain("pki", "issue", "a"))
			made := "yes"
			if err != nil {
				made = map[bool]string{true: "no", false: "unknown"}[errors.Is(err, broker.ErrNotMinted)]
			}
			if made != row.made {
				t.Errorf("Mint() = %v, made %s, want %s", err, made, row.made)
			}
			if n := f.count("POST pki/issue/a"); n != 1 {
				t.Errorf("Mint() sent %d requests, want 1", n)
			}
			if err != nil && (!secret.Empty() || lease.ID != "" || strings.Contains(fmt.Sprintf("%+v", err), marker)) {
				t.Errorf("Mint() = %v, %q with an error that shows %v", lease.ID, secret, err)
			}
			if err == nil && (lease.ID != "pki/issue/a/x1" || lease.Ref != "ref" || time.Until(lease.Expires) > time.Minute) {
				t.Errorf("Mint() = %+v", lease)
			}
		})
	}
	if n := elsewhere.count("POST pki/issue/a"); n != 0 {
		t.Errorf("the redirect was followed %d times", n)
	}
}

// drip sends a byte now and then and never ends.
func drip(w http.ResponseWriter, r *http.Request) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
			_, _ = w.Write([]byte(" "))
			w.(http.Flusher).Flush()
		}
	}
}

// TestMintOnce cuts a reused connection after the request: net/http would send a read again.
func TestMintOnce(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		f := newFake(t, cut)
		c := f.client(t, nil)
		m := plain("database", "creds", "a")
		if method == "GET" {
			m.Data = nil
		}
		for i := range 20 {
			h := child(t, c, rootID, time.Minute, "pawl-tool-a") // leaves a connection to be reused
			_, _, err := c.Mint(t.Context(), h, m)
			if err == nil || errors.Is(err, broker.ErrNotMinted) {
				t.Errorf("Mint(%s) on a cut connection = %v, want an unknown outcome", method, err)
			}
			if n := f.count(method + " database/creds/a"); n != i+1 {
				t.Fatalf("%d mints by %s sent %d requests", i+1, method, n)
			}
		}
	}
}

// TestMintHandle holds that a handle mints once, in time, and at a path of segments.
func TestMintHandle(t *testing.T) {
	f := newFake(t, say(200, good))
	now := time.Now()
	c := f.client(t, func(cfg *vault.Config) { cfg.Now = func() time.Time { return now } })
	mint := func(h broker.Handle, m broker.Mint) error {
		_, _, err := c.Mint(t.Context(), h, m)
		return err
	}
	m := plain("pki", "issue", "a")
	h := child(t, c, rootID, time.Minute, "pawl-tool-a")
	if err := mint(h, m); err != nil {
		t.Fatalf("Mint() = %v", err)
	}
	if err := mint(h, m); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("second Mint() = %v, want ErrNotMinted", err)
	}
	killed := child(t, c, rootID, time.Minute, "pawl-tool-a")
	_ = c.Kill(t.Context(), killed.Accessor)
	if err := mint(killed, m); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() after Kill() = %v, want ErrNotMinted", err)
	}
	for _, path := range [][]string{nil, {""}, {"a", ".."}, {"a", "../b"}, {"a", "b..c"}, {"a/b"}, {"a", "."}, {"a%2fb"},
		{"a?b"}, {"a#b"}, {"a b"}, {"a\x00"}, {"é"}, {"-a"}, {"_a"}, {strings.Repeat("a", 129)}, make([]string, 17)} {
		if err := mint(child(t, c, rootID, time.Minute, "pawl-tool-a"), plain(path...)); !errors.Is(err, broker.ErrNotMinted) {
			t.Errorf("Mint(path %.20q) = %v, want ErrNotMinted", path, err)
		}
	}
	late := child(t, c, rootID, 30*time.Second, "pawl-tool-a")
	now = now.Add(31 * time.Second)
	if err := mint(late, m); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() after the token's end = %v, want ErrNotMinted", err)
	}
	if n := f.count("POST pki/issue/a"); n != 1 {
		t.Errorf("%d requests were sent, want 1", n)
	}
	if err := vault.CheckPath([]string{"a", strings.Repeat("b", 128), "c.d_e-F"}); err != nil {
		t.Errorf("CheckPath() = %v, want nil", err)
	}
}

// TestMintUnreachable holds that a mint which never left is known not to have happened.
func TestMintUnreachable(t *testing.T) {
	f := newFake(t, say(200, good))
	c := f.client(t, nil)
	var handles [5]broker.Handle
	for i := range handles {
		handles[i] = child(t, c, rootID, time.Minute, "pawl-tool-a")
	}
	f.CloseClientConnections()
	f.Close()
	var err error
	for _, h := range handles { // the first may still meet a kept connection
		_, _, err = c.Mint(t.Context(), h, plain("pki", "issue", "a"))
	}
	if !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() with no server = %v, want ErrNotMinted", err)
	}
}

// TestMintFinish holds what happens when the backend cannot use the answer, or cancels.
func TestMintFinish(t *testing.T) {
	f := newFake(t, say(200, good))
	c := f.client(t, nil)
	m := plain("pki", "issue", "a")
	for name, finish := range map[string]func(map[string]any, time.Time) (broker.Finished, error){
		"fails": func(map[string]any, time.Time) (broker.Finished, error) { return broker.Finished{}, errors.New("no") },
		"empty": func(map[string]any, time.Time) (broker.Finished, error) { return broker.Finished{}, nil },
		"too long": func(map[string]any, time.Time) (broker.Finished, error) {
			return broker.Finished{Secret: broker.NewSecret([]byte("x")), Expires: time.Now().Add(2 * time.Minute)}, nil
		},
	} {
		m.Finish = finish
		_, _, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m)
		if err == nil || errors.Is(err, broker.ErrNotMinted) {
			t.Errorf("Mint() with a backend that %s = %v, want an unknown outcome", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := c.Mint(ctx, child(t, c, rootID, time.Minute, "pawl-tool-a"), plain("pki", "issue", "a")); err == nil {
		t.Error("Mint() with a cancelled context succeeded")
	}
}

// TestMintToken holds the rows of a mint whose answer is a token.
func TestMintToken(t *testing.T) {
	const token = `{"auth":{"client_token":"` + marker + `","accessor":"acc","lease_duration":60,"token_type":"service","orphan":false}}`
	for name, row := range map[string]struct {
		answer string
		ok     bool
	}{
		"good":        {token, true},
		"too long":    {strings.Replace(token, "60", "61", 1), false},
		"endless":     {strings.Replace(token, "60", "0", 1), false},
		"orphan":      {strings.Replace(token, "false", "true", 1), false},
		"batch":       {strings.Replace(token, `"service"`, `"batch"`, 1), false},
		"no accessor": {strings.Replace(token, `"acc"`, `""`, 1), false},
		"twice":       {strings.Replace(token, `"accessor"`, `"accessor":"b","accessor"`, 1), false},
		"other case":  {strings.Replace(token, `"accessor"`, `"Accessor":"b","accessor"`, 1), false},
		"a secret":    {good, false},
	} {
		c := newFake(t, say(200, row.answer)).client(t, nil)
		m := plain("auth", "own", "create")
		m.Leased, m.Auth = false, true
		m.Finish = func(data map[string]any, end time.Time) (broker.Finished, error) {
			text, _ := data["client_token"].(string)
			return broker.Finished{Secret: broker.NewSecret([]byte(text)), Expires: end}, nil
		}
		_, secret, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m)
		if (err == nil) != row.ok || err == nil && string(secret.Reveal()) != marker || errors.Is(err, broker.ErrNotMinted) {
			t.Errorf("Mint() of a token, %s = %v, want ok %v", name, err, row.ok)
		}
	}
}

// TestTokenAnswers holds that a token which is not what was asked for is ended and refused.
func TestTokenAnswers(t *testing.T) {
	for name, bend := range map[string]func(map[string]any){
		"an entity's policy": func(a map[string]any) { a["identity_policies"] = []string{"admin"} },
		"another policy":     func(a map[string]any) { a["token_policies"] = []string{"pawl-tool-a", "default"} },
		"no policy":          func(a map[string]any) { a["token_policies"] = nil },
		"no parent":          func(a map[string]any) { a["orphan"] = true },
		"renewable":          func(a map[string]any) { a["renewable"] = true },
		"no end":             func(a map[string]any) { a["lease_duration"] = 0 },
		"another type":       func(a map[string]any) { a["token_type"] = "batch" },
		"no accessor":        func(a map[string]any) { delete(a, "accessor") },
		"a broken token":     func(a map[string]any) { a["client_token"] = "a\r\nX: b" },
	} {
		f := newFake(t, say(204, ""))
		c := f.client(t, nil)
		f.bend = bend
		_, err := c.Child(t.Context(), broker.Grant{ID: grantID, Delegation: rootID, Expires: time.Now().Add(time.Minute)}, "x", "pawl-tool-a")
		if err == nil || strings.Contains(err.Error(), marker) {
			t.Errorf("Child() with %s = %v, want a refusal", name, err)
		}
		if ended := f.count("POST auth/token/revoke-accessor"); ended == 0 && name != "no accessor" {
			t.Errorf("a token with %s was not ended", name)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	for _, s := range []string{good, "{}", "null", `{"lease_id":1}`, `{"auth":{"accessor":null}}`, `{"errors":["a"]}`, `{"wrap_info":{"token":"a","ttl":1}}`, `{"data":{"a":[1,{"b":null}]}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		lease, data, err := vault.DecodeAnswer(raw)
		if err != nil && (lease != "" || data != nil) {
			t.Errorf("DecodeAnswer(%q) gives values with %v", raw, err)
		}
		if err != nil {
			return
		}
		// What is taken means the same to a decoder that lets duplicates and other cases win.
		var loose struct {
			LeaseID string `json:"lease_id"`
		}
		if json.Unmarshal(raw, &loose) != nil || loose.LeaseID != lease {
			t.Errorf("DecodeAnswer(%q) = %q, a loose decoder says %q", raw, lease, loose.LeaseID)
		}
	})
}
