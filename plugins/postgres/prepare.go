package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// Limits of the cache of known shapes, which spares most steps a call to the database. The database keeps an unused
// shape for at least an hour, so a cached shape still exists.
const (
	shapeCacheTTL   = 5 * time.Minute
	maxCachedShapes = 10000
)

// prepareTimeout bounds the making of a shape. The database itself waits at most a second for each lock.
const prepareTimeout = 5 * time.Second

// Prepare turns the arguments into a shape and makes the shape in the database unless it exists. An argument that the
// tool or the database does not allow is Denied. A database that does not respond is Unavailable.
func (b *Backend) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	s, err := b.parseTool(t)
	if err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Internal, "prepare",
			"the tool no longer loads").Because(err)
	}
	if _, err := broker.ParseGrantID(string(g.ID)); err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Internal, "prepare", "malformed grant id").Because(err)
	}
	sp, err := s.narrow(b.database, g.Args)
	if err != nil {
		return broker.Mint{}, "", err
	}
	if err := b.hosts.prepare(ctx, t.Name, s.own); err != nil {
		return broker.Mint{}, "", err
	}
	shape, text := sp.encode()
	if sp.Filter != nil { // a DBA may have dropped its views
		b.forget(shape)
	}
	if err := b.ensureShape(ctx, shape, text, g.Caller.String()); err != nil {
		return broker.Mint{}, "", err
	}
	display := string(g.ID) + "-" + shape
	m := broker.Mint{Path: mintPath(t), Leased: true, TTL: leaseTTL(t.TTL)}
	m.Finish = func(response map[string]any, _ time.Time) (broker.Finished, error) {
		f, err := s.finish(b.database, sp, "pawl-"+display+"-", response)
		f.Outlives = b.cfg.Now().Add(leaseTTL(t.TTL) + validUntilMargin)
		return f, err
	}
	return m, display, nil
}

// validUntilMargin bounds how long after the lease's expiry Vault sets VALID UNTIL (measured).
const validUntilMargin = 5 * time.Second

// leaseTTL returns the TTL that the tool's Vault role must have. Vault's database engine has no shorter TTL for a
// shorter step: the expiry of that step's token ends the lease.
func leaseTTL(tool time.Duration) time.Duration {
	if tool <= 0 {
		return broker.DefaultTTL
	}
	return min(tool, broker.MaxTTL)
}

// narrow builds the specification from the arguments. For a missing argument it takes the whole of the setting.
func (s settings) narrow(database string, args args.Args) (spec, error) {
	sp := spec{Connections: s.connections, Database: database, Tables: s.tables, Verbs: s.verbs,
		StatementMS: s.statement.Milliseconds(), IdleMS: s.idle.Milliseconds(), Network: s.network}
	if v, given := args.Get(argTables); given || len(s.tables) == 0 {
		names, _ := v.Strings()
		tables, err := parseTables(names, s.schema)
		if err != nil {
			return spec{}, argumentOutside(argTables, err.Error())
		}
		if len(s.tables) > 0 && !subset(tables, s.tables) {
			return spec{}, argumentOutside(argTables, "a table is not one of the tool's")
		}
		sp.Tables = tables
	}
	if v, given := args.Get(argVerbs); given {
		names, _ := v.Strings()
		verbs, err := parseVerbs(names)
		if err != nil {
			return spec{}, argumentOutside(argVerbs, err.Error())
		}
		if !subset(verbs, s.verbs) {
			return spec{}, argumentOutside(argVerbs, "a verb is not one of the tool's")
		}
		sp.Verbs = verbs
	}
	if err := s.applyFilter(&sp, args); err != nil {
		return spec{}, err
	}
	return sp, nil
}

func (s settings) applyFilter(sp *spec, args args.Args) error {
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
		return argumentOutside(argFilterValue, "a filter needs a column and a value")
	}
	f, err := parseFilter(column, value)
	if err != nil {
		return argumentOutside(argFilterValue, err.Error())
	}
	names := map[string]bool{}
	for _, t := range sp.Tables {
		if names[t[1]] {
			return argumentOutside(argTables, "with a filter, two tables must not have the same name")
		}
		names[t[1]] = true
	}
	sp.Filter = f
	return nil
}

func argumentOutside(argument, why string) *broker.Error {
	return broker.Errorf(broker.Denied, "prepare", "argument %q: %s", argument, why).
		With(broker.CodeArgumentOutside).Lacks("", "argument:"+argument)
}

func (b *Backend) forget(shape string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.shapes, shape)
}

