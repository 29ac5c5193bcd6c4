package postgres

import "context"

// Point is a position in the history of a database.
type Point = point

// WhereAfter returns the present position, and whether it continues an earlier one.
func (b *Backend) WhereAfter(ctx context.Context, before Point) (Point, bool, error) {
	return b.watcher.whereAfter(ctx, before)
}

// Ahead returns a position that the server of at has not reached.
func Ahead(at Point) Point {
	at.lsn = "FFFFFFFF/0"
	return at
}
