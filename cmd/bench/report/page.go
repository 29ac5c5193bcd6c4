package report

import (
	"fmt"
	"strings"
)

// Page gives the text of docs/performance.md.
func (r *Report) Page(quick bool) string {
	var b strings.Builder
	b.WriteString("# Performance\n\n" + intro + "\n")
	if quick {
		b.WriteString("This is a quick run (`make bench QUICK=1`): it has few rounds, and so a wide spread.\n\n")
	}
	b.WriteString("![Pawl beside Vault](performance.svg)\n\n## Targets\n\n")
	r.aimed(&b)
	b.WriteString("\n## Missed targets\n\n")
	r.shortfalls(&b)
	b.WriteString("\n## Every row\n\n" + legend + "\n")
	r.markdown(&b, r.rows)
	if notes := r.notes(); notes != "" {
		b.WriteString("\n### Comparisons\n\n" + notes)
	}
	if len(r.left) > 0 {
		b.WriteString("\n### Not measured\n\n")
		for _, l := range r.left {
			fmt.Fprintf(&b, "- `%s`: %s\n", l.what, strings.ReplaceAll(l.why, "\n", " "))
		}
	}
	b.WriteString("\n## Method\n\n" + method + "\n## Repeat it\n\n" + repeat + "\n## The machine\n\n")
	for _, line := range r.Machine {
		fmt.Fprintf(&b, "- %s\n", line)
	}
	fmt.Fprintf(&b, "- %s, %.0f s in all\n", r.Began.UTC().Format("2006-01-02 15:04 UTC"), r.Took.Seconds())
	return b.String()
}

