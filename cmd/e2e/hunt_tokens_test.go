package e2e_test

import (
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/wire"
)

// as is a client of Vault with a token that was obtained.
func (h *hunt) as(token string) *api.Client {
	h.Helper()
	c, err := h.env.Vault.Client()
	if err != nil {
		h.Fatal(err)
	}
	if keepSecret(token) != nil {
		h.Fatal("keeping a secret")
	}
	c.SetToken(token)
	return c
}

// holds is a way: Vault takes the token.
func (h *hunt) holds(token string) func() bool {
	h.Helper()
	c := h.as(token)
	return func() bool {
		_, err := c.Auth().Token().LookupSelfWithContext(h.Context())
		return err == nil
	}
}

// bearer is a service of a row that accepts signed tokens: Vault's JWT auth, which checks the signature and the end alone.
type bearer struct {
	*hunt
	token string
}

// bearer starts a broker and takes a token that its service accepts.
func (h *hunt) bearer(ttl time.Duration, settings string, role map[string]any) bearer {
	h.Helper()
	h.write("sys/mounts/"+h.id, map[string]any{"type": "transit"})
	h.write(h.id+"/keys/agents", map[string]any{"type": "ecdsa-p256"})
	h.broker(fmt.Sprintf(`
  - name: hunt
    backend: tokens
    narrowing: native
    ttl: %s
    settings: {audience: orders%s}
    vault: {policy: pawl-tool-ID, path: ID/agents}`, ttl, settings),
		map[string]wire.Backend{"tokens": {Plugin: "jwt", Issuer: "https://pawl.dev"}})
	key, err := h.root.Logical().ReadWithContext(h.Context(), h.id+"/keys/agents")
	if err != nil {
		h.Fatal(err)
	}
	versions, _ := key.Data["keys"].(map[string]any)
	first, _ := versions["1"].(map[string]any)
	h.write("sys/auth/"+h.id, map[string]any{"type": "jwt"})
	h.write("auth/"+h.id+"/config", map[string]any{"jwt_validation_pubkeys": []any{first["public_key"]},
		"bound_issuer": "https://pawl.dev", "jwt_supported_algs": []string{"ES256"}})
	all := map[string]any{"role_type": "jwt", "user_claim": "sub", "bound_audiences": "orders", "token_policies": []string{"default"},
		"token_ttl": "1m", "expiration_leeway": -1, "not_before_leeway": -1, "clock_skew_leeway": -1}
	for name, value := range role {
		all[name] = value
	}
	h.write("auth/"+h.id+"/role/orders", all)
	return bearer{h, h.take(nil, 0)["token"]}
}

// login presents the token, and returns the service's own.
func (b bearer) login() (session string, accepted bool) {
	answer, err := b.root.Logical().WriteWithContext(b.Context(), "auth/"+b.id+"/login", map[string]any{"role": "orders", "jwt": b.token})
	if err != nil {
		return "", false
	}
	return answer.Auth.ClientToken, true
}

func (b bearer) accepted() bool { _, ok := b.login(); return ok }

// introspects asks the broker as a service does.
func (b bearer) introspects() bool { return newService(b.w).ask(b.token).Active }

var huntTokens = []huntRow{
	{plugin: "jwt", name: "a service that asks nobody", end: broker.ClosureClosed,
		why: "the service checks the signature and the end alone",
		set: func(h *hunt) quarry {
			b := h.bearer(10*time.Second, ", outlives: 2s", nil)
			return quarry{ways: map[string]func() bool{"the token": b.accepted}}
		}},
	{plugin: "jwt", name: "a session for the token", end: broker.ClosureClosed,
		why: "the service gave a token of its own, which lives on",
		set: func(h *hunt) quarry {
			b := h.bearer(8*time.Second, ", outlives: 8s", map[string]any{"token_ttl": "12s", "token_max_ttl": "12s"})
			session, ok := b.login()
			if !ok {
				h.Fatal("the service refuses the token")
			}
			return quarry{ways: map[string]func() bool{"the service's token": h.holds(session)}}
		}},
	{plugin: "jwt", name: "a service whose clock lags", end: broker.ClosureClosed,
		why: "the service takes the token for some seconds after its end",
		set: func(h *hunt) quarry {
			b := h.bearer(6*time.Second, ", outlives: 8s", map[string]any{"expiration_leeway": 5})
			return quarry{ways: map[string]func() bool{"the token": b.accepted}}
		}},
	{plugin: "jwt", name: "a gateway that keeps an answer", end: broker.ClosureClosed,
		why: "the gateway asked before the revocation, and uses that answer for some seconds",
		set: func(h *hunt) quarry {
			b := h.bearer(8*time.Second, ", outlives: 6s", nil)
			var asked time.Time
			active, once := false, sync.Mutex{}
			return quarry{ways: map[string]func() bool{"the gateway": func() bool {
				once.Lock()
				defer once.Unlock()
				if time.Since(asked) > 5*time.Second {
					active, asked = b.introspects(), time.Now()
				}
				return active
			}}}
		}},
	{plugin: "jwt", name: "a service that asks for each use", end: broker.ClosureClosed,
		why: "the signature and the end of the token say that it is good, and the answer of the broker alone does not",
		set: func(h *hunt) quarry {
			b := h.bearer(time.Minute, "", nil)
			return quarry{ways: map[string]func() bool{"the service": func() bool { return b.accepted() && b.introspects() }}}
		}},
}

