package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/cmd/dev"
)

// oracle queries Vault and PostgreSQL as root and superuser. It shares no code with the broker.
type oracle struct {
	t     *testing.T
	env   *dev.Env
	vault *api.Client
}

func newOracle(t *testing.T, env *dev.Env) oracle {
	t.Helper()
	client, err := env.Vault.Client()
	if err != nil {
		t.Fatal(err)
	}
	return oracle{t, env, client}
}

// left lists the live leases and roles under the agents' names.
type left struct {
	leases []string // in Vault
	roles  []string // in PostgreSQL
}

func (l left) String() string { return fmt.Sprintf("leases %v, roles %v", l.leases, l.roles) }

func (l left) none() bool { return len(l.leases) == 0 && len(l.roles) == 0 }

// without gives the entries that are not in other.
func (l left) without(other left) left {
	return left{
		slices.DeleteFunc(l.leases, func(s string) bool { return slices.Contains(other.leases, s) }),
		slices.DeleteFunc(l.roles, func(s string) bool { return slices.Contains(other.roles, s) }),
	}
}

// left lists every lease of an engine that mints for agents, and every database role of an agent.
func (o oracle) left() left {
	o.t.Helper()
	found := left{leases: o.leases("pki/issue/")}
	if o.env.Postgres == nil {
		return found
	}
	for _, lease := range o.leases("database/creds/") {
		if !strings.HasPrefix(lease, "database/creds/pawl-shaper/") && !strings.HasPrefix(lease, "database/creds/pawl-revoker/") {
			found.leases = append(found.leases, lease)
		}
	}
	conn := o.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // it was only read
	rows, err := conn.Query(o.t.Context(), "SELECT rolname FROM pg_roles WHERE rolname LIKE 'pawl-gr%'")
	if err == nil {
		found.roles, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		o.t.Fatalf("listing roles: %v", err)
	}
	return found
}

func (o oracle) superuser() *pgx.Conn {
	o.t.Helper()
	conn, err := pgx.Connect(o.t.Context(), o.env.Database)
	if err != nil {
		o.t.Fatalf("asking PostgreSQL: %v", err)
	}
	return conn
}

// leases lists all leases below a prefix.
func (o oracle) leases(prefix string) (ids []string) {
	o.t.Helper()
	listed, err := o.vault.Logical().ListWithContext(o.t.Context(), "sys/leases/lookup/"+prefix)
	if err != nil {
		o.t.Fatalf("listing leases: %v", err)
	}
	if listed == nil {
		return nil
	}
	keys, _ := listed.Data["keys"].([]any)
	for _, k := range keys {
		if name := fmt.Sprint(k); strings.HasSuffix(name, "/") {
			ids = append(ids, o.leases(prefix+name)...)
		} else {
			ids = append(ids, prefix+name)
		}
	}
	return ids
}

// irrevocable counts the leases that Vault has given up revoking.
func (o oracle) irrevocable() string {
	o.t.Helper()
	got, err := o.vault.Logical().ReadWithDataWithContext(o.t.Context(), "sys/leases/count", map[string][]string{"type": {"irrevocable"}})
	if err != nil {
		o.t.Fatalf("counting irrevocable leases: %v", err)
	}
	return fmt.Sprint(got.Data["lease_count"])
}

// housekeeping bounds the time in which Vault removes the leases of closed grants. A grant may be closed before, when its
// target alone shows it dead. A lease that Vault failed to remove is looked up seven times, and then revoked by name.
const housekeeping = 90 * time.Second

// untilNone waits until only the entries of before are left. It fails when a role can log in, or a lease of a certificate
// is there, after d, or anything at all after the time of housekeeping. A role that could not be dropped when it ended
// may be left without LOGIN, for the next collection.
func (o oracle) untilNone(before left, d time.Duration) {
	o.t.Helper()
	var found left
	none := func() bool { found = o.left().without(before); return found.none() }
	dead := func() bool {
		return none() || o.logins(found.roles) == 0 &&
			!slices.ContainsFunc(found.leases, func(id string) bool { return strings.HasPrefix(id, "pki/") })
	}
	switch {
	case !within(d, dead):
		o.t.Errorf("after %v these are still alive: %v", d, found)
	case within(housekeeping, func() bool { return none() || len(found.leases) == 0 && o.collects(found.roles) && none() }):
	default:
		o.t.Errorf("after %v Vault has not removed: %v", housekeeping, found)
	}
}

// logins counts the roles that can log in.
func (o oracle) logins(roles []string) (n int) {
	o.t.Helper()
	conn := o.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // it was only read
	err := conn.QueryRow(o.t.Context(), "SELECT count(*) FROM pg_roles WHERE rolcanlogin AND rolname = ANY ($1)", roles).Scan(&n)
	if err != nil {
		o.t.Fatalf("reading roles: %v", err)
	}
	return n
}

// collects runs a collection if none of the roles can log in.
func (o oracle) collects(roles []string) bool {
	o.t.Helper()
	if o.logins(roles) > 0 {
		return false
	}
	conn := o.superuser()
	defer conn.Close(context.Background()) //nolint:errcheck // the answers are what counts
	var dropped int
	if err := conn.QueryRow(o.t.Context(), "SELECT logins FROM pawl.collect('1 day')").Scan(&dropped); err != nil {
		o.t.Fatalf("collecting: %v", err)
	}
	o.t.Logf("without LOGIN and left for the collection: %v; it dropped %d", roles, dropped)
	return true
}

// login is a database login as an agent gets it.
type login struct{ Username, Password, Host, Port, Database string }

// works tries a login. An error other than a refusal by PostgreSQL proves nothing and fails the test.
func (o oracle) works(l login) bool {
	o.t.Helper()
	conn, err := l.connect(o.t.Context())
	if err == nil {
		_ = conn.Close(o.t.Context()) // opening was the test
		return true
	}
	var refusal *pgconn.PgError
	if !errors.As(err, &refusal) || !strings.HasPrefix(refusal.Code, "28") {
		o.t.Fatalf("login %s: the error is no refusal by PostgreSQL", l.Username)
	}
	return false
}

func (l login) connect(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, fmt.Sprintf("host=%s port=%s dbname=%s user=%s password=%s sslmode=disable connect_timeout=5",
		l.Host, l.Port, l.Database, l.Username, l.Password))
}

// revoked reports whether Vault's revocation list has a certificate.
func (o oracle) revoked(serial *big.Int) bool {
	o.t.Helper()
	block, _ := pem.Decode(o.fetch("/v1/pki/crl/pem"))
	if block == nil {
		o.t.Fatal("Vault gave no revocation list")
	}
	list, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		o.t.Fatal(err)
	}
	return slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool {
		return e.SerialNumber.Cmp(serial) == 0
	})
}

func (o oracle) fetch(path string) []byte {
	o.t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(o.env.Vault.CAPEM())
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}}}
	answer, err := client.Get(o.env.Vault.Address() + path)
	if err != nil {
		o.t.Fatal(err)
	}
	defer answer.Body.Close() //nolint:errcheck // it was only read
	raw, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		o.t.Fatalf("%s: %s, %v", path, answer.Status, err)
	}
	return raw
}

// within reports whether ok becomes true in time.
func within(d time.Duration, ok func() bool) bool {
	deadline, tick := time.Now().Add(d), time.NewTicker(50*time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			return false
		}
		<-tick.C
	}
	return true
}
