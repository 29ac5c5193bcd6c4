package audit

import (
	"fmt"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Markdown renders the report for people: facts only, with fenced and dead in separate sections. External text is in
// code spans, so that it cannot pass for text of the report.
func (r Report) Markdown() string {
	var p page
	rv := r.Revocation
	p.line("# Revocation %s", rv.ID)
	p.line("")
	p.line("Issued by %s at %s, from the ledger at that time.", code(r.Issuer), at(r.Made))
	p.fenced(r)
	p.dead(r)
	p.agents(r)
	p.window(r)
	p.residual(r)
	p.untouched(r)
	p.grants(r)
	p.timeline(r)
	return p.String()
}

type page struct{ strings.Builder }

func (p *page) line(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

func (p *page) heading(text string) { p.line("\n## %s\n", text) }

// row writes a row of a table.
func (p *page) row(cells ...string) {
	for i, c := range cells {
		cells[i] = strings.ReplaceAll(c, "|", `\|`)
	}
	p.line("| %s |", strings.Join(cells, " | "))
}

func (p *page) head(cells ...string) {
	p.row(cells...)
	p.line("|%s", strings.Repeat("---|", len(cells)))
}

func (p *page) fenced(r Report) {
	rv := r.Revocation
	p.heading("Fenced")
	word := "revoked permanently"
	switch {
	case rv.Lifted:
		word = "frozen, and lifted later"
	case rv.Freeze:
		word = "frozen until lifted; nothing was severed"
	}
	p.line("- Selector: %s", code(rv.Selector))
	p.line("- Effect: %s", word)
	p.line("- By: %s", code(rv.By))
	p.line("- Reason: %s", code(rv.Reason))
	p.line("- Requested: %s", at(rv.Asked))
	p.line("- Fenced: %s, revision %d. Nothing was handed out under it after that.", at(rv.Fenced), rv.Revision)
	for _, l := range r.LiftedAlone {
		p.line("- **One person lifted freeze %s**, on a stopped broker at %s: %s", l.Revocation, at(l.At), code(l.Reason))
	}
	for _, c := range r.Chains {
		p.line("- Chain %s: %s, opened by %s at %s; %d delegations and %d grants in scope", c.ID, code(c.Task), code(c.Opener), at(c.Opened), c.Delegations, c.Grants)
		if e := c.Envelope; e != nil {
			p.line("  - Envelope %s of %s: task %s, on behalf of %s, issued at %s", code(e.ID), code(e.Issuer), code(e.Task),
				code(e.Behalf), at(e.Issued))
		}
	}
}

func (p *page) dead(r Report) {
	rv := r.Revocation
	p.heading("Dead")
	if rv.Freeze {
		p.line("A freeze ends nothing: secrets handed out before it live until they expire.")
		return
	}
	p.line("- Closure: **%s**", rv.Closure)
	if rv.Uncounted {
		p.line("- Its grants were not counted yet when this report was made")
		return
	}
	p.line("- Grants that had not ended at the fence: %d", rv.Grants)
	p.line("- Proven dead: %d", rv.Dead)
	p.line("- Shown to be alive: %d, of which only rotation ends %d", rv.Alive, rv.Static)
	p.line("- Not proven either way: %d", rv.Unknown)
	p.line("- Delegation tokens not confirmed revoked: %d", rv.Tokens)
	p.line("- Leases still being removed: %d. Their secrets are among the dead: this is housekeeping in Vault.", rv.Leases)
	if rv.Settled.IsZero() {
		p.line("- Not settled yet when this report was made")
	} else {
		p.line("- Settled: %s", at(rv.Settled))
	}
}

func (p *page) agents(r Report) {
	if len(r.Agents) == 0 {
		return
	}
	p.heading("Acknowledgements")
	p.line("The holders of the delegations that were open at the fence, and when they acknowledged the order to stop their steps. The closure does not depend on it.")
	p.line("")
	p.head("holder", "delegation", "acknowledged")
	for _, a := range r.Agents {
		p.row(code(a.Holder.String()), string(a.Delegation), at(a.At))
	}
	if r.AgentsMore > 0 {
		p.line("\n%d more are not listed.", r.AgentsMore)
	}
}

func (p *page) window(r Report) {
	p.heading("Between the breach and the fence")
	w := r.Window
	if w.Breach == nil {
		p.line("No violation is recorded before the fence. The ledger does not show when the incident began.")
		return
	}
	p.line("- Breach: %s by %s at %s, revision %d, tool %s", code(string(w.Breach.Code)), code(w.Breach.Actor), at(w.Breach.At), w.Breach.Revision, code(string(w.Breach.Tool)))
	p.line("- Fenced %s later", w.Fenced.Sub(w.Breach.At))
	p.line("- Secrets handed over in between: %s", ids(w.Issued))
	p.line("- Secrets handed over earlier and still live at the breach: %s", ids(w.Live))
}

func (p *page) residual(r Report) {
	p.heading("Residual risk")
	left := r.Residual
	p.line("- Must be rotated at their source: %s", ids(left.Rotate))
	p.line("- Shown to be alive: %s", ids(left.Alive))
	p.line("- Not proven either way: %s", ids(left.Unproven))
	if !left.LatestEnd.IsZero() {
		p.line("- Alive and unproven secrets expire by %s", at(left.LatestEnd))
	}
	p.line("- Dead by a revocation list or by introspection, but valid until they expire at a verifier that checks neither: %s", ids(left.Listed))
	if !left.ListedEnd.IsZero() {
		p.line("- These expire everywhere by %s", at(left.ListedEnd))
	}
	p.line("- Delegation tokens not confirmed revoked: %d", left.Tokens)
	p.line("- Secrets handed over and ended before the fence: %d. Their use is not undone.", left.EndedBefore)
}

func (p *page) untouched(r Report) {
	p.heading("Not touched")
	if len(r.Untouched) == 0 {
		p.line("No open delegation of these chains or holders was left out.")
	} else {
		p.head("delegation", "chain", "holder", "live grants", "expires", "relation")
	}
	for _, u := range r.Untouched {
		relation := "same holder"
		if u.SameChain {
			relation = "same chain"
		}
		p.row(string(u.Delegation), string(u.Chain), code(u.Holder), fmt.Sprint(u.Live), at(u.Expires), relation)
	}
	if r.UntouchedMore > 0 {
		p.line("\n%d more open chains were not searched.", r.UntouchedMore)
	}
}

func (p *page) grants(r Report) {
	p.heading("Grants")
	if len(r.Grants) == 0 {
		p.line("None.")
	}
	for _, g := range r.Grants {
		p.line("### %s: %s\n", g.ID, status(g))
		p.line("- %s for %s, arguments %s, purpose %s", code(string(g.Tool)), code(g.Caller), code(g.Args), code(g.Purpose))
		p.line("- Narrowing: %s. Requested %s, handed over %s, ended %s, latest end %s", g.Narrowing, at(g.Created), at(g.HandedOver), at(g.Ended), at(g.LatestEnd))
		p.line("- Lease %s, name at the target %s, request in Vault's audit log %s", code(g.Lease), code(g.Ref), code(g.Request))
		for _, e := range g.Evidence {
			p.line("- Evidence, %s: %s: %s (%s)", at(e.At), code(e.Check), code(e.Answer), e.Outcome)
		}
		p.line("")
	}
	if r.GrantsMore > 0 {
		p.line("%d more grants are counted but not listed.", r.GrantsMore)
	}
}

// status describes the state of a grant in a few words.
func status(g Grant) string {
	switch {
	case g.Outcome == broker.OutcomeStatic:
		return "works until it is rotated"
	case g.Outcome == broker.OutcomeDead && g.Before:
		return "dead before the fence"
	}
	return g.Outcome.String()
}

func (p *page) timeline(r Report) {
	p.heading("Timeline")
	p.head("revision", "time", "operation", "actor", "subject", "code", "detail")
	for _, e := range r.Timeline {
		subject := string(e.Grant)
		if subject == "" {
			subject = string(e.Delegation)
		}
		p.row(fmt.Sprint(e.Revision), at(e.At), string(e.Op), code(e.Actor), subject, code(string(e.Code)), code(e.Detail))
	}
	if r.TimelineMore > 0 {
		p.line("\n%d later entries are not listed.", r.TimelineMore)
	}
}

func at(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

func ids(list []broker.GrantID) string {
	if len(list) == 0 {
		return "none"
	}
	const most = 100
	var b strings.Builder
	fmt.Fprintf(&b, "%d:", len(list))
	for _, id := range list[:min(len(list), most)] {
		b.WriteString(" " + string(id))
	}
	if len(list) > most {
		b.WriteString(" …")
	}
	return b.String()
}

// code puts text into a code span that the text cannot leave: more backticks than it contains, one line, no control
// or direction characters.
func code(s string) string {
	if s == "" {
		return "none"
	}
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return '\ufffd'
		}
		return r
	}, s)
	longest, run := 0, 0
	for _, r := range s {
		if run++; r != '`' {
			run = 0
		}
		longest = max(longest, run)
	}
	if longest == 0 {
		return "`" + s + "`"
	}
	ticks := strings.Repeat("`", longest+1)
	return ticks + " " + s + " " + ticks
}
