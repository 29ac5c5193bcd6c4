package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/parts"
)

// program is a process of pawl's, with its output.
type program struct {
	t      *testing.T
	cmd    *exec.Cmd
	said   output
	exited chan struct{} // closed when it has ended
}

// output is safe for concurrent use.
type output struct {
	mu    sync.Mutex // guards text
	text  bytes.Buffer
	fresh chan struct{} // receives a value after each write
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case o.fresh <- struct{}{}:
	default:
	}
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// run starts pawl with arguments.
func run(t *testing.T, args ...string) *program {
	t.Helper()
	return startProgram(t, nil, args...)
}

// startProgram also sets variables, each as NAME=VALUE. The tests run in parallel: t.Setenv is not for them.
func startProgram(t *testing.T, variables []string, args ...string) *program {
	t.Helper()
	p := &program{t: t, cmd: exec.Command("pawl", args...), exited: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), variables...)
	p.said.fresh = make(chan struct{}, 1)
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // ProcessState has the result
		close(p.exited)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it may have ended
		<-p.exited
	})
	return p
}

// says waits until the output has text.
func (p *program) says(text string) {
	p.t.Helper()
	limit := time.After(time.Minute)
	for !strings.Contains(p.said.String(), text) {
		select {
		case <-p.said.fresh:
		case <-p.exited:
			if !strings.Contains(p.said.String(), text) {
				p.t.Fatalf("pawl ended (%v) and did not say %q:\n%s", p.cmd.ProcessState, text, p.said.String())
			}
		case <-limit:
			p.t.Fatalf("pawl does not say %q:\n%s", text, p.said.String())
		}
	}
}

func (p *program) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// ends waits for the end and returns how it ended.
func (p *program) ends() string {
	p.t.Helper()
	select {
	case <-p.exited:
		return p.cmd.ProcessState.String()
	case <-time.After(time.Minute):
		p.t.Fatalf("pawl still runs:\n%s", p.said.String())
		return ""
	}
}

// stopping is a real broker, in a process of its own, that is to be stopped while it works.
type stopping struct {
	t        *testing.T
	env      *dev.Env
	broker   *program
	address  string // of its agents' listener
	agent    *agent.Client
	held     *agent.Delegation
	operator *operator.Client
	sealed   string // the grant of a sealed secret that nothing collects
	answer   chan error
}

// newStopping has one sealed secret that waits, and one step under way at a Vault that does not answer.
func newStopping(t *testing.T) *stopping {
	t.Helper()
	parts.NeedVault(t)
	env, err := dev.Start(t.Context(), dev.Config{External: true, NoPostgres: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(env.Close)
	s := &stopping{t: t, env: env, answer: make(chan error, 1)}
	s.start()
	if s.agent, err = agent.New(agent.Config{Address: s.address,
		Source: env.Identities.Source(dev.Agent("planner")), ServerID: dev.BrokerID}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.agent.Close() }) // it always succeeds
	if s.operator, err = operator.New(operator.Config{Address: "unix:" + env.Config.Listen.Socket}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.operator.Close)
	chain := agent.Chain{Task: "stop", Rights: []agent.Right{{Tool: "tls.call", Use: true}}}
	if s.held, err = s.agent.Open(t.Context(), chain); err != nil {
		t.Fatal(err)
	}
	key, err := agent.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	call := agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}}
	sealed := call
	sealed.Seal = &agent.Seal{Key: key.Public()}
	step, err := s.held.Begin(t.Context(), sealed)
	if err != nil {
		t.Fatal(err)
	}
	s.sealed = string(step.Grant().ID)
	if err := env.Vault.Pause(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = env.Vault.Continue() }) // it may run again
	go func() {
		_, err := s.held.Begin(context.Background(), call)
		s.answer <- err
	}()
	s.until("a step is under way", func() bool {
		view, err := s.operator.Chain(t.Context(), string(s.held.Info().Chain))
		return err == nil && len(view.Grants) == 2
	})
	return s
}

func (s *stopping) start() {
	s.t.Helper()
	s.broker = run(s.t, "server", "--config", s.env.ConfigFile)
	s.broker.says(`"msg":"serving"`)
	_, rest, _ := strings.Cut(s.broker.said.String(), `"agents":"`)
	address, _, _ := strings.Cut(rest, `"`)
	s.address = "https://" + address
}

func (s *stopping) until(what string, ok func() bool) {
	s.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); !ok(); {
		select {
		case <-tick.C:
		case <-limit:
			s.t.Fatalf("not within a minute: %s\n%s", what, s.broker.said.String())
		}
	}
}

// socket asks the broker over the operators' socket, on a connection of its own.
func (s *stopping) socket(path string) (*http.Response, error) {
	h := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.env.Config.Listen.Socket)
		}}}
	return h.Get("http://pawl" + path)
}

