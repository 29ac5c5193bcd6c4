package main

import (
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain lets scripts run this package's main as the command pawl.
func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"pawl": main}) }

// TestScripts runs the commands that need no servers, as a user types them.
func TestScripts(t *testing.T) {
	t.Parallel()
	bundles, err := filepath.Abs("../../broker/policy/testdata")
	if err != nil {
		t.Fatal(err)
	}
	example, err := filepath.Abs("../../docs/example/policy")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{Dir: "testdata/script", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("BUNDLES", bundles)
			e.Setenv("EXAMPLE", example)
			for _, name := range []string{
				"PAWL_ADDRESS", "PAWL_SERVER_ID", "PAWL_SOCKET", "PAWL_OPERATORS", "SPIFFE_ENDPOINT_SOCKET",
			} {
				e.Setenv(name, "")
			}
			return nil
		}})
}
