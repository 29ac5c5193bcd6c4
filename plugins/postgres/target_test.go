package postgres_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

const vaultPassword = "the password of pawl_vault in these tests"

// tables makes the initial content of each test's database. Agents may get orders, items and t1 to t5, but not
// salaries.
const tables = `
CREATE TABLE orders (id serial PRIMARY KEY, customer int NOT NULL, note text);
INSERT INTO orders (customer, note) SELECT i % 3, 'order ' || i FROM generate_series(1, 300) i;
CREATE TABLE items (id int); CREATE TABLE salaries (id int);
CREATE SCHEMA closed; CREATE TABLE closed.t (id int);
CREATE TABLE t1 (id int); CREATE TABLE t2 (id int); CREATE TABLE t3 (id int);
CREATE TABLE t4 (id int); CREATE TABLE t5 (id int);
GRANT ALL ON SEQUENCE orders_id_seq TO PUBLIC;`

// target is a database that was set up, with one connection pool per role.
type target struct {
	*testing.T
	server  *parts.PostgresServer
	name    string
	root    *pgxpool.Pool // the superuser
	vault   *pgxpool.Pool // pawl_vault, as Vault connects
	backend *postgres.Backend
	creds   *serviceLogins
}

func newTarget(t *testing.T) *target { return targetOn(t, parts.NeedPostgreSQL(t)) }

func targetOn(t *testing.T, server *parts.PostgresServer) *target {
	t.Helper()
	dsn, err := server.CreateDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return targetIn(t, server, dsn)
}

// targetIn sets up an empty database.
func targetIn(t *testing.T, server *parts.PostgresServer, dsn string) *target {
	t.Helper()
	ctx := t.Context()
	tt := &target{T: t, server: server, root: pool(t, dsn)}
	if err := tt.root.QueryRow(ctx, "SELECT current_database()").Scan(&tt.name); err != nil {
		t.Fatal(err)
	}
	tt.exec(tables)
	tt.setup()
	tt.vault = pool(t, server.DSNFor("pawl_vault", vaultPassword, tt.name))
	tt.creds = &serviceLogins{vault: tt.vault, ttl: time.Hour}
	tt.backend = tt.newBackend(postgres.Config{})
	return tt
}

func (t *target) setup() {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), t.server.DSN(t.name))
	if err != nil {
		t.Fatal("connecting as the superuser")
	}
	defer conn.Close(t.Context())
	all := []string{"select", "insert", "update", "delete"}
	cfg := postgres.SetupConfig{VaultPassword: vaultPassword, Tables: []postgres.Grantable{
		{Table: "orders", Verbs: all}, {Table: "items", Verbs: []string{"select"}}}}
	for i := range 5 {
		cfg.Tables = append(cfg.Tables, postgres.Grantable{Table: fmt.Sprintf("public.t%d", i+1), Verbs: all})
	}
	if err := postgres.Setup(t.Context(), conn, cfg); err != nil {
		t.Fatalf("Setup(%v) = %v, want nil", t.name, err)
	}
}

func (t *target) newBackend(cfg postgres.Config) *postgres.Backend {
	t.Helper()
	host, port, _ := strings.Cut(t.server.Address(), ":")
	name := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(t.name)
	if cfg.DSN == "" {
		cfg.DSN = fmt.Sprintf("host=%s port=%s dbname='%s' sslmode=disable", host, port, name)
	}
	if cfg.Credentials == nil {
		cfg.Credentials = t.creds
	}
	b, err := postgres.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

func (t *target) exec(sql string, args ...any) {
	t.Helper()
	if _, err := t.root.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%.80s: %v", sql, err)
	}
}

func pool(t *testing.T, dsn string) *pgxpool.Pool {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		t.Fatal("a DSN does not parse")
	}
	cfg.MaxConns = 8
	p, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal("a pool does not open")
	}
	t.Cleanup(p.Close)
	return p
}

// serviceLogins makes the broker's own credentials as Vault does.
type serviceLogins struct {
	vault *pgxpool.Pool

	mu    sync.Mutex
	ttl   time.Duration
	down  bool // Credential fails
	hangs bool // Credential does not return before ctx ends
	made  []string
}

func (s *serviceLogins) Credential(ctx context.Context, p postgres.Purpose) (string, string, time.Time, error) {
	s.mu.Lock()
	if s.hangs {
		s.mu.Unlock()
		<-ctx.Done()
		return "", "", time.Time{}, context.Cause(ctx)
	}
	defer s.mu.Unlock()
	if s.down {
		return "", "", time.Time{}, errors.New("vault is down")
	}
	name, password, expires := "pawl-cert-broker-"+random8(), rand.Text(), time.Now().Add(s.ttl)
	verifier, err := postgres.Verifier(password)
	if err != nil {
		return "", "", time.Time{}, err
	}
	s.made = append(s.made, name)
	_, err = s.vault.Exec(ctx, "SELECT pawl.grant_service_login($1, $2, $3, $4)", name, verifier, expires, string(p))
	return name, password, expires, err
}

