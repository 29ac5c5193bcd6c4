package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
)

// Sever implements [broker.Severer]. It removes LOGIN and the rights from all logins of the grants in one transaction,
// and then terminates their sessions until none is left. Last it bars the grants, so that a mint in flight makes no
// login. The number of calls to the database does not depend on the number of grants.
//
// A login that resists holds up no other. Its agent can lock it with a transaction of its own, or have sessions that do
// not end. Once there has been no progress for a second, Sever returns an error that names the obstacle. All other
// logins are severed then, and a later call severs the rest. A standby with its replay behind is such an obstacle.
func (b *Backend) Sever(ctx context.Context, grants []broker.Grant) error {
	if len(grants) == 0 {
		return nil
	}
	ids := idsOf(grants)
	cut := b.revoker.startCut(ctx, ids) // the primary may be away, or take its time
	err := b.severPrimary(ctx, ids)
	cut()
	err = errors.Join(err, b.revoker.cutStandbys(ctx, ids))
	if err != nil {
		return fmt.Errorf("severing %d grants in database %q: %w", len(ids), b.database, err)
	}
	return nil
}

func (b *Backend) severPrimary(ctx context.Context, ids []string) error {
	for {
		resists, err := untilQuiet(ctx, stallGrace,
			func(ctx context.Context) (pass, error) { return b.severOnce(ctx, ids) })
		if err != nil {
			return err
		}
		var late int
		if err := b.revoker.query(ctx, "SELECT pawl.bar($1)", []any{ids}, &late); err != nil {
			return fmt.Errorf("barring: %w", err)
		}
		if resists != nil {
			return fmt.Errorf("%w; it is tried again", resists)
		}
		if late == 0 {
			return nil
		}
	}
}

const (
	// startupGrace is how long untilQuiet waits for server processes that are starting up. A process that is still
	// authenticating after that is refused. A session that was accepted just before has no rights left.
	startupGrace = 500 * time.Millisecond
	// stallGrace is how long severing continues without progress. It is longer than startupGrace, so that the
	// sessions of all other logins have been found by then.
	stallGrace = time.Second
)

// pass is the result of one call of pawl.sever, or of pawl.cut.
type pass struct {
	severed, passedOver, sessions, prepared int
	starting                                []int32 // server processes that are starting up
	obstacle                                string  // empty: unknown
}

// severOnce calls pawl.sever, and rolls back the prepared transactions that it counts.
func (b *Backend) severOnce(ctx context.Context, ids []string) (p pass, err error) {
	var obstacle *string
	err = b.revoker.query(ctx, "SELECT severed, passed_over, sessions, prepared, starting, obstacle FROM pawl.sever($1)",
		[]any{ids}, &p.severed, &p.passedOver, &p.sessions, &p.prepared, &p.starting, &obstacle)
	if obstacle != nil {
		p.obstacle = *obstacle
	}
	if err == nil && p.prepared > 0 {
		if err := b.revoker.rollBackPrepared(ctx, ids); err != nil {
			p.obstacle = fmt.Sprintf("%s (%v)", p.obstacle, err)
		}
	}
	return p, err
}