// expectDrain fails unless the broker refuses steps by name, is not ready, and takes a fence.
func (s *stopping) expectDrain() {
	s.t.Helper()
	s.until("GET /healthz is 503", func() bool {
		resp, err := s.socket("/healthz")
		if err != nil {
			s.t.Fatalf("GET /healthz while it stops = %v, want an answer", err)
		}
		_ = resp.Body.Close() // only the status counts
		return resp.StatusCode == http.StatusServiceUnavailable
	})
	call := agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}}
	_, err := s.held.Begin(s.t.Context(), call)
	var p *agent.Error
	if !errors.As(err, &p) || p.Code != "stopping" || p.RetryAfter() == 0 {
		s.t.Errorf("a new step while it stops = %v, want the code stopping and a time to wait", err)
	}
	rv, err := s.operator.Revoke(s.t.Context(), api.RevokeRequest{Selector: "chain:" + string(s.held.Info().Chain),
		Reason: "while it stops", Freeze: true})
	if err != nil || rv.Fenced.IsZero() {
		s.t.Errorf("a freeze while it stops = %+v, %v, want fenced", rv, err)
	}
}

// TestStop ends a broker in the middle of its work. The real binary has a real Vault, which does not answer: then it
// does, or the broker gives the step up.
func TestStop(t *testing.T) {
	for _, row := range []struct {
		name   string
		signal syscall.Signal
		answer bool
	}{{"TERM, and Vault answers", syscall.SIGTERM, true}, {"INT, and Vault does not", syscall.SIGINT, false}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := newStopping(t)
			follow := make(chan error, 1)
			streams, err := client.New(client.Config{Address: s.address,
				Source: s.env.Identities.Source(dev.Agent("planner")), ServerID: dev.BrokerID})
			if err != nil {
				t.Fatal(err)
			}
			defer streams.Close()
			open := make(chan struct{}, 100)
			go func() {
				follow <- streams.Follow(t.Context(), "/v1/delegations/"+string(s.held.ID())+"/events",
					func(client.Event) error { open <- struct{}{}; return nil })
			}()
			<-open
			s.broker.signal(row.signal)
			s.broker.says("stopping: no new steps")
			s.expectDrain()
			if row.answer {
				if err := s.env.Vault.Continue(); err != nil {
					t.Fatal(err)
				}
			}
			var p *agent.Error
			if err := <-s.answer; !errors.As(err, &p) || p.Code == api.CodeNoAnswer {
				t.Errorf("the step under way = %v, want an answer of the broker", err) // it was frozen meanwhile
			}
			if how := s.broker.ends(); how != "exit status 0" {
				t.Errorf("the broker ended with %s, want status 0:\n%s", how, s.broker.said.String())
			}
			if err := <-follow; err != nil {
				t.Errorf("the stream ended with %v, want its regular end", err)
			}
			s.broker.says(`"msg":"a sealed secret was not collected, and is ended","grant":"` + s.sealed)
			if strings.Contains(s.broker.said.String(), "took too long") {
				t.Errorf("the broker did not end by itself:\n%s", s.broker.said.String())
			}
			_ = s.env.Vault.Continue() // it may run already
			s.start()
			s.until("every grant is closed", func() bool {
				view, err := s.operator.Chain(t.Context(), string(s.held.Info().Chain))
				for _, g := range view.Grants {
					if g.State != "CLOSED" {
						return false
					}
				}
				return err == nil && len(view.Grants) == 2
			})
			page, err := s.operator.Audit(t.Context(), 0, 1000)
			named := false
			for _, e := range page.Entries {
				named = named || e.Grant == s.sealed && strings.Contains(e.Detail, "stopped before the sealed secret was collected")
			}
			if err != nil || !named {
				t.Errorf("the audit log does not name the end of the sealed secret (%v)", err)
			}
		})
	}
}

// TestStopTwice sends a second signal while the broker waits for a step.
func TestStopTwice(t *testing.T) {
	t.Parallel()
	s := newStopping(t)
	s.broker.signal(syscall.SIGTERM)
	s.broker.says("stopping: no new steps")
	s.broker.signal(syscall.SIGTERM)
	if how := s.broker.ends(); how != "exit status 143" {
		t.Errorf("the broker ended with %s, want status 143 at the second signal", how)
	}
}

// TestStopDev ends `pawl dev` and `pawl demo` early. Nothing of them stays.
func TestStopDev(t *testing.T) {
	t.Parallel()
	parts.NeedVault(t)
	temporary := []string{"TMPDIR=" + t.TempDir()}
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		p := startProgram(t, temporary, "dev", "--no-postgres")
		p.says("ready; interrupt to stop")
		p.signal(signal)
		if how := p.ends(); how != "exit status 0" {
			t.Errorf("pawl dev ended with %s after %v, want status 0:\n%s", how, signal, p.said.String())
		}
	}
	p := startProgram(t, temporary, "demo", "--no-postgres", "--timeline", "")
	p.says("pawl: starting the broker")
	p.signal(syscall.SIGTERM)
	if how := p.ends(); how != "exit status 1" {
		t.Errorf("pawl demo ended with %s, want status 1, because it was interrupted:\n%s", how, p.said.String())
	}
}
