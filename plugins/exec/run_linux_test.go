package exec_test

import (
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/exec"
)

// TestEmptyEnvironment checks that the plugin gets none of our environment when none is configured.
func TestEmptyEnvironment(t *testing.T) {
	t.Setenv("PAWL_TEST_SECRET", marker)
	p := program(t, "#!/bin/sh\ntest \"$(cat /proc/$$/environ | wc -c)\" -eq 0 && "+ok+"\n")
	if err := backend(t, exec.Config{Program: p}).Load(broker.Tool{Name: "a", Path: brokertest.Path("a")}); err != nil {
		t.Errorf("Load() with a plugin that fails when it has an environment = %v", err)
	}
}
