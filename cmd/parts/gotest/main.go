// Command gotest runs `go test` with its arguments and says what `go test` keeps to itself: which tests were skipped,
// and why. It ends with the status of `go test`.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
)

func main() {
	cmd := exec.Command("go", append([]string{"test", "-json"}, os.Args[1:]...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		err = errors.Join(report(out, os.Stdout), cmd.Wait())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintf(os.Stderr, "gotest: error: %v\n", err)
	}
	if err != nil {
		os.Exit(1)
	}
}

// event is one line of `go test -json`; see go doc test2json.
type event struct {
	Action     string
	Package    string
	ImportPath string // instead of Package, while building
	Test       string
	Output     string
}

// subject is what an event is about. A whole package has no test.
type subject struct{ pkg, test string }

// report prints one line for each package, everything that a failed test or build said, and the skipped tests.
func report(events io.Reader, w io.Writer) error {
	said := map[subject]string{}
	skipped := map[string][]string{} // tests, by reason
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading from go test: %w", err)
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			fmt.Fprintf(w, "%s", line) // go test says some things in plain words
			continue
		}
		about := subject{cmp.Or(e.Package, e.ImportPath), e.Test}
		switch e.Action {
		case "output", "build-output":
			said[about] += e.Output
			continue
		case "fail", "build-fail":
			fmt.Fprint(w, said[about])
		case "skip":
			if about.test == "" { // a package without tests
				fmt.Fprintln(w, lastLine(said[about]))
				break
			}
			why := reason(said[about])
			skipped[why] = append(skipped[why], about.pkg+" "+about.test)
		case "pass":
			if about.test == "" {
				fmt.Fprintln(w, lastLine(said[about]))
			}
		default:
			continue
		}
		delete(said, about)
	}
	for _, why := range slices.Sorted(maps.Keys(skipped)) {
		fmt.Fprintf(w, "skipped %d: %s\n\t%s\n", len(skipped[why]), why, strings.Join(skipped[why], "\n\t"))
	}
	return nil
}

// reason is what the test said to t.Skip: the line before the verdict, without the position in the source.
func reason(said string) string {
	text, _, _ := strings.Cut(said, "--- SKIP")
	text = lastLine(text)
	if _, words, ok := strings.Cut(text, ".go:"); ok {
		_, text, _ = strings.Cut(words, ": ")
	}
	return cmp.Or(text, "no reason given")
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return strings.TrimSpace(text[strings.LastIndexByte(text, '\n')+1:])
}