// The prose of the page. method describes how each section measures.
const (
	intro = "`make bench` writes this page; do not edit it. All figures are from one run on one machine. Each figure and\n" +
		"its comparison were measured in the same run, in turns. Other machines give other figures, so compare\n" +
		"ratios.\n"

	legend = "- *ours* is the median over the rounds. For p99 rows it is the 99th percentile of all measurements.\n" +
		"- *min–max* is the smallest and the largest round.\n" +
		"- *ratio* is ours divided by theirs. For rows with `vs_` in the time to death it is theirs divided by ours:\n" +
		"  how many times sooner.\n" +
		"- *n* is the number of measurements behind ours.\n"

	method = "- Servers: a real Vault (storage in memory, TLS) and a real PostgreSQL (`fsync=off`, for both sides alike).\n" +
		"  The broker runs in a process of its own on the embedded ledger and syncs every commit. All of them share\n" +
		"  one machine with the clients, so a processor that the broker uses is not available to Vault. A step\n" +
		"  through Pawl sends Vault one request where its secret has no lease (kv, jwt, ssh), and else two (its own\n" +
		"  token, then the secret); the direct call sends one.\n" +
		"- `added_of_commit_ms` sets the added time beside synced commits of bbolt alone, one after the other, on the\n" +
		"  same disk between the turns.\n" +
		"- Issue: closed loops of 1, 16 and 64 clients for a fixed time. Through Pawl each client is an agent with\n" +
		"  its own SPIFFE ID, mTLS connection and chain, over the Go SDK. Directly each client has a token of its own\n" +
		"  and persistent HTTP/1.1 connections. The sides take turns and swap the order. The secrets of a round are\n" +
		"  revoked, on both sides, before the next round. CPU time is from /proc over the loops of 16.\n" +
		"- PostgreSQL directly: a role of Vault with a group role and SCRAM verifiers, as in the best-configured\n" +
		"  Vault. Through Pawl a function makes the login, records it and sets its limits.\n" +
		"- Dead: n credentials, up to 1,000 of them each with an open session in a transaction with a cursor. From\n" +
		"  the command on, an observer polls every 4 to 40 ms over a superuser's connection that belongs to neither\n" +
		"  side. It polls until no role may log in and no session is left; then it tries cursors and logins. Where\n" +
		"  sessions are never ended, theirs is timed to the end of the logins alone, which is in its favour. Before\n" +
		"  each turn the catalogs are vacuumed. Of 10,000 only the quickest of their ways is measured: the others\n" +
		"  would take half an hour. `vs_floor` compares ours with a superuser who does nothing but NOLOGIN and\n" +
		"  pg_terminate_backend: no tool can be sooner on this machine.\n" +
		"- Hostile: 41 logins with a session each, of which one does what holds up the end of logins, and in turns the\n" +
		"  same without it. The observer watches the 40 others.\n" +
		"- Alone: 40 logins with a session each. The synchronous standby is killed and Vault paused before the fence.\n" +
		"  The time runs from its acknowledgement.\n" +
		"- Fence: the engine in process on the embedded ledger, with a load of 50 issues a second. Repeated fences of\n" +
		"  one chain are freezes: the same transaction, lifted in between. With Vault down: revocations over the\n" +
		"  operators' socket of the broker's process.\n" +
		"- Flood: 20,000 silent connections from 100 addresses, 512 loops of one agent that never pause and 1,000 slow\n" +
		"  bodies of 32 agents, at once. They come from a process of its own with a lower priority (nice 10), which\n" +
		"  opens 500 silent connections and at most 100 with an SVID a second once all are there: on one machine a\n" +
		"  flood without a pace would measure the processors. Another agent opens a chain, takes a step and is revoked,\n" +
		"  one after the other. A row in which a request failed misses its target. `flood.cpu` has the shares of the\n" +
		"  processors; the idle rest of the machine is the room for a larger flood.\n" +
		"- Growth: callers with a small part of the default share of the ledger write, each in its own way, until they\n" +
		"  are refused. The largest factor from share to file counts. After that one goes on for two minutes with the\n" +
		"  requests that no share refuses.\n" +
		"- Chains: open chains of 500 agents, and eight of another one, in the engine in process, behind the operators'\n" +
		"  endpoints on a Unix socket.\n" +
		"- Ledger, resume: the engine on the embedded ledger with a Vault and target in memory. The process that\n" +
		"  measures policy, fence, ledger and resume collects garbage as the broker does: when the heap has grown by\n" +
		"  200%, on both sides.\n"

	repeat = "The test of the pages does not run these commands, because they take too long and write this page.\n" +
		"\n" +
		"```sh no-run\n" +
		"make bench          # everything, about an hour on two processors\n" +
		"make bench QUICK=1  # under three minutes; holds the bounds, and leaves this page alone\n" +
		"go run ./cmd/bench -only '^fence$'   # one section; leaves this page alone\n" +
		"make bench AGAINST=8532fd1 ONLY='^issue$'   # an older commit and this tree, in turns\n" +
		"```\n" +
		"\n" +
		"With `QUICK=1` the run fails when a ratio is more than twice its bound in\n" +
		"[promises.md](promises.md#bounds) in three runs out of three. The second and the third measure only what was\n" +
		"missed. `tries` in build/bench.json has the figures of each.\n" +
		"\n" +
		"With `AGAINST` both builds make quick runs in turns (A B, B A), four each; `go run ./cmd/bench -against COMMIT`\n" +
		"makes whole ones, and `-rounds` sets how many. The table has the medians of *ours* in both, their ratio and the\n" +
		"smallest and largest ratio of a round, and lists the rows that one build does not have. build/against.json has\n" +
		"the same. The older commit is checked out below build/, on the same disk, and removed at the end.\n" +
		"\n" +
		"`build/bench.json` is an array of these rows for scripts, and `build/bench.svg` is the chart. The run builds\n" +
		"`build/pawl`, and Vault on first use. Without PostgreSQL its rows are left out, and the page says so.\n"
)

