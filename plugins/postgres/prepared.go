package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// preparedAt returns, by grant id, the statement by which a DBA ends a prepared transaction of the grant's login. The one
// under "" belongs to a group of agents: any of its logins can have made it. If ids is nil, it returns those of all
// grants.
func preparedAt(ctx context.Context, db querier, ids []string) (map[string]string, error) {
	rows, err := db.Query(ctx, "SELECT coalesce(grant_id, ''), hint FROM pawl.prepared($1)", ids)
	if err != nil {
		return nil, err
	}
	hints := map[string]string{}
	var grant, hint string
	_, err = pgx.ForEachRow(rows, []any{&grant, &hint}, func() error { hints[grant] = hint; return nil })
	return hints, err
}

// loan is a prepared transaction. pawl.lend has lent its owner to the revoker.
type loan struct{ database, setRole, statement string }

// rollBackPrepared rolls back the prepared transactions that the logins of the grants own, and those of their groups.
// PostgreSQL lets only the owner do that, in the transaction's own database. So the revoker becomes a member of the
// owner for that time. It rolls back as many as it can. An error never contains the statement: the agent chose the
// identifier in it.
func (s *service) rollBackPrepared(ctx context.Context, ids []string) error {
	var loans []loan
	var pool *pgxpool.Pool
	err := s.do(ctx, func(ctx context.Context, p *pgxpool.Pool) error {
		pool = p
		rows, err := p.Query(ctx, "SELECT database, set_role, statement FROM pawl.lend($1)", ids)
		if err != nil {
			return err
		}
		loans, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (l loan, err error) {
			return l, row.Scan(&l.database, &l.setRole, &l.statement)
		})
		return err
	})
	if err != nil {
		return err
	}
	var failed []error
	for _, l := range loans {
		config := pool.Config().ConnConfig
		s.servers.order(config)
		if err := l.rollBack(ctx, config); err != nil {
			failed = append(failed, err)
		}
	}
	var void any
	return errors.Join(append(failed, s.query(ctx, "SELECT pawl.give_back()::text", nil, &void))...)
}

// rollBackTimeout bounds the rollback of one prepared transaction, so that the others have their turn.
const rollBackTimeout = 2 * time.Second

// rollBack uses a connection of its own. A pooled one would have to get its role back, whatever happens.
func (l loan) rollBack(ctx context.Context, config *pgx.ConnConfig) error {
	ctx, cancel := context.WithTimeout(ctx, rollBackTimeout)
	defer cancel()
	config.Database = l.database
	var conn *pgx.Conn
	err := retryWhileFull(ctx, func(ctx context.Context) (err error) {
		conn, err = pgx.ConnectConfig(ctx, config)
		return err
	})
	if err != nil {
		return fmt.Errorf("connecting to database %q: %w", l.database, err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is left to be done in it
	for _, sql := range []string{"SET synchronous_commit = local", l.setRole, l.statement} {
		if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("rolling back a prepared transaction in database %q: SQLSTATE %s", l.database, stateOf(err))
		}
	}
	return nil
}
