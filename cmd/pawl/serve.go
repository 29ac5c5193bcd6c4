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
	"time"

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
		Use: "server --config FILE", Short: "Run the broker with a configuration file", Args: cobra.NoArgs,
		Long: "Run the broker: serve agents and operators. A HUP signal reads the policy bundle again. The running\n" +
			"bundle stays in force if the new one is not newer, lacks signatures, or has a tool that its backend\n" +
			"refuses. TERM and INT stop the server within 15 s: it takes no new steps, ends those under way and the\n" +
			"sealed secrets that were not collected, and takes fences until the end. A second signal ends it at once;\n" +
			"unfinished work is in the ledger, and the next start resumes it.\n" +
			"The ledger records the last bundle in force. A start with an older bundle is refused unless\n" +
			"--allow-policy-rollback gives its version; the audit log records the user who started it.",
		Example: "  pawl server --example > pawl.yaml\n  pawl server --config pawl.yaml --check\n" +
			"  pawl server --config pawl.yaml\n" +
			"  pawl server --config pawl.yaml --allow-policy-rollback 3",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if example {
				fmt.Fprint(cmd.OutOrStdout(), exampleConfig)
				return nil
			}
			if file == "" {
				return misuse{hinted{errors.New("--config is required"),
					"pawl server --example prints a configuration to start from"}}
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
	c.Flags().Int64Var(&rollback, "allow-policy-rollback", 0,
		"version of a policy bundle that may follow a newer one, for this start")
	c.Flags().BoolVar(&check, "check", false, "check the configuration and the policy bundle, and exit")
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

// exitAtSecond ends the process at the second signal. Unfinished work is in the ledger.
func exitAtSecond(log *slog.Logger, stops <-chan os.Signal) {
	<-stops
	second := <-stops
	log.Error("a second signal: ending at once; unfinished work is in the ledger", "signal", second.String())
	os.Exit(128 + int(second.(syscall.Signal)))
}

// stopBound is how long the server may take to stop. Everything that it waits for has a shorter bound.
const stopBound = 14 * time.Second

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
	stops := make(chan os.Signal, 2) // the signals that end ctx, and then the process
	signal.Notify(stops, os.Interrupt, syscall.SIGTERM)
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	for {
		select {
		case <-ctx.Done():
			go exitAtSecond(log, stops)
			time.AfterFunc(stopBound, func() {
				log.Error("stopping took too long, and ends now; unfinished work is in the ledger")
				os.Exit(1)
			})
			s.Drain()
			return nil
		case err := <-s.Failed():
			return err
		case <-reload:
			if p, err := s.ReloadPolicy(ctx, c); err != nil {
				log.Error("the policy bundle on disk is refused; the running one stays",
					"error", err, "bundle", s.Policy.Current().Digest())
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
		Use: "dev", Args: cobra.NoArgs,
		Short: "Run everything on this machine: identities, Vault, PostgreSQL if installed, the broker",
		Long: "Run a SPIFFE Workload API, a real Vault, a real PostgreSQL if it is installed, and the broker, until\n" +
			"interrupted. All files are in a temporary directory, which is removed at the end. With --env, the\n" +
			"environment for the other commands is written to a file for the shell.",
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
				defer os.Remove(envFile) //nolint:errcheck // its addresses are useless by then
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "pawl: ready; interrupt to stop")
			select {
			case <-cmd.Context().Done():
				return nil
			case err := <-env.Broker.Failed():
				return err
			}
		},
	}
	c.Flags().StringVar(&envFile, "env", "", "file to write for the shell: the addresses and an agent's identity")
	c.Flags().BoolVar(&noPostgres, "no-postgres", false, "run without PostgreSQL")
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
	return fmt.Sprintf("export PAWL_ADDRESS=https://%s\nexport PAWL_SERVER_ID=%s\nexport PAWL_SOCKET=%s\n"+
		"export SPIFFE_ENDPOINT_SOCKET=%s # %s\n# the other agent, %s: SPIFFE_ENDPOINT_SOCKET=%s\n",
		env.Broker.Agents(), dev.BrokerID, env.Config.Listen.Socket,
		planner, dev.Agent("planner"), dev.Agent("writer"), writer), nil
}

func demoCommand() *cobra.Command {
	var path string
	var noPostgres bool
	c := &cobra.Command{
		Use: "demo", Short: "Play the main scenario on real parts and print a timeline", Args: cobra.NoArgs,
		Long: "Play the main scenario on real parts, in half a minute, and leave nothing running: one secret for one\n" +
			"step, a narrower delegation, and a chain that is revoked when one agent breaks policy.",
		Example: "  pawl demo",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo.Run(cmd.Context(), demo.Config{
				Out: cmd.OutOrStdout(), Progress: cmd.ErrOrStderr(), JSON: path, NoPostgres: noPostgres})
		},
	}
	c.Flags().StringVar(&path, "timeline", "build/demo/timeline.json", "file to write the timeline to as JSON")
	c.Flags().BoolVar(&noPostgres, "no-postgres", false, "play without PostgreSQL, even if it is installed")
	return c
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Long: "Print the version of pawl and of the Go toolchain that built it.", Example: "  pawl version",
		RunE: func(cmd *cobra.Command, _ []string) error {
			fmt.Fprintln(cmd.OutOrStdout(), "pawl", version())
			return nil
		},
	}
}

// version returns the module's version, or devel, and the version of Go.
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
