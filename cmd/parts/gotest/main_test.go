package main_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const sample = `package sample

import "testing"

func TestPass(t *testing.T) { t.Log("all is well") }
func TestSkip(t *testing.T) { t.Skip("NOT TESTED, the moon: not on this machine") }
`

const failing = "func TestFail(t *testing.T) { t.Log(\"said before\"); t.Error(\"the reason\") }\n"

const hanging = "func TestHang(t *testing.T) { t.Log(\"said before it hung\"); select {} }\n"

func TestSkipsAndFailuresAreReported(t *testing.T) {
	program := filepath.Join(t.TempDir(), "gotest")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	for _, row := range []struct {
		name, source string
		status       int
		want, not    []string
	}{
		{
			"pass", sample, 0,
			[]string{"ok  \texample.test/sample", "skipped 1: NOT TESTED, the moon: not on this machine\n\texample.test/sample TestSkip\n"},
			[]string{"all is well"},
		},
		{"fail", sample + failing, 1, []string{"said before", "the reason", "FAIL\texample.test/sample", "skipped 1: "}, []string{"all is well"}},
		{"time is up", sample + hanging, 1, []string{"said before it hung", "test timed out", "FAIL\texample.test/sample"},
			[]string{"all is well"}},
		{"no build", sample + "func nothing() { none }\n", 1, []string{"undefined: none"}, nil},
		{"no tests", "package sample\n", 0, []string{"no test files"}, []string{"skipped"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := t.TempDir()
			file := "sample_test.go"
			if row.name == "no tests" {
				file = "sample.go"
			}
			for name, text := range map[string]string{"go.mod": "module example.test/sample\n\ngo 1.26\n", file: row.source} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command(program, "-count=1", "-timeout=1s", "./...")
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatalf("running: %v", err)
			}
			if got := cmd.ProcessState.ExitCode(); got != row.status {
				t.Errorf("status = %d, want %d", got, row.status)
			}
			for _, want := range row.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("output %q, want %q in it", out, want)
				}
			}
			for _, not := range row.not {
				if strings.Contains(string(out), not) {
					t.Errorf("output %q, want no %q in it", out, not)
				}
			}
		})
	}
}