// ensureShape makes the shape in the database unless the cache says that it exists.
func (b *Backend) ensureShape(ctx context.Context, shape, text, agent string) error {
	now := b.cfg.Now()
	b.mu.Lock()
	seen, known := b.shapes[shape]
	b.mu.Unlock()
	if known && now.Sub(seen) < shapeCacheTTL {
		return nil
	}
	var void any
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	err := b.shaper.query(ctx, "SELECT pawl.ensure_shape($1, $2, $3)::text", []any{shape, text, agent}, &void)
	switch {
	case err == nil:
	case classify(err) == badRequest:
		return argumentOutside(argTables, "the database grants agents no such table, verb or filter, "+
			"or its pg_hba.conf does not confine the tool's network").Because(err)
	case classify(err) == unusable:
		return argumentOutside(argTables, messageOf(err)).Because(err)
	case classify(err) == overLimit:
		return broker.Errorf(broker.Denied, "prepare", "%s; the ones that are idle for 15 minutes make room for others",
			messageOf(err)).With(broker.CodeTooFast).Because(err).After(time.Minute)
	case errors.As(err, new(*poolerError)):
		return broker.Errorf(broker.Unavailable, "prepare",
			"the broker reaches database %q only through a pooler; nothing was made", b.database).
			With(broker.CodeBackendDown).Because(err).After(time.Minute)
	default:
		return broker.Errorf(broker.Unavailable, "prepare",
			"database %q cannot be prepared; nothing was made", b.database).
			With(broker.CodeBackendDown).Because(err).After(time.Second)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.shapes) >= maxCachedShapes {
		clear(b.shapes)
	}
	b.shapes[shape] = now
	return nil
}

// minDigestPassword is the length from which the backend returns the digest of a password. Vault's own passwords have
// this length, from 63 characters, which makes about 119 bits. A password policy of the mount may make shorter ones.
const minDigestPassword = 20

// login is the secret that the agent gets.
type login struct {
	Username string            `json:"username"`
	Password string            `json:"password"`
	Host     string            `json:"host"`
	Port     int               `json:"port"`
	Database string            `json:"database"`
	SSLMode  string            `json:"sslmode"`
	URL      string            `json:"url"`
	Tables   map[string]string `json:"tables"` // from the requested schema.table to the name to use in SQL
}

// finish turns Vault's response into the secret. It refuses a login that does not begin with the prefix: that login
// would belong to another step or have the rights of another shape.
func (s settings) finish(database string, sp spec, prefix string, response map[string]any) (broker.Finished, error) {
	username, _ := response["username"].(string)
	password, _ := response["password"].(string)
	random, ours := strings.CutPrefix(username, prefix)
	if !ours || len(random) != 8 || !isAlphanumeric(random) {
		return broker.Finished{}, errors.New("vault's response contains another step's login")
	}
	if password == "" {
		return broker.Finished{}, errors.New("vault's response contains no password")
	}
	reach := []server{{s.host, uint16(s.port)}}
	if s.follow != nil {
		reach = s.follow.inOrder()
	}
	l := login{Username: username, Password: password, Host: reach[0].host, Port: int(reach[0].port),
		Database: database, SSLMode: s.sslmode,
		URL: urlOf(reach, s.sslmode, database, url.UserPassword(username, password)), Tables: map[string]string{}}
	shape, _ := sp.encode()
	for _, t := range sp.Tables {
		use := t
		if sp.Filter != nil {
			use[0] = "pawl_" + shape
		}
		l.Tables[t.String()] = use.sql()
	}
	b, err := json.Marshal(l)
	if err != nil {
		return broker.Finished{}, errors.New("encoding the secret")
	}
	f := broker.Finished{Secret: broker.NewSecret(b), Ref: username}
	if len(password) >= minDigestPassword {
		f.Digests = []broker.ValueDigest{broker.DigestValue(password), broker.DigestValue(l.URL)}
	}
	return f, nil
}

func isAlphanumeric(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9')
	})
}

// urlOf returns the connection URL for libpq and pgx. The directory of a Unix socket goes into a parameter, and so do
// several IPv6 addresses, since net/url does not parse them.
func urlOf(reach []server, sslmode, database string, user *url.Userinfo) string {
	query := url.Values{"sslmode": {sslmode}}
	u := url.URL{Scheme: "postgresql", User: user, Path: "/" + database, RawPath: "/" + url.PathEscape(database)}
	var names, hosts, ports []string
	for _, one := range reach {
		names = append(names, one.String())
		hosts, ports = append(hosts, one.host), append(ports, strconv.Itoa(int(one.port)))
	}
	all := strings.Join(hosts, ",")
	if strings.HasPrefix(all, "/") || len(hosts) > 1 && strings.Contains(all, ":") {
		query.Set("host", all)
		query.Set("port", strings.Join(ports, ","))
	} else {
		u.Host = strings.Join(names, ",")
	}
	if len(hosts) > 1 {
		query.Set("target_session_attrs", "read-write") // the primary
	}
	u.RawQuery = query.Encode()
	return u.String()
}
