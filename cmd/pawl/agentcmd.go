package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker/agent"
)

// stepFlags are the flags of `pawl step`.
type stepFlags struct {
	broker                          agent.Config
	task, tool, delegation, purpose string
	envelope                        string
	args                            []string
	ttl, grace                      time.Duration
	print                           bool
}

func stepCommand() *cobra.Command {
	var f stepFlags
	c := &cobra.Command{
		Use:   "step --tool TOOL [--arg NAME=TEXT | --arg NAME:=JSON]… -- COMMAND [ARGUMENT]…",
		Short: "Take one step and run a command with its secret",
		Long: "Take one step with the agent's identity from the SPIFFE Workload API. Run the command with the secret in\n" +
			"its environment (PAWL_SECRET_USERNAME, PAWL_SECRET_PASSWORD, …), and end the secret when the command\n" +
			"exits. Without --delegation, a new chain is opened for the step.\n\n" +
			"The command has a process group of its own, and gets the signals that pawl gets. If the chain is revoked,\n" +
			"or the secret expires, the command and everything that it started get TERM, and KILL after --grace. On\n" +
			"Linux this includes processes that left the group, and the command dies when pawl is killed. The secret\n" +
			"ends within 2 s when pawl is killed, on every system, and within 12 s when its machine vanishes.\n\n" +
			"The exit status is the command's; 128+N when signal N ended it; 127 when it was not found, 126 when it\n" +
			"could not be run. A command that ends because its step ended gives 1.",
		Example: "  pawl step --tool db.read --arg 'tables:=[\"orders\"]' -- \\\n" +
			"    sh -c 'psql \"$PAWL_SECRET_URL\" -c \"SELECT * FROM orders\"'",
		RunE: func(cmd *cobra.Command, command []string) error {
			if err := required(cmd, "tool"); err != nil {
				return err
			}
			if f.print == (len(command) > 0) {
				return misuse{hinted{errors.New("either a command after -- or --print is needed"),
					"pawl step --help shows an example"}}
			}
			return takeStep(cmd, f, command)
		},
	}
	flags := c.Flags()
	flags.StringVar(&f.broker.Address, "address", "", "the broker's address, https://host:port ($PAWL_ADDRESS)")
	flags.TextVar(&f.broker.ServerID, "server-id", spiffeid.ID{}, "the broker's SPIFFE `ID` ($PAWL_SERVER_ID)")
	flags.StringVar(&f.broker.ID, "id", "",
		"which of several SVIDs is the agent's own: its SPIFFE ID, or the hint of its entry ($PAWL_ID)")
	flags.StringVar(&f.tool, "tool", "", "the tool; required")
	flags.StringArrayVar(&f.args, "arg", nil, "an argument: name=text, or name:=json for lists, numbers and booleans")
	flags.StringVar(&f.delegation, "delegation", "", "the delegation to use; empty: open a new chain")
	flags.StringVar(&f.task, "task", "pawl step", "the task of a new chain")
	flags.StringVar(&f.envelope, "envelope", "", "`file` of the signed envelope of a new chain ($PAWL_ENVELOPE)")
	flags.StringVar(&f.purpose, "purpose", "", "the purpose of the step, for the audit")
	flags.DurationVar(&f.ttl, "ttl", 0, "the secret's lifetime; zero: the longest allowed")
	flags.DurationVar(&f.grace, "grace", 5*time.Second, "the time from TERM to KILL when the step is revoked or has expired")
	flags.BoolVar(&f.print, "print", false, "print the secret, and end it when standard input closes")
	return c
}

