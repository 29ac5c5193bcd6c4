package e2e_test

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/wire"
)

// The environment of a broker in a process of its own.
const (
	envConfig = "PAWL_E2E_CONFIG" // its configuration file; set in a process that is a broker
	envKill   = "PAWL_E2E_KILL"   // the point at which it kills itself
	envStop   = "PAWL_E2E_STOP"   // the point at which it stops until it gets SIGCONT
)

// atOnce is the number of parallel runs without -parallel. A run mostly waits.
const atOnce = 4

// sideBySide gives the number of parallel runs.
func sideBySide() int {
	n, err := strconv.Atoi(flag.Lookup("test.parallel").Value.String())
	if err != nil {
		panic("the flag -parallel is no number")
	}
	return n
}

func TestMain(m *testing.M) {
	path := os.Getenv(envConfig)
	if path == "" {
		// The flag exists, and a -parallel on the command line overrides it.
		_ = flag.Set("test.parallel", strconv.Itoa(atOnce))
		os.Exit(m.Run())
	}
	if err := serve(path); err != nil {
		fmt.Fprintln(os.Stderr, "broker:", err)
		os.Exit(1)
	}
}

// serve runs a broker until its standard input ends. It prints the points that it passes on standard output, a line when
// it is ready, and what the comparison with the OpenAPI document found.
func serve(path string) error {
	config, err := wire.ReadConfig(path)
	if err != nil {
		return err
	}
	f := newFaults(func(point string) error {
		fmt.Println("point", point)
		switch point {
		case os.Getenv(envKill):
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // it cannot fail
			select {}
		case os.Getenv(envStop):
			// The signal may stop another thread first while this one continues. So this one also waits for
			// SIGCONT.
			on := make(chan os.Signal, 1)
			signal.Notify(on, syscall.SIGCONT)
			_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) // it cannot fail
			<-on
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	document().Notify(func(answer string) { fmt.Println("answered", answer) })
	s, err := wire.StartWith(ctx, config, slog.New(slog.NewTextHandler(os.Stderr, nil)), wire.Hooks{Engine: f.install,
		Handler: document().Wrap(func(err error) { fmt.Println("undocumented", strings.Join(strings.Fields(err.Error()), " ")) })})
	if err != nil {
		return err
	}
	fmt.Println("ready", s.Agents())
	_, err = io.Copy(io.Discard, os.Stdin)
	s.Close()
	return err
}

// process is a broker in a process of its own.
type process struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	ready  chan string   // receives the agents' address
	exited chan struct{} // closed when the process has exited
	passed chan struct{} // receives a value after each point
	met    chan struct{} // closed at the point at which it kills or stops itself

	mu     sync.Mutex // guards points and log
	points []string
	log    strings.Builder
}

// startProcess starts a broker with a configuration file, and waits until it serves, is stopped or has exited.
func startProcess(t *testing.T, config string, options ...func(*exec.Cmd)) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(self), ready: make(chan string, 1), exited: make(chan struct{}), passed: make(chan struct{}, 1), met: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), envConfig+"="+config)
	for _, o := range options {
		o(p.cmd)
	}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = io.MultiWriter(p, keptLog(t, config))
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	go p.read(t, out)
	select {
	case address := <-p.ready:
		p.ready <- address
	case <-p.met: // it is stopped, or about to exit
	case <-p.exited:
	case <-time.After(30 * time.Second):
		t.Fatalf("the broker is neither ready nor has it exited:\n%s", p.said())
	}
	return p
}

// with sets a variable of the process.
func with(name, value string) func(*exec.Cmd) {
	return func(c *exec.Cmd) { c.Env = append(c.Env, name+"="+value) }
}

func (p *process) read(t *testing.T, out io.Reader) {
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if point, ok := strings.CutPrefix(lines.Text(), "point "); ok {
			p.mu.Lock()
			p.points = append(p.points, point)
			p.mu.Unlock()
			if slices.Contains(p.cmd.Env, envKill+"="+point) || slices.Contains(p.cmd.Env, envStop+"="+point) {
				close(p.met)
			}
			select {
			case p.passed <- struct{}{}:
			default:
			}
		}
		if address, ok := strings.CutPrefix(lines.Text(), "ready "); ok {
			p.ready <- address
		}
		if answer, ok := strings.CutPrefix(lines.Text(), "answered "); ok {
			document().See(answer)
		}
		if fault, ok := strings.CutPrefix(lines.Text(), "undocumented "); ok {
			t.Errorf("the OpenAPI document is wrong: %s", fault) // the process ends before its test
		}
	}
	_ = p.cmd.Wait() // the test knows already how it ended
	close(p.exited)
}

// Write receives the log of the process.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func (p *process) walked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string{}, p.points...)
}

// reached waits until a point was passed.
func (p *process) reached(t *testing.T, point string) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		for _, have := range p.walked() {
			if have == point {
				return
			}
		}
		select {
		case <-p.passed:
		case <-p.exited:
			t.Fatalf("the broker ended before %q:\n%s", point, p.said())
		case <-deadline:
			t.Fatalf("the broker did not reach %q", point)
		}
	}
}

// gone waits until the process has exited.
func (p *process) gone(t *testing.T) {
	t.Helper()
	select {
	case <-p.exited:
	case <-time.After(20 * time.Second):
		t.Fatalf("the broker still runs:\n%s", p.said())
	}
}

// end stops the broker cleanly.
func (p *process) end(t *testing.T) {
	t.Helper()
	_ = p.stdin.Close() // this ends serve
	p.gone(t)
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have exited
	<-p.exited
}
