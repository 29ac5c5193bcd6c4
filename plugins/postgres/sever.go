package postgres

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
)

// Sever takes login and rights from all logins of the grants in one transaction, and in the next ends
// their sessions; it returns once no session is left. Then it bars the grants, so that a mint that is still
// on its way makes nothing. The number of calls to the database does not depend on the number
// of grants. A session that does not end holds it up until ctx ends.
func (b *Backend) Sever(ctx context.Context, grants []broker.Grant) error {
	if len(grants) == 0 {
		return nil
	}
	ids := idsOf(grants)
	for {
		if err := b.cut(ctx, ids); err != nil {
			return fmt.Errorf("severing %d grants in database %q: %w", len(ids), b.database, err)
		}
		var late int
		if err := b.revoker.query(ctx, "SELECT pawl.bar($1)", []any{ids}, &late); err != nil {
			return fmt.Errorf("barring %d grants in database %q: %w", len(ids), b.database, err)
		}
		if late == 0 {
			return nil
		}
	}
}

// startup is how long cut waits for a process that is starting up. The login is refused to whoever is
// still being authenticated after that, and a session that was let in just before has no rights left.
const startup = 500 * time.Millisecond

// cut repeats until a whole pass finds nothing, and whatever was starting up at the first such pass
// has either become a session, which a pass saw, or gone.
func (b *Backend) cut(ctx context.Context, ids []string) error {
	var quiet bool           // whether there was such a pass
	var waited time.Duration // since then
	var before []int32       // the processes that were starting up then and are still
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		var severed, passedOver, sessions int
		var starting []int32
		err := b.revoker.query(ctx, "SELECT severed, passed_over, sessions, starting FROM pawl.sever($1)", []any{ids},
			&severed, &passedOver, &sessions, &starting)
		if err != nil {
			return err
		}
		if severed > 0 { // their sessions are next, and what was starting up when that was committed
			quiet, waited = false, 0
			continue
		}
		if !quiet {
			before = starting
		}
		before = slices.DeleteFunc(before, func(pid int32) bool { return !slices.Contains(starting, pid) })
		if passedOver == 0 && sessions == 0 {
			quiet = true
			if len(before) == 0 || waited > startup {
				return nil
			}
			waited += pause
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
	}
}

// Remove drops the logins of the grants, with all they own in this database. One that owns something in
// another database stays, without login or rights.
func (b *Backend) Remove(ctx context.Context, grants []broker.GrantID) error {
	ids := make([]string, len(grants))
	for i, g := range grants {
		ids[i] = string(g)
	}
	var dropped int
	if err := b.revoker.query(ctx, "SELECT pawl.remove($1)", []any{ids}, &dropped); err != nil {
		return fmt.Errorf("removing logins from database %q: %w", b.database, err)
	}
	return nil
}

// left is what the database still has of one login.
type left struct {
	grant             string
	canLogin, inGroup bool
	validUntil        *time.Time
	sessions          int
}

func (b *Backend) inspect(ctx context.Context, ids []string) ([]left, error) {
	var found []left
	err := b.revoker.do(ctx, func(pool *pgxpool.Pool) error {
		rows, err := pool.Query(ctx, `SELECT grant_id, can_login, in_group,
			nullif(valid_until, 'infinity'), sessions FROM pawl.inspect($1)`, ids)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (l left, err error) {
			return l, row.Scan(&l.grant, &l.canLogin, &l.inGroup, &l.validUntil, &l.sessions)
		})
		return err
	})
	return found, err
}

// evidenceCheck is what the evidence of this backend rests on.
const evidenceCheck = "postgres: pg_roles and pg_stat_activity"

// Prove looks at every login whose name carries a grant's id, and at sessions that outlived their
// login. Dead is a grant for which none can log in, none has rights, and no session is open.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	found, err := b.inspect(ctx, idsOf(grants))
	if err != nil {
		return nil, fmt.Errorf("inspecting %d grants in database %q: %w", len(grants), b.database, err)
	}
	now := b.cfg.Now()
	of := map[string][]left{}
	for _, l := range found {
		of[l.grant] = append(of[l.grant], l)
	}
	evidence := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		evidence[i] = broker.Evidence{At: now, Check: evidenceCheck}
		evidence[i].Outcome, evidence[i].Answer = judge(of[string(g.ID)], now)
	}
	return evidence, nil
}

// judge gives the worst that is true of any login. VALID UNTIL alone proves nothing: it is not looked
// at for every way to log in.
func judge(logins []left, now time.Time) (broker.Outcome, string) {
	if len(logins) == 0 {
		return broker.OutcomeDead, "no role, no session"
	}
	outcome, answer := broker.OutcomeDead, "the role cannot log in, has no rights and no session"
	for _, l := range logins {
		switch {
		case l.sessions > 0:
			return broker.OutcomeAlive, fmt.Sprintf("%d sessions are open", l.sessions)
		case l.canLogin && l.validUntil != nil && now.After(*l.validUntil):
			outcome, answer = broker.OutcomeUnknown, "the role is past its end but was not ended"
		case l.canLogin:
			return broker.OutcomeAlive, "the role can log in"
		case l.inGroup:
			outcome, answer = broker.OutcomeUnknown, "the role cannot log in but still has rights"
		}
	}
	return outcome, answer
}

// Find gives the grants of all logins that are not dead.
func (b *Backend) Find(ctx context.Context) ([]broker.GrantID, error) {
	found, err := b.inspect(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("listing the logins of database %q: %w", b.database, err)
	}
	var ids []broker.GrantID
	seen := map[string]bool{}
	for _, l := range found {
		if (l.canLogin || l.inGroup || l.sessions > 0) && !seen[l.grant] {
			seen[l.grant] = true
			ids = append(ids, broker.GrantID(l.grant))
		}
	}
	return ids, nil
}

// collect clears away logins ten minutes past their end, which Vault failed to end, and shapes without
// members that were not used for the given time, an hour at least.
func (b *Backend) collect(ctx context.Context, unused time.Duration) error {
	var logins, shapes, records int
	err := b.revoker.query(ctx, "SELECT logins, shapes, records FROM pawl.collect($1)", []any{unused}, &logins, &shapes, &records)
	if err != nil {
		return fmt.Errorf("collecting in database %q: %w", b.database, err)
	}
	if logins+shapes > 0 {
		b.cfg.Log.Info("collected", "database", b.database, "logins", logins, "shapes", shapes)
	}
	return nil
}

func idsOf(grants []broker.Grant) []string {
	ids := make([]string, len(grants))
	for i, g := range grants {
		ids[i] = string(g.ID)
	}
	return ids
}
