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
		Use: "leaked", Short: "Print the selector of a leaked value, read from standard input", Args: cobra.NoArgs,
		Long: "Print the selector of the grant that handed out a value: a password, a token, or a key or certificate in\n" +
			"PEM. The value is read from standard input, without the line break at its end. It is neither shown nor\n" +
			"sent; only its digest is, which is useless without the value. This finds only values that Vault or Pawl\n" +
			"generated. No digest of a static value (kv) is kept, because the value could be guessed from it: for a\n" +
			"static value use vault:mount/path.",
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

// maxLeaked is the size of the longest value that is read, in bytes.
const maxLeaked = 1 << 20

// readLeaked reads a value, makes its selector and wipes the value. At a terminal it reads one line without
// echo.
func readLeaked(cmd *cobra.Command) (selector.Selector, error) {
	var value []byte
	var err error
	if in := cmd.InOrStdin(); in == os.Stdin && term.IsTerminal(int(os.Stdin.Fd())) {
		fmt.Fprint(cmd.ErrOrStderr(), "the leaked value (not echoed): ")
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
		return selector.Selector{}, errors.New("the value on standard input is larger than 1 MiB")
	case broker.TrimValue(string(value)) == "":
		return selector.Selector{}, misuse{hinted{errors.New("there is no value on standard input"), "pawl leaked < file"}}
	}
	return selector.ForLeaked(string(value)), nil
}
