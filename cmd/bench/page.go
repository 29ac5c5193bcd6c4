package main

import (
	"fmt"
	"strings"
)

// page is docs/performance.md.
func (r *report) page(quick bool) string {
	var b strings.Builder
	b.WriteString("# Performance\n\n")
	b.WriteString("Written by `make bench`; not to be edited. Every figure is of one run on one machine, and what it is set beside was\n" +
		"measured in the same run, in turns with it. Other machines give other figures; compare ratios.\n\n")
	if quick {
		b.WriteString("This is of a quick run (`make bench QUICK=1`): few rounds, and so a wide spread.\n\n")
	}
	b.WriteString("![Pawl beside Vault](performance.svg)\n\n## What was aimed at\n\n")
	r.aimed(&b)
	b.WriteString("\n## Where it falls short\n\n")
	r.shortfalls(&b)
	b.WriteString("\n## Every row\n\n")
	b.WriteString("*ours* is the median over the rounds (for p99 rows the 99th percentile of all measurements), *min–max* the least and greatest\n" +
		"round. *ratio* is ours divided by theirs; for rows with `vs_` in the time to death it is theirs divided by ours: how many times\n" +
		"sooner. *n* is how many measurements are behind ours.\n\n")
	r.markdown(&b, r.rows)
	if notes := r.notes(); notes != "" {
		b.WriteString("\n### What the rows are set beside\n\n" + notes)
	}
	if len(r.left) > 0 {
		b.WriteString("\n### What was not measured\n\n")
		for _, l := range r.left {
			fmt.Fprintf(&b, "- `%s`: %s\n", l.what, strings.ReplaceAll(l.why, "\n", " "))
		}
	}
	b.WriteString("\n## How it is measured\n\n" + method)
	b.WriteString("\n## How to repeat it\n\nThe test of the pages does not run this: it takes too long, and writes this page.\n\n" +
		"```sh no-run\nmake bench          # everything, about an hour on two processors\nmake bench QUICK=1  # under three minutes\n" +
		"go run ./cmd/bench -only '^fence$'   # one section; leaves this page alone\n```\n\n" +
		"`build/bench.json` is an array of these rows for scripts, `build/bench.svg` the chart. The run builds `build/pawl` itself, and\n" +
		"Vault on first use; PostgreSQL must be installed, or its rows are left out and that is said.\n\n## The machine\n\n")
	for _, line := range r.machine {
		fmt.Fprintf(&b, "- %s\n", line)
	}
	fmt.Fprintf(&b, "- %s, %.0f s in all\n", r.began.UTC().Format("2006-01-02 15:04 UTC"), r.took.Seconds())
	return b.String()
}

// method says what is done, for whoever doubts a figure.
const method = `- A real Vault (storage in memory, TLS), a real PostgreSQL (` + "`fsync=off`" + `, for both sides alike), and the broker in a process of its own on the
  embedded ledger, with a sync for every commit. Everything shares one machine with the clients, so a processor that the broker
  takes is one that Vault lacks: through Pawl a step asks Vault twice (its own token, then the secret), directly once.
- Issue: closed loops of 1, 16 and 64 clients for a fixed time. Through Pawl each client is an agent with its own SPIFFE ID, mTLS
  connection and chain, over the Go SDK; directly each has a token of its own and kept HTTP/1.1 connections. The sides take turns and
  swap who begins. What a round issued is revoked, on both sides, before the next. CPU time is from /proc over the loops of 16.
- PostgreSQL directly: a role of Vault with a group role and SCRAM verifiers, as the best-configured Vault has it. Through Pawl the
  login is made by a function that also records it and sets its limits.
- Dead: n credentials, up to 1,000 of them each with an open session in a transaction with a cursor. From the command on, an observer
  with a superuser's connection that belongs to neither side looks again and again, every 4 to 40 ms, until no role may log in and no
  session is there; then cursors and logins are tried. Where sessions stay for good, theirs is timed to the end of the logins alone,
  which is in its favour. Before each turn the catalogs are vacuumed. Of 10,000 only the quickest of theirs is taken: the others would
  take half an hour. ` + "`vs_floor`" + ` sets ours beside a superuser who does nothing but NOLOGIN and pg_terminate_backend: no tool can
  be sooner on this machine.
- Fence: the engine in process on the embedded ledger, 50 issues a second beside it. Repeated fences of one chain are freezes, the same
  transaction, lifted in between. With Vault down: revocations over the operators' socket of the broker's process.
- Ledger, resume: the engine on the embedded ledger with a Vault and target in memory. The process that measures policy, fence, ledger
  and resume collects garbage as the broker does: when the heap has grown by 200%, on both sides.
`

