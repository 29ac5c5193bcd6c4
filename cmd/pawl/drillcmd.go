package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/cmd/drill"
)

func drillCommand() *cobra.Command {
	var c drill.Config
	cmd := &cobra.Command{
		Use: "drill", Short: "Rehearse an incident on real parts of its own, and measure it", Args: cobra.NoArgs,
		Long: "Rehearse an incident in an environment of its own: agents hold live secrets under a tree of\n" +
			"delegations, one of them breaks policy, and probes that do not ask the broker see when each secret\n" +
			"is dead. Prints the measured times, and writes a chart (SVG) and the figures (JSON). Fails when\n" +
			"anything is left alive or unproven. It touches no broker, Vault or database of yours.",
		Example: "  pawl drill\n  pawl drill --secrets 500 --svg drill.svg --figures drill.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.Secrets < 1 || c.Secrets > drill.MostSecrets {
				return misuse{hinted{errors.New("--secrets is out of range"), fmt.Sprintf("a drill takes at most %d", drill.MostSecrets)}}
			}
			c.Out, c.Progress = cmd.OutOrStdout(), cmd.ErrOrStderr()
			if _, err := drill.Run(cmd.Context(), c); err != nil {
				return err
			}
			for _, path := range []string{c.SVG, c.JSON} {
				if path != "" {
					fmt.Fprintf(cmd.ErrOrStderr(), "pawl: wrote %s\n", path)
				}
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&c.Secrets, "secrets", 100, "how many are live when policy is broken")
	flags.StringVar(&c.SVG, "svg", "build/drill/drill.svg", "file of the chart; empty: none")
	flags.StringVar(&c.JSON, "figures", "build/drill/drill.json", "file of the figures; empty: none")
	flags.BoolVar(&c.NoPostgres, "no-postgres", false, "drill as on a machine without PostgreSQL")
	return cmd
}
