package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	_ "embed"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/demo"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

//go:embed pawl.example.yaml
var exampleConfig string

func serverCommand() *cobra.Command {
	var file string
	var example, check bool
	var rollback int64
	c := &cobra.Command{
		Use: "server --config FILE", Short: "Serve agents and operators, by a configuration file", Args: cobra.NoArgs,
		Long: "Serve agents and operators. A signal HUP reads the policy bundle again; one that is not newer,\n" +
			"not signed, or whose tools the backends do not take leaves the running one in force. TERM and\n" +
			"INT end the server; what was under way is in the ledger, and the next start goes on with it.\n" +
			"The ledger remembers which bundle was in force last and refuses an older one at the start, unless\n" +
			"--allow-policy-rollback names its version; the audit log has who started it so.",
		Example: "  pawl server --example > pawl.yaml\n  pawl server --config pawl.yaml --check\n  pawl server --config pawl.yaml\n" +
			"  pawl server --config pawl.yaml --allow-policy-rollback 3",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if example {
				fmt.Fprint(cmd.OutOrStdout(), exampleConfig)
				return nil
			}
			if file == "" {
				return misuse{hinted{fmt.Errorf("--config is required"), "pawl server --example prints one to start from"}}
			}
			config, err := wire.ReadConfig(file)
			if err != nil {
				return hinted{err, "docs/configuration.md explains each key"}
			}
			if check {
				return checkConfig(cmd, config)
			}
			return serve(cmd.Context(), config, rollback)
		},
	}
	c.Flags().StringVar(&file, "config", "", "configuration file")
	c.Flags().BoolVar(&example, "example", false, "print a commented configuration and exit")
	c.Flags().Int64Var(&rollback, "allow-policy-rollback", 0, "version of the policy bundle that may follow a newer one, this once")
	c.Flags().BoolVar(&check, "check", false, "check configuration and policy bundle and exit")
	return c
}

func checkConfig(cmd *cobra.Command, c wire.Config) error {
	p, err := wire.CheckPolicy(c)
	if err != nil {
		return err
	}
	if _, err := wire.LoadSigner(c); err != nil {
		return err
	}
	if _, err := wire.LoadTransmitters(c); err != nil {
		return err
	}
	if err := wire.CheckSubscribers(c); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "configuration and policy bundle are good: %d tools, bundle %s\n",
		len(p.Tools()), p.Digest())
	for _, w := range p.Warnings() {
		fmt.Fprintf(cmd.ErrOrStderr(), "pawl: warning: %s\n", w)
	}
	return nil
}

func serve(ctx context.Context, c wire.Config, rollback int64) error {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	s, err := wire.StartRolledBack(ctx, c, log, rollback)
	var refused *broker.Error
	if errors.As(err, &refused) && refused.Code == broker.CodePolicyOlder {
		return hinted{err, refused.Remedy}
	}
	if err != nil {
		return err
	}
	defer s.Close()
	log.Info("serving", "agents", s.Agents().String(), "socket", c.Listen.Socket, "version", version())
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	for {
		select {
		case <-ctx.Done():
			log.Info("stopping")
			return nil
		case err := <-s.Failed():
			return err
		case <-reload:
			if p, err := s.ReloadPolicy(ctx, c); err != nil {
				log.Error("the policy bundle on disk is refused; the running one stays", "error", err, "bundle", s.Policy.Current().Digest())
			} else {
				log.Info("policy bundle in force", "bundle", p.Digest())
			}
		}
	}
}

func devCommand() *cobra.Command {
	var envFile string
	var noPostgres bool
	c := &cobra.Command{
		Use: "dev", Short: "Run everything on this machine: identities, Vault, PostgreSQL if there is one, the broker", Args: cobra.NoArgs,
		Long: "Run a SPIFFE Workload API, a real Vault, a real PostgreSQL where it is installed, and the broker,\n" +
			"until interrupted. Everything is in a temporary directory and gone afterwards. The environment\n" +
			"for the other commands is written to a file for the shell.",
		Example: "  pawl dev --env dev.env &\n  . ./dev.env\n  pawl step --tool tls.call --arg name=a.agents.pawl.dev -- env",
		RunE: func(cmd *cobra.Command, _ []string) error {
			env, err := dev.Start(cmd.Context(), dev.Config{Progress: cmd.ErrOrStderr(), NoPostgres: noPostgres})
			if err != nil {
				return err
			}
			defer env.Close()
			text, err := shellEnv(env)
			if err != nil {
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), text)
			if envFile != "" {
				if err := os.WriteFile(envFile, []byte(text), 0o600); err != nil {
					return err
				}
				defer os.Remove(envFile) //nolint:errcheck // it names what is gone now
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "pawl: ready; interrupt to end")
			select {
			case <-cmd.Context().Done():
				return nil
			case err := <-env.Broker.Failed():
				return err
			}
		},
	}
	c.Flags().StringVar(&envFile, "env", "", "file for the shell to read: addresses and the identity of an agent")
	c.Flags().BoolVar(&noPostgres, "no-postgres", false, "leave PostgreSQL out")
	return c
}

func shellEnv(env *dev.Env) (string, error) {
	planner, err := env.Identities.Socket(dev.Agent("planner"))
	if err != nil {
		return "", err
	}
	writer, err := env.Identities.Socket(dev.Agent("writer"))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("export PAWL_ADDRESS=https://%s\nexport PAWL_SERVER_ID=%s\nexport PAWL_SOCKET=%s\nexport SPIFFE_ENDPOINT_SOCKET=%s # %s\n# the other agent, %s: SPIFFE_ENDPOINT_SOCKET=%s\n",
		env.Broker.Agents(), dev.BrokerID, env.Config.Listen.Socket, planner, dev.Agent("planner"), dev.Agent("writer"), writer), nil
}

func demoCommand() *cobra.Command {
	var path string
	var noPostgres bool
	c := &cobra.Command{
		Use: "demo", Short: "Play the main job on real parts and print a timeline", Args: cobra.NoArgs,
		Long: "Play the main job on real parts, in half a minute, and leave nothing running: one secret for one\n" +
			"step, a delegation that is narrower, and a chain that is stopped when one agent breaks policy.",
		Example: "  pawl demo",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo.Run(cmd.Context(), demo.Config{Out: cmd.OutOrStdout(), Progress: cmd.ErrOrStderr(), JSON: path, NoPostgres: noPostgres})
		},
	}
	c.Flags().StringVar(&path, "timeline", "build/demo/timeline.json", "file of the timeline as JSON")
	c.Flags().BoolVar(&noPostgres, "no-postgres", false, "play as on a machine without PostgreSQL")
	return c
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs, Long: "Print the version and what it was built with.", Example: "  pawl version",
		RunE: func(cmd *cobra.Command, _ []string) error {
			fmt.Fprintln(cmd.OutOrStdout(), "pawl", version())
			return nil
		},
	}
}

// version is the module's version, or the commit it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v + " " + info.GoVersion
	}
	return "devel " + info.GoVersion
}
