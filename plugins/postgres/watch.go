package postgres

import (
	"context"
	"time"
)

// watcher notices when the database is not the continuation of what it was: another server, another timeline as after a
// failover, or an earlier position as after a restored snapshot.
type watcher struct {
	revoker  *service
	hosts    *hosts
	replaced chan struct{} // receives a value then, and when the database was first reached
}

// nameAge is how often the watcher opens a new connection by the names in DSN. The broker leaves a server from which
// they lead to its promoted standby: the open connections stay with a server as long as it lives.
const nameAge = 5 * time.Second

// run compares the database with what it was, until ctx ends. It never asks Vault.
func (w watcher) run(ctx context.Context) {
	tick := time.NewTicker(keepOpenEvery)
	defer tick.Stop()
	var at position
	for {
		if pool, _ := w.revoker.current(); pool != nil {
			if _, known := w.hosts.answer("", nameAge); !known {
				w.hosts.start("")
			}
			now, continues, err := w.whereAfter(ctx, at)
			if err == nil && !continues { // an error proves nothing, and the next call that needs the database reports it
				select {
				case w.replaced <- struct{}{}:
				default:
				}
			}
			if err == nil {
				at = now
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// whereAfter returns the present position, and whether it continues an earlier one.
func (w watcher) whereAfter(ctx context.Context, before position) (now position, continues bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, keepOpenTimeout)
	defer cancel()
	now, err = w.revoker.position(ctx)
	return now, now.id == before.id && now.timeline == before.timeline && now.lsn >= before.lsn, err
}
