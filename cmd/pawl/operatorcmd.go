package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/operator"
)

// operatorFlags select the broker and the operator's way of authentication.
type operatorFlags struct {
	socket, address, serverID, id string
	json                          bool
}

func (f *operatorFlags) add(c *cobra.Command) {
	flags := c.PersistentFlags()
	flags.StringVar(&f.socket, "socket", os.Getenv("PAWL_SOCKET"), "the broker's local socket ($PAWL_SOCKET)")
	flags.StringVar(&f.address, "operators", os.Getenv("PAWL_OPERATORS"),
		"or the operators' listener, https://host:port, with this process's SVID ($PAWL_OPERATORS)")
	flags.StringVar(&f.serverID, "server-id", os.Getenv("PAWL_SERVER_ID"),
		"the broker's SPIFFE ID; required with --operators ($PAWL_SERVER_ID)")
	flags.StringVar(&f.id, "id", os.Getenv("PAWL_ID"),
		"with --operators: which of several SVIDs is the operator's own, its SPIFFE ID or the hint of its entry ($PAWL_ID)")
	flags.BoolVar(&f.json, "json", false, "print JSON")
}

// client connects to the local socket, or with --operators over TLS.
func (f *operatorFlags) client(ctx context.Context) (*operator.Client, error) {
	if f.address == "" {
		if f.socket == "" {
			return nil, misuse{hinted{errors.New("--socket or --operators is needed"),
				"the socket's path is listen.socket in the broker's configuration"}}
		}
		return operator.New(operator.Config{Address: "unix:" + f.socket})
	}
	id, err := spiffeid.FromString(f.serverID)
	if err != nil {
		return nil, misuse{hinted{errors.New("--server-id is needed with --operators"), "it is the broker's SPIFFE ID"}}
	}
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	own, err := client.ParseIdentity(f.id)
	if err != nil {
		return nil, misuse{fmt.Errorf("--id: %w", err)}
	}
	source, err := client.OpenIdentity(wait, own, "choose with --id or PAWL_ID")
	if errors.Is(err, client.ErrIdentity) {
		return nil, err
	}
	if err != nil {
		return nil, hinted{fmt.Errorf("fetching this process's SVID from the Workload API: %w", err),
			"set SPIFFE_ENDPOINT_SOCKET, or use --socket on the broker's machine"}
	}
	return operator.New(operator.Config{Address: f.address, Source: source, ServerID: id})
}

// run makes a command's RunE that calls do with a client and closes the client afterwards.
func (f *operatorFlags) run(
	do func(cmd *cobra.Command, c *operator.Client, args []string) error,
) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := f.client(cmd.Context())
		if err != nil {
			return err
		}
		defer c.Close()
		return do(cmd, c, args)
	}
}

// show prints v as JSON with --json, and the output of text otherwise.
func (f *operatorFlags) show(cmd *cobra.Command, v any, text func(w io.Writer)) error {
	if f.json {
		enc := json.NewEncoder(cmd.OutOrStdout())
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 4, 2, ' ', 0)
	text(w)
	return w.Flush()
}

// listing prints the pages of a list as they come.
type listing[T any] struct {
	read   func(after string, limit int) (list []T, next string, err error)
	header string
	row    func(w io.Writer, item T)
	limit  int // the most items; zero: all
}

func (l *listing[T]) addLimit(c *cobra.Command) {
	c.Flags().IntVar(&l.limit, "limit", 0, "print at most so many; 0: all")
}

// pageSize is how many items of a list are asked for at once.
const pageSize = 500

func (l *listing[T]) print(cmd *cobra.Command, f *operatorFlags) error {
	out := cmd.OutOrStdout()
	printed := 0
	for after := ""; ; {
		size := pageSize
		if l.limit > 0 {
			size = min(size, l.limit-printed)
		}
		list, next, err := l.read(after, size)
		if err != nil {
			return err
		}
		if f.json {
			err = writeElements(out, list, printed == 0)
		} else {
			w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
			if printed == 0 && l.header != "" {
				fmt.Fprintln(w, l.header)
			}
			for _, item := range list {
				l.row(w, item)
			}
			err = w.Flush()
		}
		if err != nil {
			return err
		}
		printed, after = printed+len(list), next
		if next == "" || l.limit > 0 && printed >= l.limit {
			break
		}
	}
	if f.json {
		_, err := fmt.Fprint(out, map[bool]string{true: "[]\n", false: "\n]\n"}[printed == 0])
		return err
	}
	return nil
}

// writeElements writes a part of an array in JSON, without its end.
func writeElements[T any](out io.Writer, list []T, first bool) error {
	for _, item := range list {
		text, err := json.MarshalIndent(item, "  ", "  ")
		if err != nil {
			return err
		}
		begin := map[bool]string{true: "[\n  ", false: ",\n  "}[first]
		if _, err := fmt.Fprintf(out, "%s%s", begin, text); err != nil {
			return err
		}
		first = false
	}
	return nil
}

