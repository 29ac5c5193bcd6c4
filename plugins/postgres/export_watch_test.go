package postgres

import (
	"context"
	"math"
)

// Position is how far a server has written.
type Position = position

// WhereAfter returns the present position, and whether it continues an earlier one.
func (b *Backend) WhereAfter(ctx context.Context, before Position) (Position, bool, error) {
	return b.watcher.whereAfter(ctx, before)
}

// Ahead returns a position that the server of at has not reached.
func Ahead(at Position) Position {
	at.lsn = math.MaxInt64
	return at
}
