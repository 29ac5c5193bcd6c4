package closing

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine/internal/records"
)

// End records that grants end, and why, and has them ended now. It returns those that had not ended before.
func (r *Reaper) End(ctx context.Context, op string, why broker.Ending, detail string, ids ...broker.GrantID,
) (ended []broker.Grant, err error) {
	if len(ids) == 0 {
		return nil, nil
	}
	err = r.cfg.Update(ctx, op, func(tx *records.Tx) error {
		ended = nil
		for _, id := range ids {
			g, ok, err := tx.Grant(id)
			if err != nil {
				return err
			}
			if !ok || g.State != broker.StateIssued || g.Ending != "" {
				continue
			}
			g.Ending = why
			if err := tx.PutGrant(g); err != nil {
				return err
			}
			entry := records.GrantEntry(&g, broker.OpEnd, r.cfg.Now())
			entry.Detail = string(why) + ": " + detail
			if _, err := tx.Enter(entry); err != nil {
				return err
			}
			ended = append(ended, g)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	r.EndNow(ended...)
	return ended, nil
}

// AwaitClosed waits as ctx allows until grants are closed, and sets the State of those that are.
func (r *Reaper) AwaitClosed(ctx context.Context, op string, grants []broker.Grant) {
	for i := range grants {
		g := &grants[i]
		closed, cancel := r.Closed(g.ID)
		// A read that fails leaves the grant as it was.
		_ = r.cfg.View(context.WithoutCancel(ctx), op, func(tx *records.Tx) error {
			now, _, err := tx.Grant(g.ID)
			if err == nil {
				g.State = now.State
			}
			return err
		})
		if g.State != broker.StateClosed {
			select {
			case <-closed:
				g.State = broker.StateClosed
			case <-ctx.Done():
			}
		}
		cancel()
	}
}
