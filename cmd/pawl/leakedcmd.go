package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

func leakedCommand() *cobra.Command {
	return &cobra.Command{
		Use: "leaked", Short: "The selector of a leaked value, which is read from standard input", Args: cobra.NoArgs,
		Long: "Print the selector of the grant that handed out a value: a password, a token, a key or certificate in\n" +
			"PEM. The value is read from standard input, without the line break at its end, and neither shown nor\n" +
			"sent; its digest says nothing to who does not have it. Only values that Vault or Pawl drew are found\n" +
			"so. A static one (kv) could be guessed from a digest, and none is kept: use vault:mount/path.",
		Example: "  pawl leaked < value\n  pawl revoke --leaked < value",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readLeaked(cmd)
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), s)
			}
			return err
		},
	}
}

// maxLeaked is the longest value that is read, in bytes.
const maxLeaked = 1 << 20

// readLeaked reads a value and forgets it. At a terminal it is one line, and not echoed.
func readLeaked(cmd *cobra.Command) (selector.Selector, error) {
	var value []byte
	var err error
	if in := cmd.InOrStdin(); in == os.Stdin && term.IsTerminal(int(os.Stdin.Fd())) {
		fmt.Fprint(cmd.ErrOrStderr(), "the leaked value (it is not shown): ")
		value, err = term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(cmd.ErrOrStderr())
	} else {
		value, err = io.ReadAll(io.LimitReader(in, maxLeaked+1))
	}
	defer clear(value)
	switch {
	case err != nil:
		return selector.Selector{}, fmt.Errorf("reading the value from standard input: %w", err)
	case len(value) > maxLeaked:
		return selector.Selector{}, errors.New("the value on standard input is over 1 MiB: that is more than a value")
	case broker.TrimValue(string(value)) == "":
		return selector.Selector{}, misuse{hinted{errors.New("there is no value on standard input"), "pawl leaked < file"}}
	}
	return selector.ForLeaked(string(value)), nil
}