// untilQuiet calls once until a pass finds nothing left, or until there was no progress for the given time. It also
// waits for the server processes that were starting up at the first such pass. Each of them ends, or becomes a session
// that a later pass counts. resists says why some logins are not severed.
func untilQuiet(
	ctx context.Context, patience time.Duration, once func(context.Context) (pass, error),
) (resists, err error) {
	var quiet bool           // a pass found nothing left
	var waited time.Duration // since that pass
	var before []int32       // the processes that were starting up at that pass and still are
	progress := time.Now()   // when the number left was last smaller than ever before
	least := math.MaxInt     // that number
	obstacle := "another transaction is ending them, or their sessions do not end"
	retry := backoff.Exponential{First: time.Millisecond, Most: 100 * time.Millisecond}
	for {
		pause := retry.Next()
		p, err := once(ctx)
		if err != nil {
			return nil, err
		}
		obstacle = cmp.Or(p.obstacle, obstacle)
		if p.severed > 0 { // the next pass terminates their sessions; the wait for starting processes begins anew
			quiet, waited, progress = false, 0, time.Now()
			continue
		}
		if !quiet {
			before = p.starting
		}
		before = slices.DeleteFunc(before, func(pid int32) bool { return !slices.Contains(p.starting, pid) })
		left := p.passedOver + p.sessions + p.prepared
		if left == 0 {
			quiet = true
			if len(before) == 0 || waited > startupGrace {
				return nil, nil
			}
			waited += pause
		}
		if left < least {
			least, progress = left, time.Now()
		}
		if left > 0 && time.Since(progress) > patience {
			return fmt.Errorf("%d logins, %d sessions and %d prepared transactions resist: %s",
				p.passedOver, p.sessions, p.prepared, obstacle), nil
		}
		if err := backoff.Sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
}

// Remove implements [broker.Remover]. It drops the logins of the grants and the objects that they own in this database.
// A login that owns objects in another database remains, without LOGIN and without rights.
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

// loginState is the state of one login in the database.
type loginState struct {
	grant             string
	canLogin, inGroup bool
	validUntil        *time.Time
	sessions          int
}

// primary is the state of some grants at the primary, read over one connection.
type primary struct {
	found    []loginState
	prepared map[string]string // see preparedAt
	recorded map[string]bool   // names of the logins that it made since it was last promoted
	final    map[string]bool   // the grants that can get no other login than they had
	at       position          // after everything else
}

// inspect reads the state at the primary of the grants and of the named logins. If ids is nil, it reads all grants.
func (b *Backend) inspect(ctx context.Context, ids, names []string) (p primary, err error) {
	err = b.revoker.onPrimary(ctx, func(ctx context.Context, conn *pgxpool.Conn) (err error) {
		if p.found, err = inspectAt(ctx, conn, ids); err != nil {
			return err
		}
		// After the sessions, since a session can prepare a transaction and end.
		if p.prepared, err = preparedAt(ctx, conn, ids); err != nil {
			return err
		}
		if p.recorded, err = setAt(ctx, conn, "SELECT * FROM pawl.recorded($1)", names); err != nil {
			return err
		}
		if p.final, err = setAt(ctx, conn, "SELECT * FROM pawl.known($1)", ids); err != nil {
			return err
		}
		p.at, err = positionAt(ctx, conn)
		return err
	})
	return p, err
}

func inspectAt(ctx context.Context, db querier, ids []string) ([]loginState, error) {
	rows, err := db.Query(ctx, `SELECT grant_id, can_login, in_group,
		nullif(valid_until, 'infinity'), sessions FROM pawl.inspect($1)`, ids)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (l loginState, err error) {
		return l, row.Scan(&l.grant, &l.canLogin, &l.inGroup, &l.validUntil, &l.sessions)
	})
}

// noRecord is the answer about a login that lived at another server, and may live there still.
const noRecord = "this server has no record of the login since its last promotion: it was made elsewhere, or before a " +
	"failover, or ended more than a week ago; when the server before this one has stopped for good, a DBA runs " +
	"SELECT pawl.adopt_logins()"

// evidenceCheck names the source of this backend's evidence.
const evidenceCheck = "postgres: pg_roles, pg_stat_activity and pg_prepared_xact"