func takeStep(cmd *cobra.Command, f stepFlags, command []string) error {
	args, err := parseArgs(f.args)
	if err != nil {
		return misuse{err}
	}
	var delegation agent.DelegationID
	if f.delegation != "" {
		if delegation, err = agent.ParseDelegationID(f.delegation); err != nil {
			return misuse{hinted{fmt.Errorf("--delegation: %w", err), "pawl step --help shows the flags"}}
		}
	}
	envelope, err := readEnvelope(f)
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	client, err := newAgent(ctx, f.broker)
	if err != nil {
		return err
	}
	defer client.Close() //nolint:errcheck // the step is closed by then
	var d *agent.Delegation
	if delegation != "" {
		d, err = client.Join(ctx, delegation)
	} else {
		d, err = client.Open(ctx, agent.Chain{Task: f.task, Rights: []agent.Right{{Tool: f.tool, Use: true}}, Envelope: envelope})
	}
	if err != nil {
		return err
	}
	interrupted := ctx
	if !f.print {
		ctx = context.WithoutCancel(ctx) // signals are the command's from here on
	}
	call := agent.Call{Tool: f.tool, Args: args, Purpose: f.purpose, TTL: f.ttl, Held: true}
	return d.Step(ctx, call, func(ctx context.Context, s *agent.Secret) error {
		if f.print {
			return printSecret(ctx, cmd, s)
		}
		err := runWith(ctx, interrupted, s, command, f.grace)
		if ended := context.Cause(ctx); err != nil && ended != nil {
			return fmt.Errorf("%s was stopped, because its step ended: %w", command[0], ended)
		}
		return err
	})
}

// readEnvelope reads the envelope's file, if there is one.
func readEnvelope(f stepFlags) (string, error) {
	file := cmp.Or(f.envelope, os.Getenv("PAWL_ENVELOPE"))
	if file == "" || f.delegation != "" {
		if f.envelope != "" {
			return "", misuse{hinted{errors.New("--envelope belongs to a new chain, and --delegation names one"),
				"pawl step --help shows the flags"}}
		}
		return "", nil
	}
	raw, err := os.ReadFile(file)
	return strings.TrimSpace(string(raw)), err
}

func newAgent(ctx context.Context, cfg agent.Config) (*agent.Client, error) {
	client, err := cfg.FromEnvironment(ctx)
	var missing *agent.EnvironmentError
	switch {
	case errors.As(err, &missing):
		err = misuse{hinted{err, "set the variables; `pawl dev --env FILE` writes them"}}
	case errors.Is(err, agent.ErrIdentity):
		err = hinted{err, "--id or PAWL_ID chooses"}
	case errors.Is(err, context.DeadlineExceeded):
		err = hinted{err, "check that the Workload API runs and that this workload is registered with it"}
	}
	return client, err
}

// parseArgs reads name=text and name:=json.
func parseArgs(given []string) (agent.Args, error) {
	args := agent.Args{}
	for _, a := range given {
		name, value, ok := strings.Cut(a, "=")
		if !ok {
			return nil, hinted{fmt.Errorf("--arg %q has no =", a), "write name=text, or name:=json"}
		}
		if plain, isJSON := strings.CutSuffix(name, ":"); isJSON {
			var v any
			dec := json.NewDecoder(strings.NewReader(value))
			dec.UseNumber()
			if err := dec.Decode(&v); err != nil {
				return nil, hinted{fmt.Errorf("--arg %s: not JSON", plain), `write a list as 'name:=["a","b"]'`}
			}
			if _, err := dec.Token(); !errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("--arg %s: text follows the JSON value", plain)
			}
			args[plain] = v
			continue
		}
		args[name] = value
	}
	return args, nil
}

// printSecret returns when standard input or ctx ends.
func printSecret(ctx context.Context, cmd *cobra.Command, s *agent.Secret) error {
	raw := s.JSON()
	defer clear(raw)
	if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", raw); err != nil {
		return err
	}
	closed := make(chan error, 1)
	go func() { // it ends with the process: a read of standard input cannot be interrupted
		_, err := io.Copy(io.Discard, cmd.InOrStdin())
		closed <- err
	}()
	select {
	case err := <-closed:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// runWith runs the command with the secret's members in its environment. It stops the command when ctx ends,
// which it does when the step is revoked.
func runWith(
	ctx, interrupted context.Context, s *agent.Secret, command []string, grace time.Duration,
) error {
	env := os.Environ()
	var members map[string]json.RawMessage
	raw := s.JSON()
	defer clear(raw)
	if err := json.Unmarshal(raw, &members); err != nil {
		return errors.New("the secret is not a JSON object")
	}
	for name := range members {
		env = append(env, "PAWL_SECRET_"+strings.ToUpper(name)+"="+s.Field(name))
	}
	v := supervisor{grace: grace}
	return v.run(ctx, interrupted, command, env)
}
