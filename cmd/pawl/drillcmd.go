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
		Use: "drill", Short: "Rehearse an incident in its own environment, and measure it", Args: cobra.NoArgs,
		Long: "Rehearse an incident on real parts in an environment of its own. Agents hold live secrets under a tree\n" +
			"of delegations and one agent breaks policy. Probes that are independent of the broker measure when each\n" +
			"secret is dead. Prints the measured times, and writes a chart (SVG) and the figures (JSON). Fails if a\n" +
			"secret is still alive or not proven dead. It touches no broker, Vault or database of yours.",
		Example: "  pawl drill\n  pawl drill --secrets 500 --svg drill.svg --figures drill.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.Secrets < 1 || c.Secrets > drill.MaxSecrets {
				return misuse{hinted{errors.New("--secrets is out of range"),
					fmt.Sprintf("a drill takes at most %d", drill.MaxSecrets)}}
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
	flags.IntVar(&c.Secrets, "secrets", 100, "number of live secrets when the agent breaks policy")
	flags.StringVar(&c.SVG, "svg", "build/drill/drill.svg", "file to write the chart to; empty: none")
	flags.StringVar(&c.JSON, "figures", "build/drill/drill.json", "file to write the figures to; empty: none")
	flags.BoolVar(&c.NoPostgres, "no-postgres", false, "drill without PostgreSQL, even if it is installed")
	return cmd
}