// Prove implements [broker.Prover]. It checks every login with a grant's id in its name, and sessions and prepared
// transactions that outlived their login. A grant is dead if none of its logins can log in or has rights, no session is
// open, and no prepared transaction is left. An issued grant is dead only if this server made its login since it was
// last promoted: the tool or the backend may point at another server than before. It must be dead at every standby, too,
// and the standby must have replayed its end. It is dead
// for good, whatever Vault does with its lease, once it can get no other login.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	var names []string
	for _, g := range grants {
		if g.Lease.Ref != "" {
			names = append(names, g.Lease.Ref)
		}
	}
	p, err := b.inspect(ctx, idsOf(grants), names)
	if pooler := (*poolerError)(nil); errors.As(err, &pooler) {
		return unproven(grants, b.cfg.Now(), pooler), nil
	}
	if err != nil {
		return nil, fmt.Errorf("inspecting %d grants in database %q: %w", len(grants), b.database, err)
	}
	now := b.cfg.Now()
	of := map[string][]loginState{}
	for _, l := range p.found {
		of[l.grant] = append(of[l.grant], l)
	}
	evidence := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		evidence[i] = broker.Evidence{At: now, Check: evidenceCheck}
		evidence[i].Outcome, evidence[i].Answer = outcomeOf(of[string(g.ID)], now)
		if evidence[i].Outcome == broker.OutcomeDead && g.Lease.Ref != "" && !p.recorded[g.Lease.Ref] {
			evidence[i].Outcome, evidence[i].Answer = broker.OutcomeUnknown, noRecord
		}
	}
	b.proveAtStandbys(ctx, grants, evidence, p)
	for i, g := range grants {
		for _, owner := range []string{string(g.ID), ""} {
			if hint := p.prepared[owner]; hint != "" && evidence[i].Outcome != broker.OutcomeAlive {
				evidence[i].Outcome, evidence[i].Answer = broker.OutcomeAlive, "a prepared transaction is left; "+hint
			}
		}
	}
	b.hosts.doubt(ctx, grants, evidence, p.at.identity)
	for i, g := range grants {
		// A renewed lease moves VALID UNTIL at the most, which counts for nothing, and no other login can be made.
		evidence[i].Final = evidence[i].Outcome == broker.OutcomeDead && p.final[string(g.ID)]
	}
	return evidence, nil
}

// unproven is the evidence about grants whose server cannot be asked directly.
func unproven(grants []broker.Grant, now time.Time, why error) []broker.Evidence {
	evidence := make([]broker.Evidence, len(grants))
	for i := range evidence {
		evidence[i] = broker.Evidence{At: now, Check: evidenceCheck, Outcome: broker.OutcomeUnknown, Answer: why.Error()}
	}
	return evidence
}

