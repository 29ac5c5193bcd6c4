package e2e_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
)

// outage is a chain with logins and certificates while a server is down.
type outage struct {
	*world
	root    *agent.Delegation
	logins  []login
	serials []*big.Int
	end     time.Time // when the last secret expires by itself, read from PostgreSQL and the certificates
}

// each is the number of live secrets of each kind.
const each = 4

func newOutage(t *testing.T) *outage {
	t.Helper()
	need(t, true)
	o := &outage{world: newWorld(t, newEnv(t, dev.Config{}), nil)}
	o.here(nil, nil)
	o.root = o.open()
	for range each {
		_, l, err := take(t.Context(), o.root, 0)
		if err != nil {
			t.Fatal(err)
		}
		o.logins = append(o.logins, l)
		o.certificate(o.root)
	}
	o.readEnds()
	return o
}

func (o *outage) open() *agent.Delegation {
	o.t.Helper()
	d, err := o.agent("planner").Open(o.t.Context(), agent.Chain{Task: "outage", Rights: rights("db.read", "tls.call")})
	if err != nil {
		o.t.Fatal(err)
	}
	return d
}

func (o *outage) certificate(d *agent.Delegation) {
	o.t.Helper()
	step, err := d.Begin(o.t.Context(), agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}})
	if err != nil {
		o.t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(step.Secret().Field("certificate")))
	if block == nil {
		o.t.Fatal("the secret has no certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		o.t.Fatal(err)
	}
	o.serials = append(o.serials, cert.SerialNumber)
	o.lives(cert.NotAfter)
}

func (o *outage) lives(until time.Time) {
	if until.After(o.end) {
		o.end = until
	}
}

// readEnds reads from PostgreSQL until when each login can be used.
func (o *outage) readEnds() {
	o.t.Helper()
	conn := o.oracle.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // it was only read
	for _, l := range o.logins {
		var until time.Time
		if err := conn.QueryRow(o.t.Context(), "SELECT rolvaliduntil FROM pg_roles WHERE rolname = $1", l.Username).Scan(&until); err != nil {
			o.t.Fatalf("reading VALID UNTIL of %s: %v", l.Username, err)
		}
		o.lives(until)
	}
}

func (o *outage) revoke(chain string) api.Revocation {
	o.t.Helper()
	rv, err := o.operator().Revoke(o.t.Context(), api.RevokeRequest{Selector: "chain:" + chain, Reason: "an outage"})
	if err != nil {
		o.t.Fatal(err)
	}
	return rv
}

// peek reads a revocation while a server is down and checks its claims: it is not CLOSED, no more grants are dead than
// can be proven, and its latest end is not before the true one.
func (o *outage) peek(id string, known int, end time.Time) api.Revocation {
	o.t.Helper()
	rv, err := o.operator().Revocation(o.t.Context(), id)
	if err != nil {
		o.t.Fatal(err)
	}
	if rv.Closure == string(broker.ClosureClosed) || !rv.Settled.IsZero() {
		o.t.Fatalf("the revocation is %s although a server that must prove it is down: %+v", rv.Closure, rv)
	}
	if rv.Dead > known || rv.Dead+rv.Alive+rv.Unknown != rv.Grants {
		o.t.Fatalf("%d are called dead, %d alive and %d unknown of %d, want at most %d dead", rv.Dead, rv.Alive, rv.Unknown, rv.Grants, known)
	}
	if rv.LatestEnd.Before(end.Truncate(time.Second)) {
		o.t.Fatalf("the reported latest end is %v, and the true one is %v", rv.LatestEnd, end)
	}
	return rv
}

// follow waits, without intervening, for CLOSED with the given number of dead grants.
func (o *outage) follow(id string, dead int) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), 2*time.Minute)
	defer cancel()
	var last api.Revocation
	if err := o.operator().Follow(ctx, id, func(rv api.Revocation) error { last = rv; return nil }); err != nil {
		o.t.Fatalf("following the revocation: %v; it is %+v", err, last)
	}
	if last.Closure != string(broker.ClosureClosed) || last.Dead != dead || last.Grants != dead {
		o.t.Errorf("the revocation is %s with %d of %d dead, want CLOSED with %d", last.Closure, last.Dead, last.Grants, dead)
	}
}

