package audit

import (
	"fmt"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Markdown renders the report for people: facts only, and what is fenced apart from what is dead. Text
// that came from outside stands in code spans, so that it cannot pass for the report's own.
func (r Report) Markdown() string {
	var p page
	rv := r.Revocation
	p.line("# Revocation %s", rv.ID)
	p.line("")
	p.line("Issued by %s at %s, as the ledger was then.", code(r.Issuer), at(r.Made))
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

// row is a row of a table.
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
	word := "revoked, for good"
	switch {
	case rv.Lifted:
		word = "frozen, and lifted since"
	case rv.Freeze:
		word = "frozen until it is lifted; nothing was cut"
	}
	p.line("- What: %s", code(rv.Selector))
	p.line("- How: %s", word)
	p.line("- By: %s", code(rv.By))
	p.line("- Why: %s", code(rv.Reason))
	p.line("- Asked for: %s", at(rv.Asked))
	p.line("- Fenced: %s, revision %d. From then on nothing was handed out under it.", at(rv.Fenced), rv.Revision)
	for _, c := range r.Chains {
		p.line("- Chain %s: %s, opened by %s at %s; %d delegations and %d grants in scope", c.ID, code(c.Task), code(c.Opener), at(c.Opened), c.Delegations, c.Grants)
	}
}

func (p *page) dead(r Report) {
	rv := r.Revocation
	p.heading("Dead")
	if rv.Freeze {
		p.line("A freeze ends nothing: what was handed out before lives to its own end.")
		return
	}
	p.line("- Closure: **%s**", rv.Closure)
	p.line("- Grants that were not over when it was fenced: %d", rv.Grants)
	p.line("- Proven dead: %d", rv.Dead)
	p.line("- Shown to work still: %d, of which only rotation ends %d", rv.Alive, rv.Static)
	p.line("- Not proven either way: %d", rv.Unknown)
	p.line("- Delegation tokens not shown revoked: %d", rv.Tokens)
	if rv.Settled.IsZero() {
		p.line("- Not settled when this report was made")
	} else {
		p.line("- Settled: %s", at(rv.Settled))
	}
}

func (p *page) agents(r Report) {
	if len(r.Agents) == 0 {
		return
	}
	p.heading("Heard")
	p.line("Whose delegations were open when it was fenced, and when they acknowledged that their steps were told to stop. What is dead is dead without it.")
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
		p.line("No violation is recorded before the fence. When the trouble began is not in the ledger.")
		return
	}
	p.line("- Breach: %s by %s at %s, revision %d, tool %s", code(string(w.Breach.Code)), code(w.Breach.Actor), at(w.Breach.At), w.Breach.Revision, code(string(w.Breach.Tool)))
	p.line("- Fenced %s later", w.Fenced.Sub(w.Breach.At))
	p.line("- Secrets handed over in between: %s", ids(w.Issued))
	p.line("- Secrets handed over before and not over at the breach: %s", ids(w.Live))
}

func (p *page) residual(r Report) {
	p.heading("Residual risk")
	left := r.Residual
	p.line("- To be rotated where they are kept: %s", ids(left.Rotate))
	p.line("- Shown to work still: %s", ids(left.Alive))
	p.line("- Not proven either way: %s", ids(left.Unproven))
	if !left.LatestEnd.IsZero() {
		p.line("- What is alive or not proven ends by itself by %s", at(left.LatestEnd))
	}
	p.line("- Dead by a list or by introspection, and good until their own end at a verifier that looks at neither: %s", ids(left.Listed))
	if !left.ListedEnd.IsZero() {
		p.line("- These end by themselves everywhere by %s", at(left.ListedEnd))
	}
	p.line("- Delegation tokens not shown revoked: %d", left.Tokens)
	p.line("- Secrets that were handed over and were over before the fence: %d. What was done with them stays done.", left.OverBefore)
}

func (p *page) untouched(r Report) {
	p.heading("Not touched")
	if len(r.Untouched) == 0 {
		p.line("No open delegation of these chains or holders was left out.")
	} else {
		p.head("delegation", "chain", "holder", "live grants", "expires", "why it is named")
	}
	for _, u := range r.Untouched {
		why := "same holder"
		if u.SameChain {
			why = "same chain"
		}
		p.row(string(u.Delegation), string(u.Chain), code(u.Holder), fmt.Sprint(u.Live), at(u.Expires), why)
	}
	if r.UntouchedMore > 0 {
		p.line("\n%d more open chains were not looked through.", r.UntouchedMore)
	}
}

func (p *page) grants(r Report) {
	p.heading("Grants")
	if len(r.Grants) == 0 {
		p.line("None.")
	}
	for _, g := range r.Grants {
		p.line("### %s: %s\n", g.ID, standing(g))
		p.line("- %s for %s, arguments %s, purpose %s", code(string(g.Tool)), code(g.Caller), code(g.Args), code(g.Purpose))
		p.line("- Narrowed: %s. Asked for %s, handed over %s, over %s, at the latest %s", g.Narrowing, at(g.Created), at(g.HandedOver), at(g.Ended), at(g.LatestEnd))
		p.line("- Lease %s, at its target %s", code(g.Lease), code(g.Ref))
		for _, e := range g.Evidence {
			p.line("- Evidence, %s: %s: %s (%s)", at(e.At), code(e.Check), code(e.Answer), e.Outcome)
		}
		p.line("")
	}
	if r.GrantsMore > 0 {
		p.line("%d more grants are counted and not listed.", r.GrantsMore)
	}
}

// standing is what is known of a grant in a few words.
func standing(g Grant) string {
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
	p.head("revision", "time", "what", "who", "about", "code", "detail")
	for _, e := range r.Timeline {
		about := string(e.Grant)
		if about == "" {
			about = string(e.Delegation)
		}
		p.row(fmt.Sprint(e.Revision), at(e.At), string(e.Op), code(e.Actor), about, code(string(e.Code)), code(e.Detail))
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

// code puts text into a code span that it cannot leave: longer backticks than it has around it, one
// line, no control or direction characters.
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
