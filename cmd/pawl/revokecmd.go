package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/wire"
)

// revokeFlags are the flags of `pawl revoke` and `pawl freeze`.
type revokeFlags struct {
	operatorFlags
	reason, from                    string
	plan, yes, includeNew, noFollow bool
	leaked                          bool
}

func revokeCommand() *cobra.Command {
	var f revokeFlags
	c := &cobra.Command{
		Use: "revoke SELECTOR | --leaked", Short: "Revoke everything that a selector matches, for good", Args: f.selectorArgs,
		Long: "Revoke everything that a selector matches, for good. From the acknowledgement on, no secret is handed\n" +
			"out under it. The secrets that were handed out are severed at their backends. The closure reports the\n" +
			"proof: CLOSED all of them are dead, PARTIAL some are known alive, UNKNOWN some are not proven.\n\n" +
			"Without --yes it prints a plan and changes nothing. A plan is bound to exactly the set it shows: with\n" +
			"--from-plan the revocation stops if the set has grown since, unless --include-new is given.\n\n" +
			"A selector is made of chain:ID, subtree:DELEGATION, grant:ID, spiffe:ID or spiffe:PREFIX/*, task:\"text\",\n" +
			"tool:NAME, arg.NAME:value, vault:mount/role, bundle:DIGEST, label.NAME:value, since:TIME, until:TIME,\n" +
			"leaked:sha256:DIGEST, joined by and, or, not and parentheses. --leaked reads a leaked value from standard\n" +
			"input, and selects the grant that handed it out.",
		Example: "  pawl revoke chain:ch0123456789abcdefghjkmnpq\n" +
			"  pawl revoke chain:ch0123456789abcdefghjkmnpq --yes --reason 'leaked in a chat'\n" +
			"  pawl revoke 'spiffe:spiffe://example.org/ci/* and tool:deploy' --yes --reason 'compromised runner'\n" +
			"  pawl revoke --leaked --yes --reason 'found in a log' < value",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, args []string) error {
			return revoke(cmd, c, f, args, false)
		}),
	}
	f.addRevoke(c)
	watch := &cobra.Command{
		Use: "watch REVOCATION", Short: "Follow a revocation until it is settled", Args: cobra.ExactArgs(1),
		Long:    "Follow a revocation until it is settled. The broker continues it with or without a watcher.",
		Example: "  pawl revoke watch rv0123456789abcdefghjkmnpq",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, args []string) error {
			return follow(cmd, c, &f.operatorFlags, args[0])
		}),
	}
	l := listing[api.Revocation]{header: "REVOCATION\tSTATE\tFENCED\tDEAD\tALIVE\tUNKNOWN\tBY\tSELECTOR",
		row: func(w io.Writer, r api.Revocation) {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\t%s\t%s\n", r.ID, stateWord(r),
				r.Fenced.UTC().Format(time.RFC3339), r.Dead, r.Alive, r.Unknown, r.By, r.Selector)
		}}
	list := &cobra.Command{
		Use: "list", Short: "List revocations and freezes", Args: cobra.NoArgs,
		Long: "List revocations and freezes, latest first.", Example: "  pawl revoke list",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, _ []string) error {
			l.read = func(after string, limit int) ([]api.Revocation, string, error) {
				p, err := c.RevocationPage(cmd.Context(), after, limit)
				return p.Revocations, p.Next, err
			}
			return l.print(cmd, &f.operatorFlags)
		}),
	}
	l.addLimit(list)
	c.AddCommand(watch, list)
	return c
}

func (f *revokeFlags) addRevoke(c *cobra.Command) {
	f.add(c)
	flags := c.Flags()
	flags.BoolVar(&f.plan, "plan", false, "print the plan and change nothing, as without --yes")
	flags.BoolVar(&f.yes, "yes", false, "carry it out")
	flags.StringVar(&f.reason, "reason", "", "the reason, for the audit and the report; required with --yes")
	flags.StringVar(&f.from, "from-plan", "", "the plan's token: stop if the set has grown since")
	flags.BoolVar(&f.includeNew, "include-new", false, "with --from-plan: continue if the set has grown")
	flags.BoolVar(&f.leaked, "leaked", false,
		"instead of a selector: the grant that handed out the value on standard input")
	flags.BoolVar(&f.noFollow, "no-follow", false, "do not wait for the closure")
}

