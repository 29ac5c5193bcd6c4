package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
)

func canaryCommand() *cobra.Command {
	var f operatorFlags
	var in api.PlantRequest
	c := &cobra.Command{Use: "canary", Short: "Plant decoy values that only a thief presents",
		Long: "Plant values that give access to nothing, in places that no workload should read: only a thief presents\n" +
			"one. That is the violation canary of the chain it was planted in. Its consequence is revoke-chain, unless\n" +
			"violations.yaml has another. A canary without a chain raises an alarm and adds an audit entry.",
		Example: "  pawl canary plant --chain ch0123456789abcdefghjkmnpq --note 'the planner home' > .vault-token\n" +
			"  pawl canary list"}
	f.add(c)
	plant := &cobra.Command{
		Use: "plant", Short: "Make a canary, and print its value once", Args: cobra.NoArgs,
		Long: "Make a canary. Its value goes to standard output and is stored nowhere: the broker keeps a digest. The\n" +
			"broker notices the value in a token introspection and in pawl revoke --leaked.",
		Example: "  pawl canary plant --chain ch0123456789abcdefghjkmnpq --note 'the planner home' > .vault-token\n" +
			"  pawl canary plant --like github",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, _ []string) error {
			p, err := c.Plant(cmd.Context(), in)
			if err != nil {
				return err
			}
			if err := f.show(cmd, p, func(w io.Writer) { fmt.Fprintln(w, p.Value) }); err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "%s is planted; its value is not shown again\n", p.Canary.ID)
			return nil
		}),
	}
	plant.Flags().StringVar(&in.Chain, "chain", "", "the `chain` that the violation belongs to; empty: nothing is revoked")
	plant.Flags().StringVar(&in.Note, "note", "", "the place of the canary, for the list and the audit")
	plant.Flags().StringVar(&in.Like, "like", "vault",
		"form of the value: vault (a service token) or github (a personal access token)")
	l := listing[api.Canary]{header: "CANARY\tCHAIN\tPLANTED\tTOUCHED\tTIMES\tBY\tNOTE",
		row: func(w io.Writer, k api.Canary) {
			touched, chain := "never", "-"
			if !k.Touched.IsZero() {
				touched = k.Touched.UTC().Format(time.RFC3339)
			}
			if k.Chain != "" {
				chain = k.Chain
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", k.ID, chain, k.Planted.UTC().Format(time.RFC3339),
				touched, k.Touches, k.By, oneLine(k.Note))
		}}
	list := &cobra.Command{
		Use: "list", Short: "List the canaries, and when they were touched", Args: cobra.NoArgs,
		Long: "List the canaries, latest first.", Example: "  pawl canary list",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, _ []string) error {
			l.read = func(after string, limit int) ([]api.Canary, string, error) {
				p, err := c.CanaryPage(cmd.Context(), after, limit)
				return p.Canaries, p.Next, err
			}
			return l.print(cmd, &f)
		}),
	}
	l.addLimit(list)
	pull := &cobra.Command{
		Use: "pull CANARY", Short: "Remove a canary", Args: cobra.ExactArgs(1),
		Long:    "Remove a canary. Its value is then like any unknown value.",
		Example: "  pawl canary pull cn0123456789abcdefghjkmnpq",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, args []string) error {
			k, err := c.Pull(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return f.show(cmd, k, func(w io.Writer) { fmt.Fprintf(w, "%s is pulled\n", k.ID) })
		}),
	}
	c.AddCommand(plant, list, pull)
	return c
}
