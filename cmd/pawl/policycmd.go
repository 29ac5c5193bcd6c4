package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/policy"
	"github.com/pawlsec/pawl/cmd/wire"
)

func policyCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "policy", Short: "Make keys; sign, verify, test and compare policy bundles",
		Long: "A policy bundle is a directory with bundle.yaml, tools.yaml and *.cedar, signed by enough of the\n" +
			"platform's keys. A broker accepts no other bundle, and the version only goes up.",
		Example: "  pawl policy keygen --private ana.key --public ana.pub\n  pawl policy test ./policy\n" +
			"  pawl policy sign ./policy --key ana.key --out policy.jws\n" +
			"  pawl policy verify policy.jws --keys policy-keys.json --need 1",
	}
	c.AddCommand(keygenCommand(), signCommand(), verifyCommand(), policyTestCommand(), diffCommand())
	return c
}

func keygenCommand() *cobra.Command {
	var private, public string
	c := &cobra.Command{
		Use: "keygen --private FILE --public FILE", Short: "Make a platform key", Args: cobra.NoArgs,
		Long: "Make a platform key. The private half signs bundles and never goes to a broker. The public half is added\n" +
			"to the set of keys that the broker trusts. Existing files are not overwritten.",
		Example: "  pawl policy keygen --private ana.key --public ana.pub",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "private", "public"); err != nil {
				return err
			}
			secret, open, err := policy.GenerateKey(rand.Reader)
			if err != nil {
				return err
			}
			if err := writeNewJSON(private, secret, 0o600); err != nil {
				return err
			}
			return writeNewJSON(public, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{open}}, 0o644)
		},
	}
	c.Flags().StringVar(&private, "private", "", "file of the private key")
	c.Flags().StringVar(&public, "public", "", "file of the public key, as a set that a broker can trust")
	return c
}

func writeNewJSON(path string, v any, mode os.FileMode) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(append(raw, '\n'))
	return errors.Join(err, f.Close())
}

func signCommand() *cobra.Command {
	var key, out string
	c := &cobra.Command{
		Use:   "sign DIR|BUNDLE --key FILE --out FILE",
		Short: "Sign a bundle's directory, or add a signature to a bundle", Args: cobra.ExactArgs(1),
		Long: "Sign a bundle's directory, or add a signature to a signed bundle: the holders of several keys can sign\n" +
			"one after the other.",
		Example: "  pawl policy sign ./policy --key ana.key --out policy.jws\n" +
			"  pawl policy sign policy.jws --key ben.key --out policy.jws",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "key", "out"); err != nil {
				return err
			}
			raw, err := os.ReadFile(key)
			if err != nil {
				return err
			}
			private, err := policy.ParseKey(raw)
			if err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			jws, err := signed(args[0], private)
			if err != nil {
				return err
			}
			return os.WriteFile(out, jws, 0o644)
		},
	}
	c.Flags().StringVar(&key, "key", "", "file of the private key")
	c.Flags().StringVar(&out, "out", "", "file of the signed bundle")
	return c
}

func signed(path string, key jose.JSONWebKey) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		source, err := policy.Build(os.DirFS(path))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return policy.Sign(source, key)
	}
	jws, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return policy.Cosign(jws, key)
}

func verifyCommand() *cobra.Command {
	var keys string
	var need int
	c := &cobra.Command{
		Use: "verify BUNDLE --keys FILE [--need N]", Args: cobra.ExactArgs(1),
		Short:   "Check whether a broker would accept a bundle",
		Long:    "Check whether a broker with these keys would accept a bundle. The error gives the reason against it.",
		Example: "  pawl policy verify policy.jws --keys policy-keys.json --need 2",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "keys"); err != nil {
				return err
			}
			running, err := wire.LoadPolicy(wire.Policy{Bundle: args[0], Keys: keys, Need: need})
			if err != nil {
				return err
			}
			p := running.Current()
			fmt.Fprintf(cmd.OutOrStdout(), "%s version %d is good: %d tools, signed by %s\n%s\n",
				p.Bundle().Name(), p.Bundle().Version(),
				len(p.Tools()), strings.Join(p.Bundle().Signers, ", "), p.Digest())
			for _, w := range p.Warnings() {
				fmt.Fprintf(cmd.ErrOrStderr(), "pawl: warning: %s\n", w)
			}
			return nil
		},
	}
	c.Flags().StringVar(&keys, "keys", "", "JWK set of the platform's public keys")
	c.Flags().IntVar(&need, "need", 1, "how many of them must have signed")
	return c
}

