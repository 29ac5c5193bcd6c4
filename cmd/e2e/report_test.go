package e2e_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/dev"
)

// captured has every secret that two agents got, as an attacker who reads their memory would.
type captured struct {
	logins  []login
	serials []*big.Int
	notes   int // static secrets
}

// TestReportIsTrue revokes a chain of two agents with many live secrets of three tools, and compares the broker's
// report with the backends' own state.
func TestReportIsTrue(t *testing.T) {
	t.Parallel()
	need(t, true)
	w := newWorld(t, newEnv(t, dev.Config{}), nil)
	w.here(nil, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	rights := []agent.Right{{Tool: "db.read", Use: true, Delegate: true}, {Tool: "tls.call", Use: true, Delegate: true}, {Tool: "notes.read", Use: true, Delegate: true}}
	root, err := w.agent("planner").Open(ctx, agent.Chain{Task: "report", Rights: rights, Depth: 1})
	if err != nil {
		t.Fatal(err)
	}
	id, err := root.Delegate(ctx, dev.Agent("writer").String(), agent.Share{Rights: rights})
	if err != nil {
		t.Fatal(err)
	}
	part, err := w.agent("writer").Join(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	other, err := w.agent("stranger").Open(ctx, agent.Chain{Task: "another chain", Rights: rights})
	if err != nil {
		t.Fatal(err)
	}
	var c captured
	for range 3 {
		c.capture(t, root)
		c.capture(t, part)
	}
	bystander, untouched, err := take(ctx, other, 0)
	if err != nil {
		t.Fatal(err)
	}
	session := cursor(t, c.logins[0])
	for _, l := range c.logins {
		if !w.oracle.works(l) {
			t.Fatalf("login %s does not work while it is live", l.Username)
		}
	}

	rv := w.revoke(ctx, string(root.Info().Chain))

	dynamic, alive := len(c.logins)+len(c.serials), 0
	for _, l := range c.logins {
		if w.oracle.works(l) {
			alive++
			t.Errorf("login %s works after the final closure", l.Username)
		}
	}
	for _, s := range c.serials {
		if !w.oracle.revoked(s) {
			alive++
			t.Errorf("certificate %x is not on Vault's revocation list", s)
		}
	}
	if _, err := session.Exec(ctx, "FETCH 1 FROM reading"); err == nil {
		t.Error("a session with an open cursor still reads")
	}
	if rv.Grants != dynamic+c.notes || rv.Dead != dynamic-alive || rv.Alive != c.notes+alive || rv.Static != c.notes || rv.Unknown != 0 {
		t.Errorf("the report says %d grants, %d dead, %d alive, %d static, %d unknown; the oracle found %d secrets, %d working, %d static",
			rv.Grants, rv.Dead, rv.Alive, rv.Static, rv.Unknown, dynamic+c.notes, alive+c.notes, c.notes)
	}
	// A static secret still works, and the report must show it.
	if want := broker.ClosurePartial; rv.Closure != string(want) {
		t.Errorf("closure = %s, want %s", rv.Closure, want)
	}
	if !w.oracle.works(untouched) {
		t.Error("the login of another chain was ended")
	}
	if err := bystander.Close(ctx); err != nil {
		t.Fatal(err)
	}
	w.allClosed(2 * bound)
	w.oracle.untilNone(w.before, time.Second)
	if n := w.oracle.irrevocable(); n != "0" {
		t.Errorf("Vault has given up revoking %s leases", n)
	}
}

// revoke revokes a chain and waits for the final closure.
func (w *world) revoke(ctx context.Context, chain string) (rv api.Revocation) {
	w.t.Helper()
	o := w.operator()
	rv, err := o.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + chain, Reason: "a test"})
	if err == nil {
		err = o.Follow(ctx, rv.ID, func(now api.Revocation) error { rv = now; return nil })
	}
	if err != nil {
		w.t.Fatalf("revoking: %v", err)
	}
	return rv
}

// capture takes a step with each tool and keeps a copy of the secret.
func (c *captured) capture(t *testing.T, d *agent.Delegation) {
	t.Helper()
	_, l, err := take(t.Context(), d, 0)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := d.Begin(t.Context(), agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Begin(t.Context(), agent.Call{Tool: "notes.read"}); err != nil {
		t.Fatal(err)
	}
	serial, err := serialOf(cert.Secret().Field("certificate"))
	if err != nil {
		t.Fatal(err)
	}
	c.logins, c.serials, c.notes = append(c.logins, l), append(c.serials, serial), c.notes+1
}

func serialOf(chain string) (*big.Int, error) {
	block, _ := pem.Decode([]byte(chain))
	if block == nil {
		return nil, errors.New("the secret has no certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	return cert.SerialNumber, nil
}

// cursor opens a session with a cursor in the middle of a table.
func cursor(t *testing.T, l login) *pgx.Conn {
	t.Helper()
	conn, err := l.connect(t.Context())
	if err == nil {
		_, err = conn.Exec(t.Context(), "BEGIN; DECLARE reading CURSOR FOR SELECT * FROM orders; FETCH 1 FROM reading")
	}
	if err != nil {
		t.Fatalf("login %s cannot read", l.Username)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) }) // it is ended by then
	return conn
}
