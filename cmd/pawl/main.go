// Command pawl is the credential broker for agent workloads, and the tools around it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/wire"
)

func main() {
	wire.PaceCollector()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	os.Exit(report(err))
}

// misuse is an error of whoever typed the command.
type misuse struct{ err error }

func (m misuse) Error() string { return m.err.Error() }
func (m misuse) Unwrap() error { return m.err }

// hinted is an error with what to do about it.
type hinted struct {
	err  error
	hint string
}

func (h hinted) Error() string { return h.err.Error() }
func (h hinted) Unwrap() error { return h.err }

// report prints an error for people and gives the exit status: 0, 1 failed, 2 misused, or that of
// the command that a step ran.
func report(err error) int {
	if err == nil {
		return 0
	}
	// The command that a step ran has said what it had to say.
	if ran, ok := err.(*exec.ExitError); ok && ran.ExitCode() > 0 { //nolint:errorlint // wrapped, it is part of a longer story
		return ran.ExitCode()
	}
	fmt.Fprintf(os.Stderr, "pawl: error: %s\n", oneLine(err.Error()))
	var h hinted
	var p *api.Problem
	switch {
	case errors.As(err, &h):
		fmt.Fprintf(os.Stderr, "pawl: hint: %s\n", h.hint)
	case errors.As(err, &p) && p.Remedy != "":
		fmt.Fprintf(os.Stderr, "pawl: hint: %s\n", oneLine(p.Remedy))
	}
	var m misuse
	if errors.As(err, &m) {
		return 2
	}
	return 1
}

// oneLine keeps what a server said from drawing on the terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

const usage = `Pawl gives an agent one secret for one step with one tool, and stops a whole chain of
delegations at once.

To try it:
  pawl dev               everything on this machine: identities, Vault, the broker
  pawl demo              the main job played on real parts, in half a minute

To run it:
  pawl server            serve, by a configuration file
  pawl policy            make keys; build, sign, verify, test and compare policy bundles
  pawl vault             what Vault must be taught
  pawl doctor            what is wrong, and what to do about it

For agents:
  pawl step              take one step and run a command with its secret
  pawl explain           why something is allowed or not

For responders:
  pawl chain             what is alive
  pawl revoke            stop it, and be told the truth about what is dead
  pawl leaked            the selector of a value that was found where it must not be
  pawl canary            values that only a thief presents
  pawl freeze            stop it for now; pawl unfreeze lifts it
  pawl audit             what happened, and whether the log is whole
  pawl report            what a revocation came to, signed
  pawl drill             rehearse it on real parts of its own, and measure

Errors say what happened, and then what to do. Exit status: 0, 1 failed, 2 misused.
Every command has --help, with an example. pawl completion SHELL and pawl version do what they say.
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
	root.SetHelpTemplate("{{with (or .Long .Short)}}{{. | trimTrailingWhitespaces}}{{end}}\n{{if .Runnable}}\nUsage:\n  {{.UseLine}}\n{{end}}{{if .HasAvailableSubCommands}}{{if .HasParent}}\nCommands:{{range .Commands}}{{if .IsAvailableCommand}}\n  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}\n{{end}}{{end}}{{if .HasExample}}\nExample:\n{{.Example}}\n{{end}}{{if .HasAvailableLocalFlags}}\nFlags:\n{{.LocalFlags.FlagUsages}}{{end}}{{if .HasAvailableInheritedFlags}}{{.InheritedFlags.FlagUsages}}{{end}}")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return misuse{hinted{err, cmd.CommandPath() + " --help shows the flags"}}
	})
	root.AddCommand(serverCommand(), devCommand(), demoCommand(), versionCommand(), policyCommand(), vaultCommand(),
		stepCommand(), chainCommand(), revokeCommand(), leakedCommand(), canaryCommand(), freezeCommand(), unfreezeCommand(), auditCommand(), reportCommand(), explainCommand(), drillCommand(), doctorCommand())
	for _, c := range root.Commands() {
		mend(c)
	}
	return root
}

// required makes a misuse of flags that were not given.
func required(cmd *cobra.Command, flags ...string) error {
	var missing []string
	for _, name := range flags {
		if f := cmd.Flag(name); f == nil || f.Value.String() == "" {
			missing = append(missing, "--"+name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return misuse{hinted{fmt.Errorf("%s needs %s", cmd.CommandPath(), strings.Join(missing, " and ")), cmd.CommandPath() + " --help shows an example"}}
}

// mend makes wrong numbers of arguments, and commands that a group does not have, a misuse, for
// every command below c too.
func mend(c *cobra.Command) {
	if c.HasSubCommands() && !c.Runnable() {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return misuse{hinted{fmt.Errorf("there is no command %q below %s", args[0], cmd.CommandPath()), cmd.CommandPath() + " --help lists them"}}
			}
			return cmd.Help()
		}
	}
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return misuse{hinted{err, cmd.CommandPath() + " --help shows how it is used"}}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		mend(sub)
	}
}