// visitor is a tool that calls Vault with a token of its own.
func (h *hunt) visitor(settings, policy string, ttl time.Duration) string {
	h.Helper()
	h.write("sys/mounts/"+h.id, map[string]any{"type": "kv"})
	h.write(h.id+"/note", map[string]any{"text": "kept in a drawer"})
	h.write("sys/policies/acl/"+h.id+"-use", map[string]any{"policy": fmt.Sprintf("path \"%s/note\" { capabilities = [\"read\"] }\n"+
		"path \"auth/token/lookup-self\" { capabilities = [\"read\"] }\n", h.id) + policy})
	h.broker(fmt.Sprintf(`
  - name: hunt
    backend: vault
    narrowing: native
    ttl: %s
    settings: {policies: ID-use%s}
    vault: {policy: pawl-tool-ID, path: auth/token/create/ID}`, ttl, settings), map[string]wire.Backend{"vault": {Plugin: "token"}})
	m := h.take(nil, 0)
	return m["token"] + m["wrapping_token"] // one of them
}

// obtain makes a token with another one.
func (h *hunt) obtain(with, path string, data map[string]any) string {
	h.Helper()
	answer, err := h.as(with).Logical().WriteWithContext(h.Context(), path, data)
	if err != nil {
		h.Fatalf("making a token at %s: %v", path, err)
	}
	return answer.Auth.ClientToken
}

const (
	mayCreate = `path "auth/token/create" { capabilities = ["create", "update"] }`
	mayOrphan = `path "auth/token/create-orphan" { capabilities = ["create", "update", "sudo"] }`
)

