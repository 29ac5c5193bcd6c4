package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// trialTimeout bounds each statement of a trial.
const trialTimeout = 5 * time.Second

// Try uses the secret of a step as an agent does. It logs in with the secret's URL and compares the user, the server
// and the rights with those of the step. ended reports an error if the session or the secret still works. Call it once,
// after the secret was called dead; it is never nil. No error contains anything of the secret.
func (b *Backend) Try(ctx context.Context, t broker.Tool, a args.Args, secret []byte) (
	ended func(context.Context) error, err error,
) {
	ended = func(context.Context) error { return nil }
	s, err := b.parseTool(t)
	if err != nil {
		return ended, err
	}
	sp, err := s.narrow(b.database, a)
	if err != nil {
		return ended, err
	}
	var l login
	if err := json.Unmarshal(secret, &l); err != nil {
		return ended, errors.New("the secret is not JSON")
	}
	config, err := b.agentConfig(l)
	if err != nil {
		return ended, err
	}
	open, cancel := context.WithTimeout(ctx, trialTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(open, config)
	if err != nil {
		return ended, fmt.Errorf("logging in with the secret at %s, as an agent would: %s", l.Host, reasonOf(err))
	}
	at := trial{conn: conn, config: config, user: l.Username}
	return at.ended, b.compare(ctx, at, sp, l.Tables)
}

// agentConfig is the connection that a secret's URL describes. A certificate is checked by the authorities of DSN.
func (b *Backend) agentConfig(l login) (*pgx.ConnConfig, error) {
	config, err := pgx.ParseConfig(l.URL)
	if err != nil {
		return nil, errors.New("the secret's URL does not parse")
	}
	if ours := b.address.ConnConfig.TLSConfig; ours != nil {
		if config.TLSConfig != nil {
			config.TLSConfig.RootCAs = ours.RootCAs
		}
		for _, f := range config.Fallbacks {
			if f.TLSConfig != nil {
				f.TLSConfig.RootCAs = ours.RootCAs
			}
		}
	}
	return config, nil
}

// reasonOf describes an error of a connection without its text, which can quote a URL.
func reasonOf(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return fmt.Sprintf("SQLSTATE %s", pg.Code)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer"
	}
	return "the connection failed"
}

// compare compares what the session reached with the step.
func (b *Backend) compare(ctx context.Context, at trial, sp spec, names map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, 4*trialTimeout)
	defer cancel()
	if err := at.checkUser(ctx); err != nil {
		return err
	}
	found, err := identityOf(ctx, at.conn)
	if err != nil {
		return fmt.Errorf("asking the server that the secret reaches: %s", reasonOf(err))
	}
	known, err := b.identities(ctx)
	switch {
	case err != nil:
		return err
	case !known.has(found) && known.away != nil:
		return known.away
	case !known.has(found):
		return fmt.Errorf("the secret reaches another server than that of dsn and the standbys (standby: %v)", found.standby)
	}
	return at.checkRights(ctx, sp, names)
}

// trial is a session with the secret of a step.
type trial struct {
	conn   *pgx.Conn
	config *pgx.ConnConfig
	user   string
}

func (t trial) checkUser(ctx context.Context) error {
	var session, current string
	err := t.conn.QueryRow(ctx, "SELECT session_user::text, current_user::text").Scan(&session, &current)
	switch {
	case err != nil:
		return fmt.Errorf("asking who the session is: %s", reasonOf(err))
	case session != t.user || current != t.user:
		return fmt.Errorf("the session is %s (session_user %s) and not the secret's login: a pooler logs in as a fixed "+
			"user, so a step has that user's rights, and no revocation ends them", current, session)
	}
	return nil
}

// rightsQuery lists what the session may do with tables and PUBLIC may not.
const rightsQuery = `SELECT n.nspname, c.relname, lower(v)
	FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) v
	WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
		AND n.nspname !~ '^pg_(toast|temp)' AND has_schema_privilege(n.oid, 'USAGE')
		AND (has_table_privilege(c.oid, v) AND NOT has_table_privilege('public', c.oid, v)
			OR v <> 'DELETE' AND has_any_column_privilege(c.oid, v) AND NOT has_any_column_privilege('public', c.oid, v))
	ORDER BY 1, 2, 3`

// beyondQuery names a table of the database that the session may not read.
const beyondQuery = `SELECT n.nspname, c.relname
	FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
	WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
		AND n.nspname !~ '^pg_(toast|temp)' AND NOT has_any_column_privilege(c.oid, 'SELECT')
	ORDER BY n.nspname = 'pawl', 1, 2 LIMIT 1`

// checkRights compares the rights with the step's, reads the step's tables, and tries to read another one.
func (t trial) checkRights(ctx context.Context, sp spec, names map[string]string) error {
	rows, err := t.conn.Query(ctx, rightsQuery)
	if err != nil {
		return fmt.Errorf("listing the session's rights: %s", reasonOf(err))
	}
	shape, _ := sp.encode()
	var beyond []string
	var at table
	var verb string
	_, err = pgx.ForEachRow(rows, []any{&at[0], &at[1], &verb}, func() error {
		if !slices.ContainsFunc(sp.Tables, func(t table) bool {
			if sp.Filter != nil {
				t[0] = "pawl_" + shape
			}
			return t == at
		}) || !slices.Contains(sp.Verbs, verb) {
			beyond = append(beyond, verb+" on "+at.String())
		}
		return nil
	})
	switch {
	case err != nil:
		return fmt.Errorf("listing the session's rights: %s", reasonOf(err))
	case len(beyond) > 0:
		return fmt.Errorf("the session has %d rights beyond the step's, such as %s", len(beyond), beyond[0])
	}
	for name, use := range names {
		if !slices.Contains(sp.Verbs, "select") {
			break
		}
		if _, err := t.conn.Exec(ctx, "SELECT FROM "+use+" LIMIT 0"); err != nil {
			return fmt.Errorf("reading %s, which the step may: %s", name, reasonOf(err))
		}
	}
	err = t.conn.QueryRow(ctx, beyondQuery).Scan(&at[0], &at[1])
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for a table beyond the step's: %s", reasonOf(err))
	}
	if _, err := t.conn.Exec(ctx, "SELECT FROM "+at.sql()+" LIMIT 0"); stateOf(err) != "42501" {
		return fmt.Errorf("reading %s, which is beyond the step's rights, was not refused", at)
	}
	return nil
}

// ended is the function that [Backend.Try] returns.
func (t trial) ended(ctx context.Context) error {
	defer t.conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // the server has closed it by now
	ctx, cancel := context.WithTimeout(ctx, 2*trialTimeout)
	defer cancel()
	if _, err := t.conn.Exec(ctx, "SELECT"); err == nil {
		return errors.New("the session that was opened with the secret still works")
	}
	again, err := pgx.ConnectConfig(ctx, t.config)
	if err == nil {
		_ = again.Close(ctx)
		return errors.New("the secret still logs in")
	}
	return nil
}
