package parts

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// Python returns the path of the interpreter behind python3. It returns ErrMissing if there is none.
func Python(ctx context.Context) (string, error) {
	path, err := exec.LookPath("python3")
	if err != nil {
		return "", missing("Python", "install the package python3, or put python3 on PATH")
	}
	// python3 on PATH may be a wrapper that does not work in an empty environment.
	found, err := exec.CommandContext(ctx, path, "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		return "", fmt.Errorf("finding the interpreter of %s: %w", path, err)
	}
	return strings.TrimSpace(string(found)), nil
}