func freezeCommand() *cobra.Command {
	var f revokeFlags
	c := &cobra.Command{
		Use: "freeze SELECTOR | --leaked", Args: f.selectorArgs,
		Short: "Stop new secrets under a selector for now; existing ones stay",
		Long: "Hand out no secret under anything that a selector matches, until the freeze is lifted. Existing secrets\n" +
			"live until they expire. A freeze by SPIFFE ID also applies to chains opened later. See pawl unfreeze.",
		Example: "  pawl freeze spiffe:spiffe://example.org/agent/planner --yes --reason 'under investigation'",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, args []string) error {
			return revoke(cmd, c, f, args, true)
		}),
	}
	f.addRevoke(c)
	return c
}

func unfreezeCommand() *cobra.Command {
	var f operatorFlags
	var offline bool
	var config, reason string
	c := &cobra.Command{
		Use: "unfreeze REVOCATION", Short: "Lift a freeze; takes two people", Args: cobra.ExactArgs(1),
		Long: "Lift a freeze. Two people must run this command: two operators by SPIFFE ID, or one of them and one user of\n" +
			"the local socket. The users of the local socket count as one person. A revocation cannot be lifted.\n\n" +
			"With --offline root lifts it alone, on the broker's machine and with the broker stopped. The audit log and\n" +
			"every later report show that, with the reason.",
		Example: "  pawl unfreeze rv0123456789abcdefghjkmnpq\n" +
			"  pawl unfreeze --offline --config pawl.yaml --reason 'only one operator' rv0123456789abcdefghjkmnpq",
		RunE: func(cmd *cobra.Command, args []string) error {
			if offline {
				if err := required(cmd, "config", "reason"); err != nil {
					return err
				}
				return unfreezeAlone(cmd, config, args[0], reason)
			}
			return f.run(func(cmd *cobra.Command, c *operator.Client, args []string) error {
				r, err := c.Unfreeze(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return f.show(cmd, r, func(w io.Writer) { fmt.Fprintf(w, "%s is lifted\n", r.ID) })
			})(cmd, args)
		},
	}
	f.add(c)
	c.Flags().BoolVar(&offline, "offline", false, "as root, in the ledger of a stopped broker, without a second person")
	c.Flags().StringVar(&config, "config", "", "with --offline: the broker's configuration")
	c.Flags().StringVar(&reason, "reason", "", "with --offline: the reason, for the audit and the reports")
	return c
}

func unfreezeAlone(cmd *cobra.Command, file, revocation, reason string) error {
	config, err := wire.ReadConfig(file)
	if err != nil {
		return hinted{err, "docs/configuration.md explains each key"}
	}
	id, err := broker.ParseRevocationID(revocation)
	if err != nil {
		return misuse{hinted{err, "pawl revoke list shows the ids of freezes"}}
	}
	rv, err := wire.UnfreezeAlone(cmd.Context(), config, id, reason)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s is lifted by one person; start the broker again\n", rv.ID)
	return nil
}

// selectorArgs requires one selector, or --leaked instead.
func (f *revokeFlags) selectorArgs(cmd *cobra.Command, args []string) error {
	if f.leaked {
		return cobra.NoArgs(cmd, args)
	}
	return cobra.ExactArgs(1)(cmd, args)
}

func revoke(cmd *cobra.Command, c *operator.Client, f revokeFlags, args []string, freeze bool) error {
	var selector string
	if f.leaked {
		leaked, err := readLeaked(cmd)
		if err != nil {
			return err
		}
		selector = leaked.String()
	} else {
		selector = args[0]
	}
	if f.plan || !f.yes {
		plan, err := c.Plan(cmd.Context(), selector)
		if err != nil {
			return err
		}
		return f.show(cmd, plan, func(w io.Writer) { writePlan(w, plan, cmd.Name(), f.plan) })
	}
	if f.reason == "" {
		return misuse{hinted{errors.New("--reason is required with --yes"), "the audit and the report record it"}}
	}
	r, err := c.Revoke(cmd.Context(), api.RevokeRequest{
		Selector: selector, Reason: f.reason, Plan: f.from, IncludeNew: f.includeNew, Freeze: freeze})
	if err != nil {
		writeGrown(cmd.ErrOrStderr(), err)
		return err
	}
	if r.Warning != "" {
		fmt.Fprintf(cmd.ErrOrStderr(), "pawl: warning: %s\n", oneLine(r.Warning))
	}
	if freeze || f.noFollow {
		return f.show(cmd, r, func(w io.Writer) { writeRevocation(w, r) })
	}
	return follow(cmd, c, &f.operatorFlags, r.ID)
}

// writeGrown prints the delegations and grants that joined a plan's set since.
func writeGrown(w io.Writer, err error) {
	var p *api.Problem
	if !errors.As(err, &p) || p.Code != api.Code(broker.CodePlanStale) {
		return
	}
	for _, id := range p.Missing {
		fmt.Fprintf(w, "new since the plan: %s\n", oneLine(id))
	}
}

func writePlan(w io.Writer, p api.Plan, verb string, planOnly bool) {
	fmt.Fprintf(w,
		"%s would hit %d chains, %d delegations and %d grants, %d of them handed out and %d of these live now\n",
		p.Selector, p.Chains, p.Delegations, p.Grants, p.Issued, p.Live)
	for _, part := range []struct {
		title  string
		counts map[string]int
	}{{"by tool", p.ByTool}, {"by backend", p.ByBackend}, {"by narrowing", p.ByNarrowing}, {"by caller", p.ByCaller}} {
		for _, name := range sortedKeys(part.counts) {
			fmt.Fprintf(w, "  %s\t%s\t%d\n", part.title, name, part.counts[name])
		}
	}
	for _, t := range p.Tasks {
		fmt.Fprintf(w, "  breaks\t%s\t%s\t%d grants, %d delegations%s\n", t.Chain, oneLine(t.Task), t.Grants, t.Delegations,
			signedTask(t))
	}
	if p.TasksMore > 0 {
		fmt.Fprintf(w, "  breaks\t%d more\n", p.TasksMore)
	}
	if p.Later > 0 {
		fmt.Fprintf(w, "it may also match later steps of %d other delegations\n", p.Later)
	}
	if p.Static > 0 {
		fmt.Fprintf(w, "%d static secrets can only be rotated\n", p.Static)
	}
	if !p.LatestEnd.IsZero() {
		fmt.Fprintf(w, "without a revocation the last of them expires at %s\n", p.LatestEnd.UTC().Format(time.RFC3339))
	}
	fmt.Fprintf(w, "plan %s\n", p.Plan)
	if !planOnly {
		fmt.Fprintf(w, "nothing was changed; to do it: pawl %s '%s' --yes --reason … --from-plan %s\n",
			verb, p.Selector, p.Plan)
	}
}

func sortedKeys(m map[string]int) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func stateWord(r api.Revocation) string {
	switch {
	case r.Lifted:
		return "LIFTED"
	case r.Freeze:
		return "FROZEN"
	}
	return r.Closure
}

func writeRevocation(w io.Writer, r api.Revocation) { fmt.Fprintln(w, revocationLine(r)) }

// revocationLine keeps fenced and dead apart. Fenced: no secret is handed out from then on. Dead: the backend
// proved it.
func revocationLine(r api.Revocation) string {
	var note string
	if r.CoversNothing {
		note = "; it matched nothing when it was written, and applies to later requests"
	}
	if r.Tokens > 0 {
		note += fmt.Sprintf("; delegation tokens not confirmed revoked: %d", r.Tokens)
	}
	if r.Leases > 0 {
		note += fmt.Sprintf("; leases still being removed: %d", r.Leases)
	}
	if r.Unswept {
		note += "; the sweep for the secrets of unfinished mints is not complete"
	}
	if r.Repeated {
		note += "; it existed already"
	}
	if r.LiftedAlone != "" {
		note += "; lifted by one person: " + oneLine(r.LiftedAlone)
	}
	if r.Freeze {
		return fmt.Sprintf("%s  %s at %s  %s%s", r.ID, strings.ToLower(stateWord(r)),
			r.Fenced.UTC().Format(time.RFC3339), r.Selector, note)
	}
	if r.Uncounted {
		return fmt.Sprintf("%s  fenced at %s  %s: its grants are not counted yet%s", r.ID,
			r.Fenced.UTC().Format(time.RFC3339Nano), r.Closure, note)
	}
	line := fmt.Sprintf("%s  fenced at %s  %s: %d of %d dead, %d alive, %d unknown",
		r.ID, r.Fenced.UTC().Format(time.RFC3339Nano), r.Closure, r.Dead, r.Grants, r.Alive, r.Unknown)
	if r.Static > 0 {
		line += fmt.Sprintf(", %d to be rotated", r.Static)
	}
	switch end := r.LatestEnd.UTC().Format(time.RFC3339); {
	case r.LatestEnd.IsZero():
	case r.Static > 0:
		line += "; the others expire by " + end
	default:
		line += "; the rest expires by " + end
	}
	return line + note
}

// waitLines lists the grants for which a revocation waits, and until when. It is empty as long as more are left than
// the broker names.
func waitLines(r api.Revocation) (lines string) {
	if r.Waiting == nil || len(r.Waiting.Grants) < r.Alive-r.Static+r.Unknown {
		return ""
	}
	for _, g := range r.Waiting.Grants {
		lines += fmt.Sprintf("  waits for %s (%s at %s) until %s: %s\n", g.Grant, g.Tool, g.Backend,
			g.Until.UTC().Format(time.RFC3339), g.Why)
	}
	return lines
}

// ackLine lists which agents acknowledged a revocation. It is independent of the closure.
func ackLine(a *api.Acknowledged) string {
	line := fmt.Sprintf("%d of %d agents acknowledged", a.Done, a.Agents)
	const maxListed = 5
	for i, s := range a.Silent {
		switch {
		case i == maxListed:
			return line + fmt.Sprintf(", and %d more", a.Agents-a.Done-maxListed)
		case i == 0:
			line += "; not yet: "
		default:
			line += ", "
		}
		line += s.Holder + " (" + s.Delegation + ")"
	}
	return line
}

// follow prints the progress of a revocation until it is settled: in a terminal one line that is rewritten, in a
// pipe a line for each change. A settled revocation that is not CLOSED is an error.
func follow(cmd *cobra.Command, c *operator.Client, f *operatorFlags, id string) error {
	out := cmd.OutOrStdout()
	again, end := "", "" // in a terminal: back to the start of the line, and a line feed at the end
	if term.IsTerminal(int(os.Stdout.Fd())) && out == os.Stdout && !f.json {
		again, end = "\r\x1b[K", "\n"
	}
	var last api.Revocation
	var waits string // as last printed
	err := c.Follow(cmd.Context(), id, func(r api.Revocation) error {
		last = r
		if f.json {
			return json.NewEncoder(out).Encode(r)
		}
		line := revocationLine(r)
		if again == "" {
			line += "\n"
			if now := waitLines(r); now != waits {
				waits = now
				line += now
			}
		} else if waitLines(r) != "" {
			line += "; waits for " + r.Waiting.Grants[0].Grant
			if more := len(r.Waiting.Grants) - 1; more > 0 {
				line += fmt.Sprintf(" and %d more", more)
			}
		}
		_, err := fmt.Fprint(out, again, line)
		return err
	})
	fmt.Fprint(out, end)
	if err != nil {
		return hinted{err, "the broker continues the revocation: pawl revoke watch " + id}
	}
	if now, err := c.Revocation(cmd.Context(), id); err == nil && now.Acknowledged != nil && !f.json {
		fmt.Fprintln(out, ackLine(now.Acknowledged)) // the state of this moment: the closure does not wait for agents
	}
	if last.Closure != "CLOSED" {
		return hinted{fmt.Errorf("%s is settled as %s: %d secrets can only be rotated", id, last.Closure, last.Static),
			"rotate them where they are stored"}
	}
	return nil
}

// signedTask is the end of a planned task's line: the statements of its envelope.
func signedTask(t api.PlannedTask) (text string) {
	if t.SignedTask != "" {
		text += ", signed task " + oneLine(t.SignedTask)
	}
	if t.OnBehalfOf != "" {
		text += ", on behalf of " + oneLine(t.OnBehalfOf)
	}
	return text
}
