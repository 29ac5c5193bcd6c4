package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// Of what is remembered about shapes, so that most steps need no word with the database. An hour is how
// long the database keeps a shape that nobody uses, at least.
const (
	shapeMemory = 5 * time.Minute
	maxShapes   = 10000
)

// Prepare turns the arguments into a shape and sees to it that the database has it. An argument
// outside what the tool or the database lets agents have is Denied, a database that does not
// answer Unavailable.
func (b *Backend) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	s, err := b.read(t)
	if err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Internal, "prepare", "the tool is not as it was loaded").Because(err)
	}
	if _, err := broker.ParseGrantID(string(g.ID)); err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Internal, "prepare", "not a grant").Because(err)
	}
	sp, err := s.narrow(b.database, g.Args)
	if err != nil {
		return broker.Mint{}, "", err
	}
	shape, text := sp.encode()
	if err := b.ensure(ctx, shape, text); err != nil {
		return broker.Mint{}, "", err
	}
	display := string(g.ID) + "-" + shape
	m := broker.Mint{Path: []string{s.mount, "creds", s.role}, Leased: true, TTL: ttl(t.TTL)}
	m.Finish = func(answer map[string]any, _ time.Time) (broker.Finished, error) {
		f, err := s.finish(b.database, sp, "pawl-"+display+"-", answer)
		f.Outlives = b.cfg.Now().Add(ttl(t.TTL) + vaultMargin)
		return f, err
	}
	return m, display, nil
}

// vaultMargin is how much later than the lease Vault sets VALID UNTIL (measured).
const vaultMargin = 5 * time.Second

// ttl is what the Vault role of the tool must be set to: Vault's database engine has no shorter life for
// a shorter step, whose token's end is what ends it.
func ttl(tool time.Duration) time.Duration {
	if tool <= 0 {
		return broker.DefaultTTL
	}
	return min(tool, broker.MaxTTL)
}

// narrow reads the arguments. Each that is left out is the whole of the setting.
func (s settings) narrow(database string, args args.Args) (spec, error) {
	sp := spec{Connections: s.connections, Database: database, Tables: s.tables, Verbs: s.verbs,
		StatementMS: s.statement.Milliseconds(), IdleMS: s.idle.Milliseconds(), Network: s.network}
	if v, given := args.Get(argTables); given || len(s.tables) == 0 {
		names, _ := v.Strings()
		tables, err := parseTables(names, s.schema)
		if err != nil {
			return spec{}, outside(argTables, err.Error())
		}
		if len(s.tables) > 0 && !subset(tables, s.tables) {
			return spec{}, outside(argTables, "a table is not one of the tool's")
		}
		sp.Tables = tables
	}
	if v, given := args.Get(argVerbs); given {
		names, _ := v.Strings()
		verbs, err := parseVerbs(names)
		if err != nil {
			return spec{}, outside(argVerbs, err.Error())
		}
		if !subset(verbs, s.verbs) {
			return spec{}, outside(argVerbs, "a verb is not one of the tool's")
		}
		sp.Verbs = verbs
	}
	if err := s.filterBy(&sp, args); err != nil {
		return spec{}, err
	}
	return sp, nil
}

func (s settings) filterBy(sp *spec, args args.Args) error {
	v, valued := args.Get(argFilterValue)
	c, chosen := args.Get(argFilterColumn)
	if s.filterColumn == "" && !valued && !chosen {
		return nil
	}
	column, _ := c.Text()
	if s.filterColumn != "" {
		column, chosen = s.filterColumn, !chosen
	}
	value, text := v.Text()
	if !valued || !chosen || !text {
		return outside(argFilterValue, "a filter needs a column and a value")
	}
	f, err := parseFilter(column, value)
	if err != nil {
		return outside(argFilterValue, err.Error())
	}
	names := map[string]bool{}
	for _, t := range sp.Tables {
		if names[t[1]] {
			return outside(argTables, "with a filter, two tables must not have the same name")
		}
		names[t[1]] = true
	}
	sp.Filter = f
	return nil
}

