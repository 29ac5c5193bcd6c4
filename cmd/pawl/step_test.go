package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// stepper runs `pawl step` against a real broker with a real Vault.
type stepper struct {
	t         *testing.T
	env       *dev.Env
	broker    *program
	dir       string
	variables []string // of the steps' processes
	operator  *operator.Client
}

func newStepper(t *testing.T) *stepper {
	t.Helper()
	parts.NeedVault(t)
	env, err := dev.Start(t.Context(), dev.Config{External: true, NoPostgres: true, Agents: freeAddress(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(env.Close)
	s := &stepper{t: t, env: env, dir: t.TempDir()}
	s.start()
	if s.operator, err = operator.New(operator.Config{Address: "unix:" + env.Config.Listen.Socket}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.operator.Close)
	socket, err := env.Identities.Socket(dev.Agent("planner"))
	if err != nil {
		t.Fatal(err)
	}
	s.variables = []string{"PAWL_ADDRESS=https://" + env.Config.Listen.Agents, "PAWL_SERVER_ID=" + dev.BrokerID.String(),
		"SPIFFE_ENDPOINT_SOCKET=" + socket, "DIR=" + s.dir}
	return s
}

func (s *stepper) start() {
	s.t.Helper()
	s.broker = run(s.t, "server", "--config", s.env.ConfigFile)
	s.broker.says(`"msg":"serving"`)
}

// step runs a shell script with a secret. The script says when it is ready.
func (s *stepper) step(script string, flags ...string) *program {
	s.t.Helper()
	args := append([]string{"step", "--tool", "tls.call", "--arg", "name=a.agents.pawl.dev"}, flags...)
	return startProgram(s.t, s.variables, append(args, "--", "sh", "-c", script)...)
}

// chain is that of the only step that is open.
func (s *stepper) chain() api.ChainView {
	s.t.Helper()
	list, err := s.operator.Chains(s.t.Context(), true)
	if err != nil || len(list) == 0 {
		s.t.Fatalf("Chains = %v, %v, want one", list, err)
	}
	view, err := s.operator.Chain(s.t.Context(), list[0].Chain.ID)
	if err != nil || len(view.Grants) != 1 {
		s.t.Fatalf("Chain = %+v, %v, want one grant", view, err)
	}
	return view
}

func (s *stepper) revoke() {
	s.t.Helper()
	_, err := s.operator.Revoke(s.t.Context(), api.RevokeRequest{Selector: "chain:" + s.chain().Chain.ID, Reason: "test"})
	if err != nil {
		s.t.Fatal(err)
	}
}

// until waits for a condition that other processes make true.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); !ok(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// pid reads the id of a process that the script wrote to a file.
func (s *stepper) pid(file string) (pid int) {
	s.t.Helper()
	until(s.t, file+" has a process id", func() bool {
		raw, err := os.ReadFile(filepath.Join(s.dir, file))
		if err == nil && strings.HasSuffix(string(raw), "\n") {
			pid, err = strconv.Atoi(strings.TrimSpace(string(raw)))
		}
		return err == nil && pid > 0
	})
	return pid
}

func runs(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(raw), ") ")
	return !strings.HasPrefix(after, "Z")
}

func freeAddress(t *testing.T) string {
	t.Helper()
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// TestStepEndsAll revokes a step whose command has children that ignore TERM, one of them in a session of its own. None
// lives on with the secret.
func TestStepEndsAll(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Log("other systems show no process that left the group")
		return
	}
	t.Parallel()
	s := newStepper(t)
	p := s.step(`
		setsid sh -c 'trap "" TERM; (sleep 600 & echo $! > $DIR/deep); echo $$ > $DIR/own; while :; do sleep 600; done' &
		sh -c 'trap "" TERM; echo $$ > $DIR/child; while :; do sleep 600; done' &
		trap 'echo got TERM; exit 7' TERM
		while [ ! -s $DIR/deep ] || [ ! -s $DIR/own ] || [ ! -s $DIR/child ]; do sleep 0.05; done
		echo ready; while :; do sleep 600 & wait $!; done`, "--grace", "200ms")
	p.says("ready")
	pids := []int{s.pid("own"), s.pid("deep"), s.pid("child")}
	s.revoke()
	if how := p.ends(); how != "exit status 1" {
		t.Errorf("pawl step ended with %s, want status 1:\n%s", how, p.said.String())
	}
	for i, pid := range pids {
		if runs(pid) {
			t.Errorf("descendant %d of a revoked step still runs, as process %d", i, pid)
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
	}
	if text := p.said.String(); !strings.Contains(text, "got TERM") || !strings.Contains(text, "was stopped, because its step ended") {
		t.Errorf("pawl step said:\n%s\nwant TERM at the command, and the reason", text)
	}
}

// TestStepSignals sends each signal to pawl. The command gets it.
func TestStepSignals(t *testing.T) {
	t.Parallel()
	s := newStepper(t)
	p := s.step(`for s in HUP INT QUIT USR1 USR2 WINCH TERM; do trap "echo got $s." $s; done
		trap 'exit 9' ALRM; echo $$ > $DIR/shell; echo ready; while :; do sleep 0.05; done`)
	p.says("ready")
	for name, sig := range map[string]syscall.Signal{"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT,
		"USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2, "WINCH": syscall.SIGWINCH, "TERM": syscall.SIGTERM} {
		p.signal(sig)
		p.says("got " + name + ".")
	}
	if err := syscall.Kill(s.pid("shell"), syscall.SIGALRM); err != nil {
		t.Fatal(err)
	}
	if how := p.ends(); how != "exit status 9" {
		t.Errorf("pawl step ended with %s, want the command's status 9", how)
	}
	for _, row := range []struct{ script, want string }{
		{"kill -TERM $$", "exit status 143"}, {"kill -KILL $$", "exit status 137"}, {"exit 5", "exit status 5"}, {"true", "exit status 0"},
	} {
		if how := s.step(row.script).ends(); how != row.want {
			t.Errorf("pawl step -- sh -c %q ended with %s, want %s", row.script, how, row.want)
		}
	}
	args := []string{"step", "--tool", "tls.call", "--arg", "name=a.agents.pawl.dev", "--"}
	if how := startProgram(t, s.variables, append(args, "no-such-command")...).ends(); how != "exit status 127" {
		t.Errorf("a command that does not exist: %s, want status 127", how)
	}
	if how := startProgram(t, s.variables, append(args, s.dir)...).ends(); how != "exit status 126" {
		t.Errorf("a command that is a directory: %s, want status 126", how)
	}
}

// TestStepKilled kills pawl with KILL. The broker ends the grant because its holder is gone, and the command dies.
func TestStepKilled(t *testing.T) {
	t.Parallel()
	s := newStepper(t)
	p := s.step("echo $$ > $DIR/command; echo ready; exec sleep 600")
	p.says("ready")
	command, view := s.pid("command"), s.chain()
	p.signal(syscall.SIGKILL)
	p.ends()
	until(t, "the grant is closed", func() bool {
		view = s.chain()
		return view.Grants[0].State == "CLOSED"
	})
	if g := view.Grants[0]; g.Ending != "lost" || !g.Ended.Before(g.Expires) {
		t.Errorf("the grant ended as %q at %v, want lost, before it expires at %v", g.Ending, g.Ended, g.Expires)
	}
	if runtime.GOOS == "linux" {
		until(t, "the command has died", func() bool { return !runs(command) })
	}
}

// TestStepSurvivesBroker restarts the broker under a step. The step goes on, and is held at the new process.
func TestStepSurvivesBroker(t *testing.T) {
	t.Parallel()
	s := newStepper(t)
	p := s.step(`trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done`)
	p.says("ready")
	s.broker.signal(syscall.SIGTERM)
	s.broker.ends()
	s.start()
	s.broker.says(`"path":"/v1/grants/{id}/hold","status":200`) // the first request at the new process has ended
	if g := s.chain().Grants[0]; g.State != "ISSUED" || g.Ending != "" {
		t.Errorf("the grant is %s, ended as %q after a restart, want it still issued", g.State, g.Ending)
	}
	p.signal(syscall.SIGTERM)
	if how := p.ends(); how != "exit status 0" {
		t.Errorf("pawl step ended with %s, want status 0:\n%s", how, p.said.String())
	}
}

// TestStepReaps runs pawl as process 1 of a namespace. It reaps the orphans of its command.
func TestStepReaps(t *testing.T) {
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		t.Log("a namespace of processes needs Linux and root")
		return
	}
	t.Parallel()
	s := newStepper(t)
	pawl, err := exec.LookPath("pawl")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	script := `for i in 1 2 3 4 5; do (sh -c 'exit 0' &); done
		for n in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; z=$(grep -l "^State:.Z" /proc/[0-9]*/status 2>/dev/null | wc -l)
		[ "$z" = 0 ] && echo no zombies && exit 0; done; echo "$z zombies"; exit 1`
	c := exec.CommandContext(ctx, "unshare", "--fork", "--pid", "--mount-proc", pawl, "step", "--tool", "tls.call",
		"--arg", "name=a.agents.pawl.dev", "--", "sh", "-c", script)
	c.Env = append(os.Environ(), s.variables...)
	if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "no zombies") {
		t.Errorf("pawl step as process 1: %v\n%s", err, out)
	}
}

// freePort returns an address with a port that is free.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
