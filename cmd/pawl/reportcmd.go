package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/audit"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/policy"
)

// reportFlags are the flags of `pawl report`.
type reportFlags struct {
	operatorFlags
	out, key string
	markdown bool
}

func reportCommand() *cobra.Command {
	var f reportFlags
	c := &cobra.Command{
		Use: "report REVOCATION", Short: "Print the signed report of a revocation", Args: cobra.ExactArgs(1),
		Long: "Get the signed report of a revocation: the timeline, the operator and the reason, the evidence for each\n" +
			"grant, the secrets that were usable between the breach and the fence, related delegations that were not\n" +
			"revoked, and the remaining risks. It is a compact JWS that verifies offline with the broker's public key:\n" +
			"pawl report verify.",
		Example: "  pawl report rv0123456789abcdefghjkmnpq --out incident.jws\n" +
			"  pawl report rv0123456789abcdefghjkmnpq --markdown --key broker.pub",
		RunE: f.run(func(cmd *cobra.Command, c *operator.Client, args []string) error {
			if f.markdown && f.key == "" {
				return misuse{hinted{errors.New("--markdown needs --key"),
					"it is the broker's public key: only a verified report is shown"}}
			}
			jws, err := c.Report(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if f.out != "" {
				if err := os.WriteFile(f.out, jws, 0o600); err != nil {
					return err
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "pawl: the report of %s is in %s\n", args[0], f.out)
			}
			if f.markdown {
				return showReport(cmd, jws, f.key, true)
			}
			if f.out == "" {
				fmt.Fprintf(cmd.OutOrStdout(), "%s\n", jws)
			}
			return nil
		}),
	}
	f.add(c)
	c.Flags().StringVar(&f.out, "out", "", "file for the signed report; empty: print it")
	c.Flags().StringVar(&f.key, "key", "", "file of the broker's public key; required with --markdown")
	c.Flags().BoolVar(&f.markdown, "markdown", false, "verify the report and print it as Markdown")
	c.AddCommand(reportVerifyCommand())
	return c
}

func reportVerifyCommand() *cobra.Command {
	var key string
	var markdown bool
	c := &cobra.Command{
		Use: "verify FILE --key FILE", Short: "Verify a signed report offline", Args: cobra.ExactArgs(1),
		Long:    "Verify a signed report with only the broker's public key, and print it as JSON.",
		Example: "  pawl report verify incident.jws --key broker.pub --markdown",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "key"); err != nil {
				return err
			}
			jws, err := readAtMost(args[0], audit.MaxReport)
			if err != nil {
				return err
			}
			if n := len(jws); n > 0 && jws[n-1] == '\n' { // pawl report prints it with a line feed
				jws = jws[:n-1]
			}
			return showReport(cmd, jws, key, markdown)
		},
	}
	c.Flags().StringVar(&key, "key", "", "file of the broker's public key")
	c.Flags().BoolVar(&markdown, "markdown", false, "print it as Markdown")
	return c
}

func showReport(cmd *cobra.Command, jws []byte, keyFile string, markdown bool) error {
	key, err := readPublicKey(keyFile)
	if err != nil {
		return err
	}
	r, err := audit.VerifyReport(jws, key)
	if err != nil {
		return hinted{fmt.Errorf("the report is not valid: %w", err),
			"get the report again from the broker, and the key from its administrator"}
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "pawl: good signature of %s\n", oneLine(r.Issuer))
	if markdown {
		_, err := fmt.Fprint(cmd.OutOrStdout(), r.Markdown())
		return err
	}
	text, err := json.Marshal(r, json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", text)
	return err
}

// readPublicKey reads one public key: a set with one key, as `pawl policy keygen` writes it, or a single JWK.
func readPublicKey(path string) (jose.JSONWebKey, error) {
	raw, err := readAtMost(path, 64<<10)
	if err != nil {
		return jose.JSONWebKey{}, err
	}
	keys, err := policy.ParseKeySet(raw)
	if err != nil {
		key, oneErr := policy.ParseKey(raw)
		if oneErr != nil {
			return jose.JSONWebKey{}, fmt.Errorf("%s: %w", path, err)
		}
		keys = []jose.JSONWebKey{key}
	}
	if len(keys) != 1 || !keys[0].IsPublic() {
		return jose.JSONWebKey{}, hinted{fmt.Errorf("%s has %d keys; one public key is needed", path, len(keys)),
			"it is the file that pawl policy keygen --public wrote"}
	}
	return keys[0], nil
}

func readAtMost(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	raw, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(raw)) > most {
		err = fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return raw, err
}

// auditVerifyFlags are the flags of `pawl audit verify`, besides those that select the broker.
type auditVerifyFlags struct{ key, checkpoint, save, log string }

func auditVerifyCommand(f *operatorFlags) *cobra.Command {
	var v auditVerifyFlags
	c := &cobra.Command{
		Use: "verify --key FILE", Short: "Verify that no entry was changed or removed", Args: cobra.NoArgs,
		Long: "Verify the audit log against a signed checkpoint. Save a checkpoint with --save where the broker cannot\n" +
			"reach it. Later, with --checkpoint, the log must still begin with exactly the entries that the checkpoint\n" +
			"covers. --save keeps the broker's current checkpoint, and only if the log has the entries of both.\n" +
			"--log reads the output of pawl audit --json; with --checkpoint and without --save, no broker is needed.",
		Example: "  pawl audit verify --key broker.pub --save monday.note\n" +
			"  pawl audit verify --key broker.pub --checkpoint monday.note --save tuesday.note\n" +
			"  pawl audit --json > log.json && pawl audit verify --key broker.pub --checkpoint monday.note --log log.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "key"); err != nil {
				return err
			}
			key, err := readPublicKey(v.key)
			if err != nil {
				return err
			}
			return v.verify(cmd, f, key)
		},
	}
	flags := c.Flags()
	flags.StringVar(&v.key, "key", "", "file of the broker's public key")
	flags.StringVar(&v.checkpoint, "checkpoint", "", "file of a saved checkpoint; empty: the broker's current one")
	flags.StringVar(&v.save, "save", "", "file for the broker's current checkpoint")
	flags.StringVar(&v.log, "log", "", "file of the log; empty: the broker's log")
	return c
}