func (r *Report) markdown(b *strings.Builder, rows []Row) {
	fmt.Fprintf(b, "| %s |\n|%s\n", strings.Join(heads, " | "), strings.Repeat("---|", len(heads)))
	for _, w := range rows {
		cells := w.cells()
		cells[0] = "`" + cells[0] + "`"
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
}

func (r *Report) aimed(b *strings.Builder) {
	var rows []Row
	for _, w := range r.rows {
		if w.Met != nil {
			rows = append(rows, w)
		}
	}
	r.markdown(b, rows)
}

func (r *Report) shortfalls(b *strings.Builder) {
	none := true
	for _, w := range r.rows {
		if w.Met == nil || *w.Met {
			continue
		}
		none = false
		got := Figure(w.Ours) + " " + w.Unit
		if strings.Contains(w.Aim, "×") {
			got = "×" + Figure(*w.Ratio)
		}
		if w.Failed > 0 {
			got += fmt.Sprintf(", %d failed", w.Failed)
		}
		fmt.Fprintf(b, "- `%s`: target %s, measured %s.%s\n", w.Name, w.Aim, got, reason(w.Name))
	}
	if none {
		b.WriteString("None in this run.\n")
	}
}

// reasons explain a missed target, by the prefix and the suffix of the row's name. The first match counts.
var reasons = []struct{ prefix, suffix, why string }{
	{"issue.", "added_of_commit_ms",
		" Pawl adds a synced commit of the ledger, and where the secret has a lease one request to Vault for the " +
			"step's own token, to the direct call."},
	{"issue.", "added_p99_ms",
		" The slowest commits and collections of the broker are added to Vault's slowest."},
	{"issue.", "cpu_vs_vault",
		" For cheap calls (a KV read) the broker's own work is more than Vault's: TLS with the agent, two " +
			"records and their audit."},
	{"issue.", "vault_cpu", " Vault also makes the step's own token, and ends it."},
	{"issue.", "throughput",
		" A step with a lease is two requests to Vault, and a commit is waited for. The function that makes the " +
			"login also records and " +
			"limits it."},
	{"ledger.bytes", "", " A closed step stays in the file with its audit entries."},
	{"ledger.", "",
		" The engine also decides, checks and audits, on the same processors. bbolt alone does nothing of it."},
	{"close.pki.asked", "", " Vault has only queued the revocation when the responder is first asked."},
	{"close.", "", " The end is proven by the list of all revoked certificates, which Vault makes anew."},
	{"events.", "kb_each", " Each stream is a request of HTTP/2, with a goroutine and buffers of its own."},
	{"idle.", "", " A connection has the buffers of TLS and HTTP/2, and the certificates of its agent."},
	{"fence.while_closing", "",
		" A fence waits for the commit that the reaper is writing, and for its own sync. No other is before it."},
	{"fence.", "p99_ms",
		" The fence waits for the commit before it: on a shared disk that is the slowest of a hundred syncs."},
	{"resume.", "seconds", " Each live grant is read and decoded once, on one processor."},
	{"dead.postgres.10000", "seconds",
		" No session is open here. After the broker has read each grant, the server removes the login and the " +
			"rights of all roles in one transaction, on one processor."},
	{"dead.", "closed_seconds", " The broker asks Vault to end each step's token, and then the server about all logins."},
	{"dead.", "vs_floor",
		" The broker reads each grant before the server ends its login."},
	{"dead.", "seconds",
		" Each session is a PostgreSQL process, and ending it takes some 2 ms of a processor. `vs_floor` is the " +
			"time without Pawl."},
	{"dead.", "vs_vault_best",
		" Both sides wait for the same processes to end: see `vs_floor`. `refused_seconds` is how long a login " +
			"was still possible."},
	{"flood.other.", "p99_ms",
		" The loops' own steps take the rest of Vault and of PostgreSQL, on the same processors."},
	{"flood.", "p99_ms",
		" Broker, Vault, PostgreSQL and the flood share the processors: see `flood.cpu`."},
	{"policy.", "",
		" The median is far below. One call in a hundred is interrupted by a collection or by other work of the " +
			"machine."},
}

func reason(name string) string {
	for _, r := range reasons {
		if strings.HasPrefix(name, r.prefix) && strings.HasSuffix(name, r.suffix) {
			return r.why
		}
	}
	return ""
}

// notes lists the comparisons and the notes of the rows, each text once with the rows that it is about.
func (r *Report) notes() string {
	var b strings.Builder
	at := map[string]int{}
	var texts []string
	names := map[string][]string{}
	for _, w := range r.rows {
		text := w.Against
		if text != "" {
			text = "compared with " + text
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