func policyTestCommand() *cobra.Command {
	return &cobra.Command{
		Use: "test DIR", Short: "Run a bundle's policy tests, *.test.yaml", Args: cobra.ExactArgs(1),
		Long:    "Build a bundle's directory and run the policy test files in it.",
		Example: "  pawl policy test ./policy",
		RunE: func(cmd *cobra.Command, args []string) error {
			p, results, err := policy.Test(os.DirFS(args[0]))
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			for _, w := range p.Warnings() {
				fmt.Fprintf(cmd.ErrOrStderr(), "pawl: warning: %s\n", w)
			}
			failed := 0
			for _, r := range results {
				fmt.Fprintln(cmd.OutOrStdout(), r)
				if r.Fail != "" {
					failed++
				}
			}
			if failed > 0 {
				return fmt.Errorf("%d of %d policy tests failed", failed, len(results))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%d policy tests passed\n", len(results))
			return nil
		},
	}
}

func diffCommand() *cobra.Command {
	var questions string
	c := &cobra.Command{
		Use: "diff DIR DIR", Short: "Print the differences between two bundles' directories", Args: cobra.ExactArgs(2),
		Long: "Print the differences between two bundles' directories. With --questions, also print the questions of a\n" +
			"policy test file that they answer differently.",
		Example: "  pawl policy diff ./policy ./policy.next --questions ./policy/ci.test.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := loadDir(args[0])
			if err != nil {
				return err
			}
			to, err := loadDir(args[1])
			if err != nil {
				return err
			}
			for _, change := range policy.Changes(from, to) {
				fmt.Fprintln(cmd.OutOrStdout(), change)
			}
			if questions == "" {
				return nil
			}
			raw, err := os.ReadFile(questions)
			if err != nil {
				return err
			}
			asked, err := policy.Questions(questions, raw)
			if err != nil {
				return err
			}
			for _, d := range policy.Diff(from, to, asked...) {
				fmt.Fprintln(cmd.OutOrStdout(), d)
			}
			return nil
		},
	}
	c.Flags().StringVar(&questions, "questions", "", "policy test file with questions for both bundles")
	return c
}

func loadDir(dir string) (*policy.Policy, error) {
	source, err := policy.Build(os.DirFS(dir))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return policy.Load(source.Unsigned())
}

// explainFlags are the flags of `pawl explain`: one question.
type explainFlags struct {
	caller, action, tool, receiver, task string
	args, labels                         []string
	used, callerUsed                     []string
	signed                               broker.Envelope
	signedLabels                         []string
	steps, depth                         int
	ttl                                  time.Duration
	json                                 bool
}

func explainCommand() *cobra.Command {
	var f explainFlags
	c := &cobra.Command{
		Use:   "explain DIR --caller SPIFFE-ID --tool TOOL",
		Short: "Explain why policy grants or refuses a request", Args: cobra.ExactArgs(1),
		Long: "Evaluate one question with a bundle's directory. Print which policies decided it, and which conditions\n" +
			"a refused request would have to meet.",
		Example: "  pawl explain ./policy --caller spiffe://example.org/agent/ci --tool deploy --arg environment=production",
		RunE:    func(cmd *cobra.Command, args []string) error { return explain(cmd, f, args[0]) },
	}
	flags := c.Flags()
	flags.StringVar(&f.caller, "caller", "", "the caller's SPIFFE ID; required")
	flags.StringVar(&f.action, "action", "use", "open, use or delegate")
	flags.StringVar(&f.tool, "tool", "", "the tool; required")
	flags.StringArrayVar(&f.args, "arg", nil, "an argument: name=text, or name:=json")
	flags.StringVar(&f.receiver, "to", "", "the receiver's SPIFFE ID, for delegate")
	flags.StringVar(&f.task, "task", "explain", "the chain's task, as its opener claims it")
	flags.StringArrayVar(&f.labels, "label", nil, "a label of the chain, as its opener claims it: name=text")
	flags.StringVar(&f.signed.Issuer, "issuer", "", "the issuer of the chain's envelope")
	flags.StringVar(&f.signed.Task, "signed-task", "", "the task in the chain's envelope")
	flags.StringArrayVar(&f.signedLabels, "signed-label", nil, "a label in the chain's envelope: name=text")
	flags.StringVar(&f.signed.Behalf, "on-behalf-of", "", "the subject in the chain's envelope")
	flags.IntVar(&f.steps, "steps", 0, "the budget that is asked for, for open")
	flags.IntVar(&f.depth, "depth", 0, "the depth that is asked for, for open")
	flags.DurationVar(&f.ttl, "ttl", 0, "the lifetime that is asked for, for open")
	flags.StringArrayVar(&f.used, "used", nil, "a tool that the chain used a minute ago, or tool=count")
	flags.StringArrayVar(&f.callerUsed, "caller-used", nil,
		"a tool that the caller, or the chain's principal, used in another chain a minute ago, or tool=count")
	flags.BoolVar(&f.json, "json", false, "print JSON")
	return c
}

