// Command gotest runs `go test` with its arguments and also reports which tests were skipped, and why. It exits with
// status 1 if `go test` fails.
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

// subject identifies the test of an event. The subject of a whole package has no test.
type subject struct{ pkg, test string }

// report prints one line for each package, the output of each failed test or build, and the skipped tests.
func report(events io.Reader, w io.Writer) error {
	output := map[subject]string{}
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
			fmt.Fprintf(w, "%s", line) // some output of go test is plain text
			continue
		}
		about := subject{cmp.Or(e.Package, e.ImportPath), e.Test}
		switch e.Action {
		case "output", "build-output":
			output[about] += e.Output
			continue
		case "fail", "build-fail":
			if about.test == "" {
				fmt.Fprint(w, unfinished(output, about.pkg))
			}
			fmt.Fprint(w, output[about])
		case "skip":
			if about.test == "" { // a package without tests
				fmt.Fprintln(w, lastLine(output[about]))
				break
			}
			why := reason(output[about])
			skipped[why] = append(skipped[why], about.pkg+" "+about.test)
		case "pass":
			if about.test == "" {
				fmt.Fprintln(w, lastLine(output[about]))
			}
		default:
			continue
		}
		delete(output, about)
	}
	for _, why := range slices.Sorted(maps.Keys(skipped)) {
		fmt.Fprintf(w, "skipped %d: %s\n\t%s\n", len(skipped[why]), why, strings.Join(skipped[why], "\n\t"))
	}
	return nil
}

// unfinished returns the output of the tests of a failed package that neither passed nor failed: they ended with the
// process, by a panic or because its time was up.
func unfinished(output map[subject]string, pkg string) (all string) {
	for _, about := range slices.SortedFunc(maps.Keys(output), func(a, b subject) int { return cmp.Compare(a.test, b.test) }) {
		if about.pkg == pkg && about.test != "" {
			all += output[about]
		}
	}
	return all
}

// reason returns the text given to t.Skip: the line before the verdict, without the position in the source.
func reason(output string) string {
	text, _, _ := strings.Cut(output, "--- SKIP")
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
