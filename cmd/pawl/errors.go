package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/broker/api"
)

// misuse is an error in the command line.
type misuse struct{ err error }

func (m misuse) Error() string { return m.err.Error() }
func (m misuse) Unwrap() error { return m.err }

// hinted is an error with a hint for its repair.
type hinted struct {
	err  error
	hint string
}

func (h hinted) Error() string { return h.err.Error() }
func (h hinted) Unwrap() error { return h.err }

// report prints an error for people and returns the exit status: 0, 1 for failed, 2 for misused, or the
// status of the command that a step ran.
func report(err error) int {
	if err == nil {
		return 0
	}
	// The command that a step ran has printed its own error.
	if ran, ok := err.(exited); ok { //nolint:errorlint // a wrapped one is printed
		return ran.status
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
	var u unstarted
	switch {
	case errors.As(err, &m):
		return 2
	case errors.As(err, &u):
		return u.status
	}
	return 1
}

// oneLine removes control characters, so that a server's text cannot control the terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

// required returns a misuse that names the flags without a value; nil when all have one.
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
	return misuse{hinted{fmt.Errorf("%s needs %s", cmd.CommandPath(), strings.Join(missing, " and ")),
		cmd.CommandPath() + " --help shows an example"}}
}