var huntVaultTokens = []huntRow{
	{plugin: "token", name: "child tokens", end: broker.ClosureClosed,
		why: "the agent made tokens with its own, which the broker does not know",
		set: func(h *hunt) quarry {
			own := h.visitor(`, wrap: "false"`, mayCreate, 5*time.Minute)
			child := h.obtain(own, "auth/token/create", map[string]any{"policies": []string{h.id + "-use"}, "ttl": "5m"})
			return quarry{ways: map[string]func() bool{"the token": h.holds(own), "its child": h.holds(child),
				"a child of that": h.holds(h.obtain(child, "auth/token/create", map[string]any{"ttl": "5m"}))}}
		}},
	{plugin: "token", name: "a batch token", unnamed: true, end: broker.ClosureClosed,
		why: "the agent made a batch token, which Vault does not store and cannot look up by an accessor",
		set: func(h *hunt) quarry {
			own := h.visitor(`, wrap: "false"`, mayCreate, 5*time.Minute)
			batch := h.obtain(own, "auth/token/create", map[string]any{"type": "batch", "policies": []string{h.id + "-use"}, "ttl": "5m"})
			return quarry{ways: map[string]func() bool{"the token": h.holds(own), "the batch token": h.holds(batch)}}
		}},
	{plugin: "token", name: "an orphan token", end: broker.ClosureClosed,
		why: "the agent made a token without a parent, which no end of another one ends",
		set: func(h *hunt) quarry {
			own := h.visitor(`, wrap: "false", outlives: 8s`, mayOrphan, 8*time.Second)
			orphan := h.obtain(own, "auth/token/create-orphan", map[string]any{"policies": []string{h.id + "-use"}, "ttl": "12s"})
			return quarry{ways: map[string]func() bool{"the orphan": h.holds(orphan)}}
		}},
	{plugin: "token", name: "a wrapped token", end: broker.ClosureClosed,
		why: "the wrapping token has no parent, and it was not opened yet",
		set: func(h *hunt) quarry {
			wrapping := h.visitor("", "", 5*time.Minute)
			return quarry{ways: map[string]func() bool{"the wrapping token": func() bool {
				_, err := h.as(wrapping).Logical().WriteWithContext(h.Context(), "sys/wrapping/lookup", map[string]any{"token": wrapping})
				return err == nil
			}}}
		}},
	{plugin: "token", name: "an opened wrapping", end: broker.ClosureClosed,
		why: "the thief has opened the wrapping, so that its token is gone and the one inside works",
		set: func(h *hunt) quarry {
			inside, err := h.as(h.visitor("", "", 5*time.Minute)).Logical().UnwrapWithContext(h.Context(), "")
			if err != nil {
				h.Fatal(err)
			}
			return quarry{ways: map[string]func() bool{"the token inside": h.holds(inside.Auth.ClientToken)}}
		}},
	{plugin: "token", name: "a lease that Vault cannot revoke", end: broker.ClosureClosed,
		why: "the agent obtained a login at a server that Vault cannot reach any more",
		set: func(h *hunt) quarry {
			s := h.otherDatabase(h.db2())
			s.exec(fmt.Sprintf("CREATE ROLE %s LOGIN CREATEROLE PASSWORD 'of the hunt'", h.id))
			h.write("sys/mounts/db-"+h.id, map[string]any{"type": "database"})
			connection := map[string]any{"plugin_name": "postgresql-database-plugin", "allowed_roles": "*", "username": h.id, "password": "of the hunt",
				"connection_url": "postgres://{{username}}:{{password}}@" + s.server.Address() + "/" + s.name + "?sslmode=disable"}
			h.write("db-"+h.id+"/config/there", connection)
			h.write("db-"+h.id+"/roles/reader", map[string]any{"db_name": "there", "default_ttl": "14s", "max_ttl": "14s",
				"creation_statements": `CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}'`})
			own := h.visitor(`, wrap: "false", outlives: 14s`, `path "db-`+h.id+`/creds/reader" { capabilities = ["read"] }`, 8*time.Second)
			login, err := h.as(own).Logical().ReadWithContext(h.Context(), "db-"+h.id+"/creds/reader")
			if err != nil {
				h.Fatal(err)
			}
			user, _ := login.Data["username"].(string)
			password, _ := login.Data["password"].(string)
			l := stolen{h, user, password, s.server.Address(), s.name}
			return quarry{ways: map[string]func() bool{"the login": l.logsIn},
				change: func() {
					s.exec(fmt.Sprintf("ALTER ROLE %s NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '%[1]s'", h.id))
				}}
		}},
}

// fixed is a password of a role that Vault keeps and an agent reads.
func (h *hunt) fixed() (stolen, *shop) {
	h.Helper()
	s := h.otherDatabase(h.db2())
	password := rand.Text()
	s.exec(fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", h.id, password))
	h.write("sys/mounts/"+h.id, map[string]any{"type": "kv", "options": map[string]any{"version": "2"}})
	h.until("the engine is ready", func() bool {
		_, err := h.root.Logical().WriteWithContext(h.Context(), h.id+"/data/login", map[string]any{"data": map[string]any{"password": password}})
		return err == nil
	})
	h.broker(`
  - name: hunt
    backend: notes
    narrowing: none
    ttl: 1m
    vault: {policy: pawl-tool-ID, path: ID/login}`, map[string]wire.Backend{"notes": {Plugin: "kv"}})
	return stolen{h, h.id, h.take(nil, 0)["password"], s.server.Address(), s.name}, s
}

var huntStatic = []huntRow{
	{plugin: "kv", name: "a password", end: broker.ClosurePartial,
		why: "the target takes the value until somebody changes it there",
		set: func(h *hunt) quarry {
			l, _ := h.fixed()
			return quarry{ways: map[string]func() bool{"the password": l.logsIn}}
		}},
	{plugin: "kv", name: "a password changed in Vault alone", end: broker.ClosurePartial,
		why: "Vault has a newer value, and the target takes the old one",
		set: func(h *hunt) quarry {
			l, _ := h.fixed()
			return quarry{ways: map[string]func() bool{"the password": l.logsIn}, change: func() {
				h.write(h.id+"/data/login", map[string]any{"data": map[string]any{"password": "newer"}})
			}}
		}},
	{plugin: "kv", name: "a password destroyed in Vault", unnamed: true, end: broker.ClosurePartial,
		why: "Vault has the value no more, and the target takes it",
		set: func(h *hunt) quarry {
			l, _ := h.fixed()
			return quarry{ways: map[string]func() bool{"the password": l.logsIn}, change: func() {
				if _, err := h.root.Logical().DeleteWithContext(h.Context(), h.id+"/metadata/login"); err != nil {
					h.Fatal(err)
				}
			}}
		}},
}
