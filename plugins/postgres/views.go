package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// ShapeState is a shape in a database, for the DBA.
type ShapeState struct {
	Shape  string
	Agent  string // that it was made for
	Tables string
	Verbs  string
	Filter string // column of the row filter; empty: none, and no view blocks changes of the tables
	Logins int    // with the shape at present
	Used   time.Time
}

// Shapes returns the shapes of a database, those used last first. The connection is that of the role that ran the
// setup, or one with EXECUTE on pawl.list_shapes.
func Shapes(ctx context.Context, conn *pgx.Conn) ([]ShapeState, error) {
	rows, err := conn.Query(ctx, `SELECT shape, agent, tables, verbs, filter_column, logins, last_used
		FROM pawl.list_shapes()`)
	if err != nil {
		return nil, fmt.Errorf("listing shapes: %w", err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[ShapeState])
	if err != nil {
		return nil, fmt.Errorf("listing shapes: %w", err)
	}
	return all, nil
}

// DropViews drops the views of agents that read a table, and returns for how many shapes. A view blocks changes of the
// table, and comes again with the next step that needs it. A migration calls pawl.drop_views in its own transaction, so
// that no view comes in between. The connection is as for [Shapes].
func DropViews(ctx context.Context, conn *pgx.Conn, name string) (shapes int, err error) {
	t, err := parseTable(name, "public")
	if err != nil {
		return 0, err
	}
	err = conn.QueryRow(ctx, "SELECT pawl.drop_views($1::text::regclass)", t.sql()).Scan(&shapes)
	if err != nil {
		return 0, fmt.Errorf("dropping the views on %s: %w", t, err)
	}
	return shapes, nil
}