func random8() string { return rand.Text()[:8] }

func newGrant(raw string) broker.Grant {
	a, err := args.Parse([]byte(raw))
	if err != nil {
		panic("a test's arguments do not parse: " + raw)
	}
	alphabet := "0123456789abcdefghjkmnpqrstvwxyz"
	id := make([]byte, 24)
	_, _ = rand.Read(id) // never fails
	for i := range id {
		id[i] = alphabet[id[i]%32]
	}
	return broker.Grant{ID: broker.GrantID("gr" + string(id)), Args: a}
}

// tool declares every argument of this backend and allows all verbs.
func tool() broker.Tool {
	return broker.Tool{Name: "db", Backend: "postgres", Narrowing: broker.NarrowNative,
		Path:     brokertest.Path("database/pawl-app"),
		Settings: map[string]string{"verbs": "select,insert,update,delete", "sslmode": "disable", "connections": "100"},
		Arguments: map[string]broker.Parameter{"tables": {Kind: "list", Required: true}, "verbs": {Kind: "list"},
			"filter_column": {Kind: "string"}, "filter_value": {Kind: "string"}}}
}

// credential is the secret that an agent gets from a mint.
type credential struct {
	grant broker.Grant
	URL   string            `json:"url"`
	User  string            `json:"username"`
	Port  int               `json:"port"`
	Names map[string]string `json:"tables"`
}

// mint makes a credential for the arguments. The test takes the place of Vault.
func (t *target) mint(args string) credential {
	t.Helper()
	c, err := t.tryMint(newGrant(args))
	if err != nil {
		t.Fatalf("minting for %s: %v", args, err)
	}
	return c
}

func (t *target) tryMint(g broker.Grant) (credential, error) { return t.tryMintWith(tool(), g) }

func (t *target) tryMintWith(tool broker.Tool, g broker.Grant) (credential, error) {
	m, display, err := t.backend.Prepare(t.Context(), tool, g)
	if err != nil {
		return credential{}, err
	}
	name, password := "pawl-"+display+"-"+random8(), rand.Text()
	verifier, err := postgres.Verifier(password)
	if err != nil {
		return credential{}, err
	}
	_, err = t.vault.Exec(t.Context(), "SELECT pawl.grant_login($1, $2, $3)", name, verifier, time.Now().Add(m.TTL))
	if err != nil {
		return credential{}, err
	}
	f, err := m.Finish(map[string]any{"username": name, "password": password}, time.Time{})
	if err != nil {
		return credential{}, err
	}
	return t.read(g, f), nil
}

// read decodes a secret as the agent does.
func (t *target) read(g broker.Grant, f broker.Finished) credential {
	t.Helper()
	c := credential{grant: g}
	if err := json.Unmarshal(f.Secret.Reveal(), &c); err != nil {
		t.Errorf("the secret of %s is not JSON", g.ID)
	}
	return c
}

// login opens a session with the raw credential.
func (t *target) login(c credential) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.URL)
	if err != nil {
		t.Fatalf("logging in as %s was refused: %v", c.User, sqlState(err))
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) }) // most were severed by then
	return conn
}

// refusesLogin reports whether PostgreSQL refuses the credential.
func (t *target) refusesLogin(c credential) bool {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.URL)
	if err == nil {
		_ = conn.Close(t.Context())
		return false
	}
	return strings.HasPrefix(sqlState(err), "28")
}

// sqlState returns the SQLSTATE of err, or its type. It never returns the text, which may quote a URL.
func sqlState(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return fmt.Sprintf("%T", err)
}

func (t *target) prove(gs ...broker.Grant) []broker.Evidence {
	t.Helper()
	e, err := t.backend.Prove(t.Context(), gs)
	if err != nil || len(e) != len(gs) {
		t.Fatalf("Prove(%d grants) = %d, %v, want one evidence each", len(gs), len(e), err)
	}
	return e
}

func (t *target) sever(gs ...broker.Grant) {
	t.Helper()
	if err := t.backend.Sever(t.Context(), gs); err != nil {
		t.Fatalf("Sever(%d grants) = %v, want nil", len(gs), err)
	}
}

func (t *target) count(sql string, args ...any) (n int) {
	t.Helper()
	if err := t.root.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// agentID returns the SPIFFE ID of an agent.
func agentID(t *testing.T, name string) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromString("spiffe://pawl.dev/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}
