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
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/vault"
)

const good = `{"lease_id":"pki/issue/a/x1","lease_duration":60,"data":{"key":"` + marker + `"}}`

func respond(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

// dropConnection reads the request and closes the connection.
func dropConnection(w http.ResponseWriter, r *http.Request) {
	_, _ = new(bytes.Buffer).ReadFrom(r.Body)
	conn, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		_ = conn.Close()
	}
}

// TestMintAnswers checks the outcome that each response to a mint has: a secret, certainly nothing, or unknown. It also
// checks that the client sends one request and that the error quotes no text of the response.
func TestMintAnswers(t *testing.T) {
	elsewhere := newFake(t, respond(200, good))
	rows := []struct {
		name     string
		response http.HandlerFunc
		made     string // "yes", "no" or "unknown"
	}{
		{"good", respond(200, good), "yes"},
		{"500 after the mint", respond(500, `{"errors":["`+marker+`"]}`), "unknown"},
		{"502", respond(502, "<html>"+marker), "unknown"},
		{"429 of a quota", respond(429, `{"errors":["rate limit quota exceeded"]}`), "no"},
		{"429 of a proxy", respond(429, `{"errors":["slow down"]}`), "unknown"},
		{"412", respond(412, `{"errors":[]}`), "unknown"},
		{"408", respond(408, ""), "unknown"},
		{"503 sealed", respond(503, `{"errors":["Vault is sealed"]}`), "no"},
		{"472 of a DR secondary", respond(472, `{"errors":[]}`), "unknown"},
		{"473 of a performance standby", respond(473, `{"errors":[]}`), "unknown"},
		{"474 of a standby without an active node", respond(474, `{"errors":[]}`), "unknown"},
		{"501 not initialised", respond(501, `{"errors":[]}`), "unknown"},
		{"530 removed from its cluster", respond(530, `{"errors":[]}`), "unknown"},
		{"503 of a proxy", respond(503, "unavailable"), "unknown"},
		{"400", respond(400, `{"errors":["`+marker+`"]}`), "no"},
		{"403", respond(403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`), "no"},
		{"404", respond(404, `{"errors":[]}`), "no"},
		{"redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
		}, "unknown"},
		{"200 empty", respond(200, ""), "unknown"},
		{"204", respond(204, ""), "unknown"},
		{"200 null", respond(200, "null"), "unknown"},
		{"200 html", respond(200, "<html>"+marker+"</html>"), "unknown"},
		{"truncated", respond(200, good[:len(good)-4]), "unknown"},
		{"trailing", respond(200, good+"{}"), "unknown"},
		{"huge", respond(200, `{"data":{"a":"`+strings.Repeat("a", 1<<20)+`"}}`), "unknown"},
		{"drip", func(w http.ResponseWriter, r *http.Request) { drip(w, r) }, "unknown"},
		{"connection dropped", dropConnection, "unknown"},
		{"duplicate lease_id", respond(200, `{"lease_id":"pki/issue/a/x1",`+good[1:]), "unknown"},
		{"lease_id in capitals too", respond(200, `{"LEASE_ID":"pki/issue/a/x2",`+good[1:]), "unknown"},
		{"only Lease_id", respond(200, strings.Replace(good, "lease_id", "Lease_id", 1)), "unknown"},
		{"duplicate in data", respond(200, strings.Replace(good, `"key"`, `"key":"other","key"`, 1)), "unknown"},
		{"no lease", respond(200, `{"lease_id":"","lease_duration":60,"data":{"key":"v"}}`), "unknown"},
		{"no data", respond(200, `{"lease_id":"pki/issue/a/x1","lease_duration":60,"data":null}`), "unknown"},
		{"data is a list", respond(200, strings.Replace(good, `{"key":"`+marker+`"}`, `["`+marker+`"]`, 1)), "unknown"},
		{"other mount", respond(200, strings.Replace(good, "pki/issue/a/", "database/creds/a/", 1)), "unknown"},
		{"other role", respond(200, strings.Replace(good, "pki/issue/a/", "pki/issue/ab/", 1)), "unknown"},
		{"lease climbs", respond(200, strings.Replace(good, "/x1", "/../x1", 1)), "unknown"},
		{"duration zero", respond(200, strings.Replace(good, "60", "0", 1)), "unknown"},
		{"duration negative", respond(200, strings.Replace(good, "60", "-1", 1)), "unknown"},
		{"duration at the limit", respond(200, good), "yes"},
		{"duration over the limit", respond(200, strings.Replace(good, "60", "61", 1)), "unknown"},
		{"duration huge", respond(200, strings.Replace(good, "60", "9223372036854775807", 1)), "unknown"},
		{"duration beyond integers", respond(200, strings.Replace(good, "60", "1e99", 1)), "unknown"},
		{"wrapped", respond(200, `{"wrap_info":{"token":"x"},`+good[1:]), "unknown"},
		{"a token instead", respond(200, `{"auth":{"client_token":"x"},`+good[1:]), "unknown"},
		{"deep", respond(200, `{"lease_id":"pki/issue/a/x1","lease_duration":60,"data":{"a":`+
			strings.Repeat("[", 40)+strings.Repeat("]", 40)+`}}`), "unknown"},
		{"lone surrogate", respond(200, strings.Replace(good, marker, `\ud800`, 1)), "unknown"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, row.response)
			c := f.client(t, func(cfg *vault.Config) { cfg.MintTimeout = 2 * time.Second })
			h := child(t, c, rootID, time.Minute, "pawl-tool-a")
			lease, secret, err := c.Mint(t.Context(), h, plainMint(brokertest.Path("pki/issue/a")))
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
				t.Errorf("Mint() = %v, %q, %v, want an error only, without text of the response", lease.ID, secret, err)
			}
			if err == nil && (lease.ID != "pki/issue/a/x1" || lease.Ref != "ref" || time.Until(lease.Expires) > time.Minute) {
				t.Errorf("Mint() = %+v, want the lease of the response", lease)
			}
		})
	}
	if n := elsewhere.count("POST pki/issue/a"); n != 0 {
		t.Errorf("the client followed the redirect %d times, want 0", n)
	}
}

// drip sends one byte every 50 ms and never completes the response.
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

// TestMintOnce drops a reused connection after the request. By default net/http would resend a GET.
func TestMintOnce(t *testing.T) {
	for _, row := range []struct {
		method string
		shared bool
	}{{"GET", false}, {"POST", false}, {"GET", true}, {"POST", true}} {
		method := row.method
		f := newFake(t, dropConnection)
		c := f.client(t, nil)
		m := plainMint(brokertest.Path("database/creds/a"))
		if method == "GET" {
			m.Data = nil
		}
		for i := range 20 {
			h := child(t, c, rootID, time.Minute, "pawl-tool-a") // leaves a connection for the mint to reuse
			if row.shared {
				h, m = shared(t, c, rootID, "pawl-tool-a", m)
			}
			_, _, err := c.Mint(t.Context(), h, m)
			if err == nil || errors.Is(err, broker.ErrNotMinted) {
				t.Errorf("Mint(%s) on a dropped connection = %v, want an unknown outcome", method, err)
			}
			if n := f.count(method + " database/creds/a"); n != i+1 {
				t.Fatalf("%d mints by %s sent %d requests, want one each", i+1, method, n)
			}
		}
	}
}

// TestMintHandle checks that a handle mints once, before it expires, and at a path only.
func TestMintHandle(t *testing.T) {
	f := newFake(t, respond(200, good))
	now := time.Now()
	c := f.client(t, func(cfg *vault.Config) { cfg.Now = func() time.Time { return now } })
	mint := func(h broker.Handle, m broker.Mint) error {
		_, _, err := c.Mint(t.Context(), h, m)
		return err
	}
	m := plainMint(brokertest.Path("pki/issue/a"))
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
	nowhere := child(t, c, rootID, time.Minute, "pawl-tool-a")
	if err := mint(nowhere, plainMint(broker.VaultPath{})); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() without a path = %v, want ErrNotMinted", err)
	}
	late := child(t, c, rootID, 30*time.Second, "pawl-tool-a")
	now = now.Add(31 * time.Second)
	if err := mint(late, m); !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() after the token's expiry = %v, want ErrNotMinted", err)
	}
	if n := f.count("POST pki/issue/a"); n != 1 {
		t.Errorf("the client sent %d mints, want 1", n)
	}
}

// TestMintUnreachable checks that a mint that was never sent is reported as not minted.
func TestMintUnreachable(t *testing.T) {
	f := newFake(t, respond(200, good))
	c := f.client(t, nil)
	var handles [5]broker.Handle
	for i := range handles {
		handles[i] = child(t, c, rootID, time.Minute, "pawl-tool-a")
	}
	f.CloseClientConnections()
	f.Close()
	var err error
	for _, h := range handles { // the first may still find an open keep-alive connection
		_, _, err = c.Mint(t.Context(), h, plainMint(brokertest.Path("pki/issue/a")))
	}
	if !errors.Is(err, broker.ErrNotMinted) {
		t.Errorf("Mint() with no server = %v, want ErrNotMinted", err)
	}
}

// TestMintFinish checks the outcome when the backend rejects the response, and when the caller cancels.
func TestMintFinish(t *testing.T) {
	f := newFake(t, respond(200, good))
	c := f.client(t, nil)
	m := plainMint(brokertest.Path("pki/issue/a"))
	for name, finish := range map[string]func(map[string]any, time.Time) (broker.Finished, error){
		"fails": func(map[string]any, time.Time) (broker.Finished, error) { return broker.Finished{}, errors.New("no") },
		"empty": func(map[string]any, time.Time) (broker.Finished, error) { return broker.Finished{}, nil },
		"too long": func(map[string]any, time.Time) (broker.Finished, error) {
			expires := time.Now().Add(2 * time.Minute)
			return broker.Finished{Secret: broker.NewSecret([]byte("x")), Expires: expires}, nil
		},
	} {
		m.Finish = finish
		_, _, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m)
		if err == nil || errors.Is(err, broker.ErrNotMinted) {
			t.Errorf("Mint() with a Finish that is %q = %v, want an unknown outcome", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h := child(t, c, rootID, time.Minute, "pawl-tool-a")
	if _, _, err := c.Mint(ctx, h, plainMint(brokertest.Path("pki/issue/a"))); err == nil {
		t.Error("Mint() with a cancelled context = nil, want an error")
	}
}

// TestMintToken checks the outcome of each response to a mint that returns a token.
func TestMintToken(t *testing.T) {
	const token = `{"auth":{"client_token":"` + marker + `","accessor":"acc",` +
		`"lease_duration":60,"token_type":"service","orphan":false}}`
	for name, row := range map[string]struct {
		response string
		ok       bool
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
		c := newFake(t, respond(200, row.response)).client(t, nil)
		m := plainMint(brokertest.Path("auth/own/create"))
		m.Leased, m.Auth = false, true
		m.Finish = func(data map[string]any, end time.Time) (broker.Finished, error) {
			text, _ := data["client_token"].(string)
			return broker.Finished{Secret: broker.NewSecret([]byte(text)), Expires: end}, nil
		}
		_, secret, err := c.Mint(t.Context(), child(t, c, rootID, time.Minute, "pawl-tool-a"), m)
		if (err == nil) != row.ok || err == nil && string(secret.Reveal()) != marker ||
			errors.Is(err, broker.ErrNotMinted) {
			t.Errorf("Mint() of a token, %s = %v, want ok = %v", name, err, row.ok)
		}
	}
}

// TestTokenAnswers checks that the client refuses and revokes a token that differs from its request.
func TestTokenAnswers(t *testing.T) {
	for name, alter := range map[string]func(map[string]any){
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
		f := newFake(t, respond(204, ""))
		c := f.client(t, nil)
		f.alterAuth = alter
		g := broker.Grant{ID: grantID, Delegation: rootID, Expires: time.Now().Add(time.Minute)}
		_, err := c.CreateStepToken(t.Context(), g, "x", "pawl-tool-a")
		if err == nil || strings.Contains(err.Error(), marker) {
			t.Errorf("CreateStepToken() with %s = %v, want an error without the token", name, err)
		}
		if revoked := f.count("POST auth/token/revoke-accessor"); revoked == 0 && name != "no accessor" {
			t.Errorf("a token with %s was not revoked", name)
		}
	}
}

func FuzzResponse(f *testing.F) {
	for _, s := range []string{
		good, "{}", "null", `{"lease_id":1}`, `{"auth":{"accessor":null}}`, `{"errors":["a"]}`,
		`{"wrap_info":{"token":"a","ttl":1}}`, `{"data":{"a":[1,{"b":null}]}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		lease, data, err := vault.DecodeResponse(raw)
		if err != nil && (lease != "" || data != nil) {
			t.Errorf("DecodeResponse(%q) = %q, %v, %v, want the error only", raw, lease, data, err)
		}
		if err != nil {
			return
		}
		// A decoder that accepts duplicates and other cases must read an accepted response in the same way.
		var loose struct {
			LeaseID string `json:"lease_id"`
		}
		if json.Unmarshal(raw, &loose) != nil || loose.LeaseID != lease {
			t.Errorf("DecodeResponse(%q) = %q, a loose decoder reads %q", raw, lease, loose.LeaseID)
		}
	})
}
