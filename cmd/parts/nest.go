package parts

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// nest is the directory of one server and the watcher that outlives us. The watcher reads process groups, one a
// line, from a pipe that only we hold open. When the pipe ends, because of close or because we died in whatever way,
// it ends the last group named and removes the directory. An empty line means that no group is left to end.
type nest struct {
	dir     string
	pipe    io.WriteCloser
	watcher *exec.Cmd
}

// The group gets the server's own signal first: PostgreSQL, killed outright, leaves shared memory behind.
const watchScript = `
while read -r line; do group=$line; done
if [ -n "$group" ]; then
	kill -s "$2" -- "-$group"
	tries=50
	while [ $tries -gt 0 ] && kill -s 0 -- "-$group"; do sleep 0.1; tries=$((tries - 1)); done
	kill -s KILL -- "-$group"
fi
rm -rf -- "$1"
`

// newNest makes a directory that only its owner can enter. signal ("KILL", "QUIT") is what ends the server.
func newNest(name, signal string) (*nest, error) {
	dir, err := os.MkdirTemp("", "pawl-"+name+"-")
	if err != nil {
		return nil, fmt.Errorf("making a directory for %s: %w", name, err)
	}
	// A group of its own keeps an interrupt at the terminal from ending the watcher before us.
	watcher := exec.Command("/bin/sh", "-c", watchScript, "watch", dir, signal)
	watcher.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	watcher.Dir = "/"
	pipe, err := watcher.StdinPipe()
	if err == nil {
		err = watcher.Start()
	}
	if err != nil {
		_ = os.RemoveAll(dir) // the error that is reported is the first one
		return nil, fmt.Errorf("starting the watcher of %s: %w", name, err)
	}
	return &nest{dir: dir, pipe: pipe, watcher: watcher}, nil
}

func (n *nest) path(elem ...string) string {
	return filepath.Join(append([]string{n.dir}, elem...)...)
}

// watch names the process group that must not outlive us; 0 names none.
func (n *nest) watch(group int) error {
	line := "\n"
	if group > 0 {
		line = fmt.Sprintf("%d\n", group)
	}
	if _, err := io.WriteString(n.pipe, line); err != nil {
		return fmt.Errorf("telling the watcher: %w", err)
	}
	return nil
}

// close ends what still runs and removes the directory. It returns when both are gone.
func (n *nest) close() error {
	if err := n.pipe.Close(); err != nil {
		return fmt.Errorf("closing the watcher's pipe: %w", err)
	}
	if err := n.watcher.Wait(); err != nil {
		return fmt.Errorf("removing %s: %w", n.dir, err)
	}
	return nil
}