func (v auditVerifyFlags) verify(cmd *cobra.Command, f *operatorFlags, key jose.JSONWebKey) error {
	var c *operator.Client
	current := v.checkpoint == "" || v.save != "" // needs the broker's current checkpoint
	if current || v.log == "" {
		var err error
		if c, err = f.client(cmd.Context()); err != nil {
			return err
		}
		defer c.Close()
	}
	var signed [][]byte
	if v.checkpoint != "" {
		kept, err := readAtMost(v.checkpoint, audit.MaxCheckpoint)
		if err != nil {
			return err
		}
		signed = append(signed, kept)
	}
	if current {
		now, err := c.Checkpoint(cmd.Context())
		if err != nil {
			return err
		}
		signed = append(signed, now)
	}
	log := brokerLog(cmd.Context(), c)
	if v.log != "" {
		log = fileLog(v.log)
	}
	checked, err := audit.Verify(log, key, signed...)
	if err != nil {
		return hinted{fmt.Errorf("the audit log is not valid: %w", err),
			"keep the ledger's file unchanged, and compare it with an earlier copy"}
	}
	if v.save != "" {
		if err := replaceFile(v.save, signed[len(signed)-1]); err != nil {
			return err
		}
	}
	fmt.Fprintf(cmd.OutOrStdout(), "the first %d entries are those that %s signed\n",
		checked.Size, oneLine(checked.Origin))
	return nil
}

// replaceFile writes a file beside the old one first: a full disk must not cost the old one.
func replaceFile(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the first error counts
	}
	return err
}

// brokerLog reads the log from the broker, page by page.
func brokerLog(ctx context.Context, c *operator.Client) audit.Log {
	return func(yield func(broker.Entry, error) bool) {
		for after := uint64(0); ; {
			page, err := c.Audit(ctx, after, 1000)
			if err != nil {
				yield(broker.Entry{}, err)
				return
			}
			for _, e := range page.Entries {
				if after = e.Revision; !yield(entryOf(e), nil) {
					return
				}
			}
			if len(page.Entries) == 0 {
				return
			}
		}
	}
}

// fileLog reads the output of `pawl audit --json`: lists of entries, one after the other.
func fileLog(path string) iter.Seq2[broker.Entry, error] {
	return func(yield func(broker.Entry, error) bool) {
		f, err := os.Open(path)
		if err != nil {
			yield(broker.Entry{}, err)
			return
		}
		defer f.Close() //nolint:errcheck // only read
		dec := jsontext.NewDecoder(f)
		for dec.PeekKind() != jsontext.KindInvalid {
			var page []api.Entry
			if err := json.UnmarshalDecode(dec, &page, json.RejectUnknownMembers(true)); err != nil {
				yield(broker.Entry{}, fmt.Errorf("%s: %w", path, err))
				return
			}
			for _, e := range page {
				if !yield(entryOf(e), nil) {
					return
				}
			}
		}
		if _, err := dec.ReadToken(); !errors.Is(err, io.EOF) {
			yield(broker.Entry{}, fmt.Errorf("%s: %w", path, err))
		}
	}
}

// entryOf converts an entry to the ledger's form.
func entryOf(e api.Entry) broker.Entry {
	return broker.Entry{Revision: broker.Revision(e.Revision), At: e.At, Actor: e.Actor, Op: broker.Op(e.Op),
		Chain: broker.ChainID(e.Chain), Delegation: broker.DelegationID(e.Delegation), Grant: broker.GrantID(e.Grant),
		Revocation: broker.RevocationID(e.Revocation), Tool: broker.ToolName(e.Tool), Code: broker.Code(e.Code),
		Bundle: e.Bundle, Policies: e.Policies, Detail: e.Detail}
}