func outside(argument, why string) *broker.Error {
	return broker.Errorf(broker.Denied, "prepare", "argument %q: %s", argument, why).
		With(broker.CodeArgumentOutside).Lacks("", "argument:"+argument)
}

// ensure makes the shape in the database unless it was seen there lately.
func (b *Backend) ensure(ctx context.Context, shape, text string) error {
	now := b.cfg.Now()
	b.mu.Lock()
	seen, known := b.known[shape]
	b.mu.Unlock()
	if known && now.Sub(seen) < shapeMemory {
		return nil
	}
	var void any
	err := b.shaper.query(ctx, "SELECT pawl.ensure_shape($1, $2)::text", []any{shape, text}, &void)
	if err != nil && failureOf(err) == asked {
		return outside(argTables, "the database lets agents have no such table, verb or filter, or its pg_hba.conf does not confine the tool's network").Because(err)
	}
	if err != nil {
		return broker.Errorf(broker.Unavailable, "prepare", "database %q cannot be prepared; nothing was made", b.database).
			With(broker.CodeBackendDown).Because(err).After(time.Second)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.known) >= maxShapes {
		clear(b.known)
	}
	b.known[shape] = now
	return nil
}

// drawnPassword is the length of a password from which its digest is kept: Vault's own are as long, of
// 63 characters, about 119 bits. A password policy of the mount's may make shorter ones.
const drawnPassword = 20

// login is what the agent gets.
type login struct {
	Username string            `json:"username"`
	Password string            `json:"password"`
	Host     string            `json:"host"`
	Port     int               `json:"port"`
	Database string            `json:"database"`
	SSLMode  string            `json:"sslmode"`
	URL      string            `json:"url"`
	Tables   map[string]string `json:"tables"` // schema.table as asked for, to the name to use in SQL
}

// finish refuses an answer whose login is not the one that the step's token was made for: it would
// be some other step's, or have some other shape's rights.
func (s settings) finish(database string, sp spec, prefix string, answer map[string]any) (broker.Finished, error) {
	username, _ := answer["username"].(string)
	password, _ := answer["password"].(string)
	random, ours := strings.CutPrefix(username, prefix)
	if !ours || len(random) != 8 || !isSegment(random) || strings.ContainsAny(random, "-_") {
		return broker.Finished{}, errors.New("vault's answer has another login than the step's")
	}
	if password == "" {
		return broker.Finished{}, errors.New("vault's answer has no password")
	}
	l := login{Username: username, Password: password, Host: s.host, Port: s.port, Database: database, SSLMode: s.sslmode,
		URL: s.url(database, url.UserPassword(username, password)), Tables: map[string]string{}}
	shape, _ := sp.encode()
	for _, t := range sp.Tables {
		schema := t[0]
		if sp.Filter != nil {
			schema = "pawl_" + shape
		}
		l.Tables[t.String()] = fmt.Sprintf(`"%s"."%s"`, schema, t[1])
	}
	b, err := json.Marshal(l)
	if err != nil {
		return broker.Finished{}, errors.New("vault's answer does not encode")
	}
	f := broker.Finished{Secret: broker.NewSecret(b), Ref: username}
	if len(password) >= drawnPassword {
		f.Digests = []broker.ValueDigest{broker.DigestValue(password), broker.DigestValue(l.URL)}
	}
	return f, nil
}

// url is the connection URL that libpq and pgx read; a socket's directory goes into a parameter.
func (s settings) url(database string, user *url.Userinfo) string {
	query := url.Values{"sslmode": {s.sslmode}}
	u := url.URL{Scheme: "postgresql", User: user, Path: "/" + database}
	if port := strconv.Itoa(s.port); strings.HasPrefix(s.host, "/") {
		query.Set("host", s.host)
		query.Set("port", port)
	} else {
		u.Host = net.JoinHostPort(s.host, port)
	}
	u.RawQuery = query.Encode()
	return u.String()
}
