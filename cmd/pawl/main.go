// Command pawl runs the credential broker for agent workloads, and has the tools for it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/cmd/wire"
)

func main() {
	wire.PaceCollector()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := command().ExecuteContext(ctx)
	stop()
	os.Exit(report(err))
}

const usage = `Pawl gives an agent one secret for one step with one tool, and stops a whole chain of
delegations at once.

To try it:
  pawl dev               run everything on this machine: identities, Vault, the broker
  pawl demo              play the main scenario on real parts, in half a minute

To run it:
  pawl server            run the broker with a configuration file
  pawl policy            make keys; build, sign, verify, test and compare policy bundles
  pawl vault             print the setup that Vault and the targets need
  pawl shapes            list agents' rights in a PostgreSQL database, for its DBA
  pawl doctor            check everything a broker needs, and print a hint for each fault

For agents:
  pawl step              take one step and run a command with its secret
  pawl explain           explain why policy grants or refuses a request

For responders:
  pawl chain             list the live chains, and show one with its grants
  pawl revoke            revoke for good, and report which secrets are proven dead
  pawl leaked            print the selector of a leaked value
  pawl canary            plant decoy values that only a thief presents
  pawl freeze            stop new secrets for now; pawl unfreeze lifts it
  pawl audit             print the audit log, and verify that it is complete
  pawl report            print the signed report of a revocation
  pawl drill             rehearse an incident in its own environment, and measure it

An error has a line with the cause, and often a hint. Exit status: 0, 1 failed, 2 misused.
Every command has --help, with an example. pawl completion SHELL prints a completion script, and
pawl version the version.
`

func command() *cobra.Command {
	root := &cobra.Command{
		Use: "pawl", Long: strings.TrimSpace(usage), SilenceErrors: true, SilenceUsage: true,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return misuse{hinted{fmt.Errorf("there is no command %q", args[0]), "pawl --help lists them"}}
			}
			fmt.Fprint(cmd.OutOrStdout(), usage)
			return nil
		},
	}
	root.SetHelpTemplate(helpTemplate)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return misuse{hinted{err, cmd.CommandPath() + " --help shows the flags"}}
	})
	root.AddCommand(serverCommand(), devCommand(), demoCommand(), versionCommand(), policyCommand(), vaultCommand(),
		stepCommand(), chainCommand(), revokeCommand(), leakedCommand(), canaryCommand(), freezeCommand(),
		unfreezeCommand(), auditCommand(), reportCommand(), explainCommand(), drillCommand(), doctorCommand(),
		shapesCommand())
	for _, c := range root.Commands() {
		checkUsage(c)
	}
	return root
}

// helpTemplate prints the long text, the usage, the subcommands, the example and the flags.
const helpTemplate = `{{with (or .Long .Short)}}{{. | trimTrailingWhitespaces}}{{end}}
{{if .Runnable}}
Usage:
  {{.UseLine}}
{{end}}{{if .HasAvailableSubCommands}}{{if .HasParent}}
Commands:{{range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}
{{end}}{{end}}{{if .HasExample}}
Example:
{{.Example}}
{{end}}{{if .HasAvailableLocalFlags}}
Flags:
{{.LocalFlags.FlagUsages}}{{end}}{{if .HasAvailableInheritedFlags}}{{.InheritedFlags.FlagUsages}}{{end}}`

// checkUsage turns a wrong number of arguments and an unknown subcommand into a misuse, for c and every command
// below it.
func checkUsage(c *cobra.Command) {
	if c.HasSubCommands() && !c.Runnable() {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return misuse{hinted{fmt.Errorf("there is no command %q below %s", args[0], cmd.CommandPath()),
					cmd.CommandPath() + " --help lists them"}}
			}
			return cmd.Help()
		}
	}
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return misuse{hinted{err, cmd.CommandPath() + " --help shows its usage"}}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		checkUsage(sub)
	}
}