func explain(cmd *cobra.Command, f explainFlags, dir string) error {
	if err := required(cmd, "caller", "tool"); err != nil {
		return err
	}
	p, err := loadDir(dir)
	if err != nil {
		return err
	}
	q, err := f.question(p)
	if err != nil {
		return misuse{hinted{err, "pawl explain --help shows an example"}}
	}
	e := p.Explain(q)
	if f.json {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(e)
	}
	out := cmd.OutOrStdout()
	word := map[bool]string{true: "granted", false: "refused"}[e.Granted]
	fmt.Fprintf(out, "%s: %s\n", word, e.Why)
	for _, part := range []struct {
		title string
		list  []string
	}{{"decided by", e.Decision.Policies}, {"conditions not met", e.Unmet}, {"limits", e.Limits}, {"missing", e.Missing}} {
		if len(part.list) > 0 {
			fmt.Fprintf(out, "  %s: %s\n", part.title, strings.Join(part.list, ", "))
		}
	}
	if e.Remedy != "" {
		fmt.Fprintf(out, "  how to ask: %s\n", e.Remedy)
	}
	return nil
}

func (f explainFlags) question(p *policy.Policy) (q broker.Question, err error) {
	id, err := attest.ParseID(f.caller)
	if err != nil {
		return q, fmt.Errorf("--caller: %w", err)
	}
	now := time.Now()
	q = broker.Question{Action: broker.Action(f.action), Now: now, History: map[broker.ToolName]broker.Past{},
		Caller: broker.Caller{ID: id, Proof: broker.ProofX509, NotAfter: now.Add(time.Hour)},
		Chain:  broker.Chain{Task: f.task, Opener: id, Opened: now.Add(-time.Minute)}}
	if q.Chain.Labels, err = labelsOf("--label", f.labels); err != nil {
		return q, err
	}
	if f.signed.Labels, err = labelsOf("--signed-label", f.signedLabels); err != nil {
		return q, err
	}
	if s := f.signed; s.Issuer != "" || s.Task != "" || s.Behalf != "" || len(s.Labels) > 0 {
		q.Chain.Envelope = &s
	}
	if q.Action == broker.ActionOpen {
		q.Open = &broker.OpenRequest{Task: f.task, Labels: q.Chain.Labels, Depth: f.depth, TTL: f.ttl,
			Budget: broker.Budget{Steps: f.steps}}
	}
	name, err := broker.ParseToolName(f.tool)
	if err != nil {
		return q, fmt.Errorf("--tool: %w", err)
	}
	var known bool
	if q.Tool, known = p.Tool(name); !known {
		return q, fmt.Errorf("the bundle has no tool %q", name)
	}
	if f.receiver != "" {
		if q.Receiver, err = attest.ParseID(f.receiver); err != nil {
			return q, fmt.Errorf("--to: %w", err)
		}
	}
	if err := f.past(p, &q); err != nil {
		return q, err
	}
	given, err := parseArgs(f.args)
	if err != nil {
		return q, err
	}
	raw, err := json.Marshal(given)
	if err != nil {
		return q, err
	}
	q.Args, err = args.Parse(raw)
	return q, err
}

// past fills in the histories. The steps of the chain are in the history of its principal too.
func (f explainFlags) past(p *policy.Policy, q *broker.Question) error {
	at := q.Now.Add(-time.Minute)
	caller := map[broker.ToolName]broker.Past{}
	add := func(history map[broker.ToolName]broker.Past, name broker.ToolName, n int) {
		history[name] = broker.Past{Count: history[name].Count + n, First: at, Last: at}
	}
	for _, part := range []struct {
		flag  string
		given []string
	}{{"--used", f.used}, {"--caller-used", f.callerUsed}} {
		for _, one := range part.given {
			name, n, err := usedTool(p, one)
			if err != nil {
				return fmt.Errorf("%s: %w", part.flag, err)
			}
			if part.flag == "--used" {
				add(q.History, name, n)
			}
			add(caller, name, n)
		}
	}
	q.CallerHistory = policy.InWindows(caller, q.Now)
	return nil
}

// usedTool parses a tool and how often it was used, such as "mail" or "mail=3".
func usedTool(p *policy.Policy, given string) (name broker.ToolName, n int, err error) {
	text, count, counted := strings.Cut(given, "=")
	if name, err = broker.ParseToolName(text); err != nil {
		return name, 0, err
	}
	if _, known := p.Tool(name); !known {
		return name, 0, fmt.Errorf("the bundle has no tool %q", name)
	}
	if n = 1; counted {
		if n, err = strconv.Atoi(count); err != nil || n < 1 {
			return name, 0, fmt.Errorf("%.60q is not like mail=3", given)
		}
	}
	return name, n, nil
}

func labelsOf(flag string, given []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, one := range given {
		name, value, ok := strings.Cut(one, "=")
		if !ok || args.CheckName(name) != nil {
			return nil, fmt.Errorf("%s: %.60q is not like team=payments", flag, one)
		}
		labels[name] = value
	}
	return labels, nil
}
