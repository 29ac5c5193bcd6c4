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
	envConfig = "PAWL_E2E_CONFIG" // its configuration file: this process is a broker
	envKill   = "PAWL_E2E_KILL"   // the point at which it kills itself
	envStop   = "PAWL_E2E_STOP"   // the point at which it stops until somebody lets it go on
)

// atOnce is how many runs go on at once unless -parallel says otherwise. Most of a run is waiting.
const atOnce = 4

// sideBySide is how many runs go on at once.
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
		_ = flag.Set("test.parallel", strconv.Itoa(atOnce)) // the flag exists, and -parallel comes after
		os.Exit(m.Run())
	}
	if err := serve(path); err != nil {
		fmt.Fprintln(os.Stderr, "broker:", err)
		os.Exit(1)
	}
}

// serve is a broker until its standard input ends. It says on standard output which points it
// passes, and when it is ready.
func serve(path string) error {
	config, err := wire.ReadConfig(path)
	if err != nil {
		return err
	}
	f := newFaults(func(point string) error {
		fmt.Println("point", point)
		switch point {
		case os.Getenv(envKill):
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // nothing can refuse it
			select {}
		case os.Getenv(envStop):
			// The signal may reach another thread first, and this one would go on meanwhile: it waits for the
			// word to go on as well.
			on := make(chan os.Signal, 1)
			signal.Notify(on, syscall.SIGCONT)
			_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) // nothing can refuse it
			<-on
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := wire.StartWith(ctx, config, slog.New(slog.NewTextHandler(os.Stderr, nil)), f.install)
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
	ready  chan string   // gets the agents' address
	exited chan struct{} // closed when it is gone
	passed chan struct{} // has a value after a point was passed
	met    chan struct{} // closed at the point at which it kills or stops itself

	mu     sync.Mutex // guards points and log
	points []string
	log    strings.Builder
}

// startProcess starts a broker that reads a configuration file, and waits until it serves, stands
// still or is gone.
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
	go p.read(out)
	select {
	case address := <-p.ready:
		p.ready <- address
	case <-p.met: // it stands still, or is about to be gone
	case <-p.exited:
	case <-time.After(30 * time.Second):
		t.Fatalf("the broker is neither ready nor gone:\n%s", p.said())
	}
	return p
}

// with sets a variable of the process.
func with(name, value string) func(*exec.Cmd) {
	return func(c *exec.Cmd) { c.Env = append(c.Env, name+"="+value) }
}

func (p *process) read(out io.Reader) {
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
	}
	_ = p.cmd.Wait() // how it ended is what the test knows already
	close(p.exited)
}

// Write takes what the process logs.
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
			t.Fatalf("the broker did not come to %q", point)
		}
	}
}

// gone waits until the process is gone.
func (p *process) gone(t *testing.T) {
	t.Helper()
	select {
	case <-p.exited:
	case <-time.After(20 * time.Second):
		t.Fatalf("the broker lives on:\n%s", p.said())
	}
}

// end stops the broker in order.
func (p *process) end(t *testing.T) {
	t.Helper()
	_ = p.stdin.Close() // it is the sign to end
	p.gone(t)
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may be gone
	<-p.exited
}
