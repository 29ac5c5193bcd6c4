package power

import (
	"os"
	"os/exec"
	"testing"
)

const inProcess = "PAWL_POWER_TEST"

// Run runs a test in a process of its own, because the filter of system calls stays for good. args are more arguments of
// the test's program.
func Run(t *testing.T, f func(*testing.T), args ...string) {
	t.Helper()
	if os.Getenv(inProcess) == t.Name() {
		// Here, so that the supervisor is in no bubble of testing/synctest.
		if _, err := supervise(); err != nil {
			t.Fatal(err)
		}
		f(t)
		return
	}
	args = append([]string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.timeout=1h"}, args...)
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), inProcess+"="+t.Name())
	out, err := cmd.CombinedOutput()
	if t.Logf("%s", out); err != nil {
		t.Errorf("the process of the test: %v", err)
	}
}