func (r *report) markdown(b *strings.Builder, rows []row) {
	fmt.Fprintf(b, "| %s |\n|%s\n", strings.Join(heads, " | "), strings.Repeat("---|", len(heads)))
	for _, w := range rows {
		cells := w.cells()
		cells[0] = "`" + cells[0] + "`"
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
}

func (r *report) aimed(b *strings.Builder) {
	var rows []row
	for _, w := range r.rows {
		if w.Met != nil {
			rows = append(rows, w)
		}
	}
	r.markdown(b, rows)
}

func (r *report) shortfalls(b *strings.Builder) {
	none := true
	for _, w := range r.rows {
		if w.Met == nil || *w.Met {
			continue
		}
		none = false
		got := figure(w.Ours) + " " + w.Unit
		if strings.Contains(w.Aim, "×") {
			got = "×" + figure(*w.Ratio)
		}
		fmt.Fprintf(b, "- `%s`: aimed at %s, measured %s.%s\n", w.Name, w.Aim, got, reason(w.Name))
	}
	if none {
		b.WriteString("Nowhere in this run.\n")
	}
}

// reasons say why a row is where it is, by the beginning of its name and its last part.
var reasons = []struct{ prefix, suffix, why string }{
	{"issue.", "added_p50_ms", " On top of the direct call come three synced commits of the ledger and one request to Vault for the step's own token."},
	{"issue.", "cpu_vs_vault", " Beside cheap calls (a KV read) the broker's own work, TLS with the agent, three records and their audit, is more than Vault's."},
	{"issue.", "throughput", " A step is two requests to Vault and three commits; the login is made by a function that also records and limits it."},
	{"ledger.", "", " Three durable transactions for each issue, each with its audit entry; bbolt alone, beside it, checks and audits nothing."},
	{"fence.while_closing", "", " A fence waits for the record of the closer that is being written, and for the sync of its disk."},
	{"fence.", "p99_ms", " The fence waits for the commit before it: on a shared disk that is the slowest sync of a hundred."},
	{"resume.", "seconds", " Each live grant is read and decoded once, on one processor."},
	{"dead.postgres.10000", "seconds", " No session is open here: the server takes login and rights from all in one transaction, on one processor, after the broker has read each grant."},
	{"dead.", "seconds", " Each session is a process of PostgreSQL's that takes some 2 ms of a processor to go: `vs_floor` says what it takes without Pawl."},
	{"dead.", "vs_vault_best", " Both sides wait for the same processes to go: see `vs_floor`, and `refused_seconds` for how long anybody could still log in."},
	{"policy.", "", " The median is far below: one call in a hundred is interrupted by a collection or by other work of the machine."},
}

func reason(name string) string {
	for _, r := range reasons {
		if strings.HasPrefix(name, r.prefix) && strings.HasSuffix(name, r.suffix) {
			return r.why
		}
	}
	return ""
}

// notes lists, once each, what rows are compared with and what is to be known of them.
func (r *report) notes() string {
	var b strings.Builder
	at := map[string]int{}
	var texts []string
	names := map[string][]string{}
	for _, w := range r.rows {
		text := w.Against
		if text != "" {
			text = "beside " + text
		}
		if w.Note != "" {
			text = strings.TrimPrefix(text+"; "+w.Note, "; ")
		}
		if text == "" {
			continue
		}
		if _, ok := at[text]; !ok {
			at[text] = len(texts)
			texts = append(texts, text)
		}
		names[text] = append(names[text], "`"+w.Name+"`")
	}
	for _, text := range texts {
		list := names[text]
		if len(list) > 4 {
			list = append(list[:3:3], fmt.Sprintf("and %d more", len(list)-3))
		}
		fmt.Fprintf(&b, "- %s: %s.\n", strings.Join(list, ", "), text)
	}
	return b.String()
}