// of counts the chain's grants for a tool: those that are closed, and the open ones with evidence.
func (o *outage) of(tool string) (closed, checked int) {
	o.t.Helper()
	for _, g := range o.grants() {
		switch {
		case g.Tool != tool || g.Chain != string(o.root.Info().Chain):
		case g.State == string(broker.StateClosed):
			closed++
		case len(g.Evidence) > 0:
			checked++
		}
	}
	return closed, checked
}

// ended checks that every login and certificate is dead and that no lease or role is left.
func (o *outage) ended() {
	o.t.Helper()
	for _, l := range o.logins {
		if o.oracle.works(l) {
			o.t.Errorf("login %s works", l.Username)
		}
	}
	for _, serial := range o.serials {
		if !o.oracle.revoked(serial) {
			o.t.Errorf("certificate %v is not on the revocation list", serial)
		}
	}
	o.oracle.untilNone(o.before, 30*time.Second)
	if n := o.oracle.irrevocable(); n != "0" {
		o.t.Errorf("Vault has given up %s leases", n)
	}
}

// TestDeadPostgreSQL: the logins of a database that is down are unknown until it is back. Meanwhile the certificates of
// the same chain are dead, and so is another chain.
func TestDeadPostgreSQL(t *testing.T) {
	o := newOutage(t)
	if err := o.env.Postgres.Stop(); err != nil {
		t.Fatal(err)
	}
	rv := o.revoke(string(o.root.Info().Chain))
	_, err := o.root.Begin(t.Context(), agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}})
	mustRefuse(t, "a step after the acknowledgement", err, agent.ErrRevoked)
	if !within(30*time.Second, func() bool {
		o.peek(rv.ID, each, o.end)
		dead, _ := o.of("tls.call")
		_, checked := o.of("db.read")
		return dead == each && checked == each
	}) {
		t.Fatal("the certificates are not dead, or the logins were not checked, although only PostgreSQL is down")
	}
	for _, serial := range o.serials {
		if !o.oracle.revoked(serial) {
			t.Errorf("certificate %v is called dead, but is not on the revocation list", serial)
		}
	}

	other := o.open()
	o.certificate(other)
	o.follow(o.revoke(string(other.Info().Chain)).ID, 1)
	if !within(10*time.Second, func() bool { return o.peek(rv.ID, each, o.end).Dead == each }) {
		t.Errorf("the revocation does not count %d dead", each)
	}

	if err := o.env.Postgres.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.follow(rv.ID, 2*each)
	o.ended()
}

// TestDeadVault: with Vault down a fence is still acknowledged and logins are severed at their database. Nothing is
// called dead before Vault is back to confirm it.
func TestDeadVault(t *testing.T) {
	for _, row := range []struct {
		name     string
		down, up func(*dev.Env, context.Context) error
	}{
		{"paused", func(e *dev.Env, _ context.Context) error { return e.Vault.Pause() }, func(e *dev.Env, _ context.Context) error { return e.Vault.Continue() }},
		{"killed", func(e *dev.Env, _ context.Context) error { return e.Vault.Kill() }, func(e *dev.Env, ctx context.Context) error { return e.Vault.Restart(ctx) }},
		{"sealed", func(e *dev.Env, ctx context.Context) error { return e.Vault.Seal(ctx) }, func(e *dev.Env, ctx context.Context) error { return e.Vault.Unseal(ctx) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			o := newOutage(t)
			if err := row.down(o.env, t.Context()); err != nil {
				t.Fatal(err)
			}
			rv := o.revoke(string(o.root.Info().Chain))
			_, err := o.root.Begin(t.Context(), agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}})
			mustRefuse(t, "a step after the acknowledgement", err, agent.ErrRevoked)
			if !within(30*time.Second, func() bool {
				o.peek(rv.ID, 0, o.end)
				for _, l := range o.logins {
					if o.oracle.works(l) {
						return false
					}
				}
				_, logins := o.of("db.read")
				_, certificates := o.of("tls.call")
				return logins == each && certificates == each
			}) {
				t.Fatal("the logins work, or were not checked, although only Vault is down")
			}
			if err := row.up(o.env, t.Context()); err != nil {
				t.Fatal(err)
			}
			o.follow(rv.ID, 2*each)
			o.ended()
		})
	}
}