func chainCommand() *cobra.Command {
	var f operatorFlags
	var all bool
	c := &cobra.Command{Use: "chain", Short: "List the live chains, and show one",
		Long:    "List and show chains. A chain is one task's tree of delegations.",
		Example: "  pawl chain list\n  pawl chain show ch0123456789abcdefghjkmnpq"}
	f.add(c)
	l := listing[api.ChainSummary]{header: "CHAIN\tSTATE\tLIVE\tSTEPS\tDELEGATIONS\tOPENED\tOPENER\tTASK",
		row: func(w io.Writer, s api.ChainSummary) {
			fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s\n",
				s.Chain.ID, fenceWord(s.Fence), s.Live, s.Steps, s.Delegations,
				s.Chain.Opened.UTC().Format(time.RFC3339), s.Chain.Opener, oneLine(s.Chain.Task))
		}}
	list := &cobra.Command{
		Use: "list", Short: "List the live chains", Args: cobra.NoArgs,
		Long:    "List the live chains, latest first: those that agents can still use, and those with live grants.",
		Example: "  pawl chain list\n  pawl chain list --limit 20\n  pawl chain list --all --json",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, _ []string) error {
			l.read = func(after string, limit int) ([]api.ChainSummary, string, error) {
				p, err := c.ChainPage(cmd.Context(), all, after, limit)
				return p.Chains, p.Next, err
			}
			return l.print(cmd, &f)
		}),
	}
	list.Flags().BoolVar(&all, "all", false, "list ended chains too")
	l.addLimit(list)
	show := &cobra.Command{
		Use: "show CHAIN", Short: "Show one chain's delegations and grants", Args: cobra.ExactArgs(1),
		Long: "Show one chain: its delegations with their holders, and every grant with its state, its arguments and the\n" +
			"first digits of their SHA-256. The whole digest is in --json, and in pawl_args: a claim of a jwt, and\n" +
			"metadata of a token.",
		Example: "  pawl chain show ch0123456789abcdefghjkmnpq",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, args []string) error {
			v, err := c.Chain(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return f.show(cmd, v, func(w io.Writer) { writeChain(w, v) })
		}),
	}
	c.AddCommand(list, show)
	return c
}

func fenceWord(f *api.Fence) string {
	switch {
	case f == nil:
		return "open"
	case f.Frozen:
		return "frozen"
	}
	return "fenced"
}

// writeChain draws the tree, and under each delegation its grants.
func writeChain(w io.Writer, v api.ChainView) {
	fmt.Fprintf(w, "%s  %s, opened by %s\n", v.Chain.ID, oneLine(v.Chain.Task), v.Chain.Opener)
	if e := v.Chain.Envelope; e != nil {
		fmt.Fprintf(w, "  envelope %s of %s: task %s, on behalf of %s\n", oneLine(e.ID), oneLine(e.Issuer),
			cmp.Or(oneLine(e.Task), "(none)"), cmp.Or(oneLine(e.OnBehalfOf), "(none)"))
	}
	children := map[string][]api.Delegation{}
	for _, d := range v.Delegations {
		children[d.Parent] = append(children[d.Parent], d)
	}
	grants := map[string][]api.GrantRecord{}
	for _, g := range v.Grants {
		grants[g.Delegation] = append(grants[g.Delegation], g)
	}
	var draw func(parent, indent string)
	draw = func(parent, indent string) {
		for _, d := range children[parent] {
			fmt.Fprintf(w, "%s%s  %s  %s until %s\n",
				indent, d.ID, d.Holder, fenceWord(d.Fence), d.Expires.UTC().Format(time.RFC3339))
			for _, g := range grants[d.ID] {
				fmt.Fprintf(w, "%s    %s  %s  %s %s  %s  %.12s\n",
					indent, g.ID, g.Tool, g.State, g.Outcome, g.Args, g.ArgsDigest)
				for _, e := range g.Evidence { // why a grant that is being ended is not closed yet
					if g.State != "CLOSED" && e.Outcome != "dead" {
						fmt.Fprintf(w, "%s      %s: %s\n", indent, e.Check, oneLine(e.Answer))
					}
				}
			}
			draw(d.ID, indent+"  ")
		}
	}
	draw("", "  ")
}

func auditCommand() *cobra.Command {
	var f operatorFlags
	var chain string
	var after uint64
	l := listing[api.Entry]{row: writeEntry}
	c := &cobra.Command{
		Use: "audit", Short: "Print the audit log", Args: cobra.NoArgs,
		Long:    "Print the audit log, oldest first. Every change of the ledger has an entry.",
		Example: "  pawl audit\n  pawl audit --chain ch0123456789abcdefghjkmnpq --json",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, _ []string) error {
			l.read = func(from string, limit int) ([]api.Entry, string, error) {
				if from != "" {
					after, _ = strconv.ParseUint(from, 10, 64) // as formatted below
				}
				read := c.Audit
				if chain != "" {
					read = func(ctx context.Context, after uint64, limit int) (api.Entries, error) {
						return c.ChainAudit(ctx, chain, after, limit)
					}
				}
				page, err := read(cmd.Context(), after, limit)
				if len(page.Entries) == 0 {
					return nil, "", err
				}
				return page.Entries, strconv.FormatUint(page.Next, 10), err
			}
			return l.print(cmd, &f)
		}),
	}
	l.addLimit(c)
	f.add(c)
	c.Flags().StringVar(&chain, "chain", "", "print only the entries of this chain")
	c.Flags().Uint64Var(&after, "after", 0, "print only the entries after this revision")
	c.AddCommand(auditVerifyCommand(&f))
	return c
}

func writeEntry(w io.Writer, e api.Entry) {
	fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Revision, e.At.UTC().Format("2006-01-02T15:04:05.000Z"),
		e.Op, e.Actor, firstOf(e.Grant, e.Delegation, e.Chain, e.Revocation), e.Tool, e.Code, oneLine(e.Detail))
}

func firstOf(ids ...string) string {
	for _, id := range ids {
		if id != "" {
			return id
		}
	}
	return ""
}