// proveAtStandbys changes the evidence of the primary where a standby shows worse.
func (b *Backend) proveAtStandbys(ctx context.Context, grants []broker.Grant, evidence []broker.Evidence, p primary) {
	if len(b.revoker.standbys) == 0 {
		return
	}
	ends := b.endsOf(grants, evidence, p.final, p.at.lsn)
	standbys := b.inspectStandbys(ctx, idsOf(grants), slices.Max(ends), p.at)
	for i, g := range grants {
		for _, there := range standbys {
			outcome, answer := there.outcome(string(g.ID), ends[i], evidence[i].At)
			if worse(outcome, evidence[i].Outcome) {
				evidence[i].Outcome, evidence[i].Answer = outcome, answer
			}
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, g := range grants {
		if evidence[i].Outcome == broker.OutcomeDead {
			delete(b.ends, g.ID)
		}
	}
}

// endsOf returns the position that a standby must have replayed before its answer about each grant counts. That is
// the present one when the primary first shows the grant dead: a standby that is always behind would never reach the
// present one of each check. A grant that can still get a login has no such position.
func (b *Backend) endsOf(
	grants []broker.Grant, evidence []broker.Evidence, final map[string]bool, at int64,
) []int64 {
	ends := make([]int64, len(grants))
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.ends)+len(grants) > maxEnds {
		clear(b.ends)
	}
	for i, g := range grants {
		switch {
		case evidence[i].Outcome != broker.OutcomeDead:
			delete(b.ends, g.ID)
			continue
		case !final[string(g.ID)]:
			ends[i] = at
			continue
		}
		end, known := b.ends[g.ID]
		if !known || end > at {
			end = at
			b.ends[g.ID] = end
		}
		ends[i] = end
	}
	return ends
}

// maxEnds bounds the memory for positions.
const maxEnds = 200_000

// atStandby is what one standby shows, or why it shows nothing.
type atStandby struct {
	name  string
	lsn   int64
	found map[string][]loginState
	err   error
}

func (a atStandby) outcome(grant string, end int64, now time.Time) (outcome broker.Outcome, answer string) {
	if a.err == nil {
		outcome, answer = outcomeOf(a.found[grant], now)
	}
	switch {
	case a.err != nil:
		outcome, answer = broker.OutcomeUnknown, a.err.Error()
	case outcome == broker.OutcomeDead && a.lsn < end:
		outcome, answer = broker.OutcomeUnknown, errBehind.Error()
	}
	return outcome, fmt.Sprintf("standby %s: %s", a.name, answer)
}

// worse reports whether a is further from dead than b.
func worse(a, b broker.Outcome) bool {
	return a == broker.OutcomeAlive && b != broker.OutcomeAlive || a == broker.OutcomeUnknown && b == broker.OutcomeDead
}

// inspectStandbys inspects all standbys. It waits a little for each to replay up to a position of the primary.
func (b *Backend) inspectStandbys(ctx context.Context, ids []string, until int64, at position) []atStandby {
	all := make([]atStandby, len(b.revoker.standbys))
	var g errgroup.Group
	for i, st := range b.revoker.standbys {
		g.Go(func() error {
			seen, err := b.revoker.inspectStandby(ctx, i, ids, until, at)
			if err != nil && !unfit(err) {
				err = errors.New("it does not answer; " + cmp.Or(stateOf(err), "no connection"))
			}
			all[i] = atStandby{name: nameOf(st.address), lsn: seen.lsn, found: map[string][]loginState{}, err: err}
			for _, l := range seen.found {
				all[i].found[l.grant] = append(all[i].found[l.grant], l)
			}
			return nil
		})
	}
	_ = g.Wait() // nil: the errors are in all
	return all
}

// outcomeOf returns the worst outcome of a grant's logins. VALID UNTIL alone proves nothing: PostgreSQL does not check
// it for every authentication method.
func outcomeOf(logins []loginState, now time.Time) (broker.Outcome, string) {
	if len(logins) == 0 {
		return broker.OutcomeDead, "no role, no session"
	}
	outcome, answer := broker.OutcomeDead, "the role cannot log in, has no rights and no session"
	for _, l := range logins {
		switch {
		case l.sessions > 0:
			return broker.OutcomeAlive, fmt.Sprintf("%d sessions are open", l.sessions)
		case l.canLogin && l.validUntil != nil && now.After(*l.validUntil):
			outcome, answer = broker.OutcomeUnknown, "VALID UNTIL has passed but the role still has LOGIN"
		case l.canLogin:
			return broker.OutcomeAlive, "the role can log in"
		case l.inGroup:
			outcome, answer = broker.OutcomeUnknown, "the role cannot log in but still has rights"
		}
	}
	return outcome, answer
}

// Find implements [broker.Finder]. It returns the grants of all logins that are not dead.
func (b *Backend) Find(ctx context.Context) ([]broker.GrantID, error) {
	p, err := b.inspect(ctx, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("listing the logins of database %q: %w", b.database, err)
	}
	seen := map[string]bool{}
	for _, l := range p.found {
		seen[l.grant] = seen[l.grant] || l.canLogin || l.inGroup || l.sessions > 0
	}
	for grant := range p.prepared {
		seen[grant] = grant != "" // a group's has no grant
	}
	for _, there := range b.inspectStandbys(ctx, nil, 0, p.at) {
		if there.err != nil {
			b.cfg.Log.Warn("listing the logins of a standby failed", "standby", there.name, "err", there.err)
		}
		for grant, logins := range there.found { // only sessions: its logins are those of the primary, a moment ago
			seen[grant] = seen[grant] || slices.ContainsFunc(logins, func(l loginState) bool { return l.sessions > 0 })
		}
	}
	var ids []broker.GrantID
	for grant, alive := range seen {
		if alive {
			ids = append(ids, broker.GrantID(grant))
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// collectFor bounds one collection: the credentials are renewed by the same goroutine.
const collectFor = 20 * time.Second

// collect removes logins that expired ten minutes ago and that Vault failed to end. It also removes shapes without
// members that were unused for the given time, which must be at least an hour. A login that owns more objects than one
// transaction can drop takes many calls.
func (b *Backend) collect(ctx context.Context, unused time.Duration) error {
	var logins, shapes int
	for start, more := b.cfg.Now(), true; more && b.cfg.Now().Sub(start) < collectFor; {
		var l, s int
		err := b.revoker.query(ctx, "SELECT logins, shapes, more FROM pawl.collect($1)", []any{unused}, &l, &s, &more)
		if err != nil {
			return fmt.Errorf("collecting in database %q: %w", b.database, err)
		}
		logins, shapes = logins+l, shapes+s
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
