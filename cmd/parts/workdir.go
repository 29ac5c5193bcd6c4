package parts

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// workdir is the directory of one server, with a watcher that outlives this process. The watcher reads process
// groups, one a line, from a pipe that only this process holds open. The pipe ends at close, or when this process
// dies in any way. The watcher then ends the last group named and removes the directory. An empty line means that no
// group is left to end.
type workdir struct {
	dir     string
	pipe    io.WriteCloser
	watcher *exec.Cmd
}

// The group receives the server's own signal first, because a killed PostgreSQL leaves shared memory behind.
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

// newWorkdir creates a directory that only its owner can enter. signal ("KILL", "QUIT") ends the server.
func newWorkdir(name, signal string) (*workdir, error) {
	dir, err := os.MkdirTemp("", "pawl-"+name+"-")
	if err != nil {
		return nil, fmt.Errorf("creating a directory for %s: %w", name, err)
	}
	// In a group of its own, the watcher is not ended before us by an interrupt at the terminal.
	watcher := exec.Command("/bin/sh", "-c", watchScript, "watch", dir, signal)
	watcher.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	watcher.Dir = "/"
	pipe, err := watcher.StdinPipe()
	if err == nil {
		err = watcher.Start()
	}
	if err != nil {
		_ = os.RemoveAll(dir) // the first error is reported
		return nil, fmt.Errorf("starting the watcher of %s: %w", name, err)
	}
	return &workdir{dir: dir, pipe: pipe, watcher: watcher}, nil
}

func (n *workdir) path(elem ...string) string {
	return filepath.Join(append([]string{n.dir}, elem...)...)
}

// watch names the process group that must not outlive this process; 0 names none.
func (n *workdir) watch(group int) error {
	line := "\n"
	if group > 0 {
		line = fmt.Sprintf("%d\n", group)
	}
	if _, err := io.WriteString(n.pipe, line); err != nil {
		return fmt.Errorf("notifying the watcher: %w", err)
	}
	return nil
}

// close ends the remaining processes and removes the directory. It returns when both are gone.
func (n *workdir) close() error {
	if err := n.pipe.Close(); err != nil {
		return fmt.Errorf("closing the watcher's pipe: %w", err)
	}
	if err := n.watcher.Wait(); err != nil {
		return fmt.Errorf("removing %s: %w", n.dir, err)
	}
	return nil
}
