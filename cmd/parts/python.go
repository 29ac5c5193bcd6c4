package parts

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// Python gives the path of the interpreter behind python3. It returns ErrMissing where there is none.
func Python(ctx context.Context) (string, error) {
	path, err := exec.LookPath("python3")
	if err != nil {
		return "", missing("Python", "install the package python3, or put python3 on PATH")
	}
	// What PATH has may be a wrapper, which an empty environment does not suit.
	found, err := exec.CommandContext(ctx, path, "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		return "", fmt.Errorf("asking %s for the interpreter: %w", path, err)
	}
	return strings.TrimSpace(string(found)), nil
}
