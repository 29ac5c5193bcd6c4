package wire_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/wire"
)

// brokerEnv names the configuration with which the test program is a broker instead, until its standard input ends.
const brokerEnv = "PAWL_TEST_BROKER"

func TestMain(m *testing.M) {
	if file := os.Getenv(brokerEnv); file != "" {
		if err := runBroker(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func runBroker(file string) error {
	c, err := wire.ReadConfig(file)
	if err != nil {
		return err
	}
	w, err := wire.Start(context.Background(), c, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer w.Close()
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// startLimited starts the site's broker in a process that may have a number of open files. It returns its id.
func (s *site) startLimited(files int) (pid int) {
	s.t.Helper()
	raw, err := yaml.Marshal(s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0"`, files), os.Args[0])
	cmd.Env, cmd.Stderr = append(os.Environ(), brokerEnv+"="+s.file("pawl.yaml", raw)), os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = in.Close() // the broker ends
		if err := cmd.Wait(); err != nil {
			s.t.Errorf("the broker ended with %v", err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		s.t.Fatalf("the broker printed %q, %v", line, err)
	}
	return cmd.Process.Pid
}

// flood opens silent connections and keeps them. Over TCP each address has forty of them.
func flood(t *testing.T, network, address string, n int) {
	t.Helper()
	for i := range n {
		d := net.Dialer{Timeout: time.Second}
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i/40))}
		}
		conn, err := d.Dial(network, address) // it fails when a broker without free files accepts nothing
		if err != nil {
			return
		}
		t.Cleanup(func() { _ = conn.Close() })
	}
}

// TestStrangersTakeNoFiles opens more silent connections, at each listener, than the broker may have files. Operators
// and agents are answered as before, on new connections, and the ledger can still be written.
func TestStrangersTakeNoFiles(t *testing.T) {
	const files = 320
	s := newSite(t, "example.org")
	s.identify()
	s.config.Listen.Operators = freeAddress(t)
	s.config.Operators = []string{s.identities.ID("/operator").String()}
	pid := s.startLimited(files)
	flood(t, "tcp", s.config.Listen.Agents, 2*files)
	flood(t, "tcp", s.config.Listen.Operators, files)
	flood(t, "unix", s.config.Listen.Socket, files)

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	root, err := s.agent().Open(ctx, agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
	if err != nil {
		t.Fatalf("Open by an agent = %v", err)
	}
	selector := "chain:" + string(root.Info().Chain)
	remote, err := operator.New(operator.Config{Address: "https://" + s.config.Listen.Operators,
		Source: s.identities.Source(s.identities.ID("/operator")), ServerID: s.identities.ID("/pawl")})
	if err != nil {
		t.Fatal(err)
	}
	defer remote.Close()
	if _, err := remote.Plan(ctx, selector); err != nil {
		t.Errorf("Plan over the operators' listener = %v", err)
	}
	if _, err := s.operator().Revoke(ctx, api.RevokeRequest{Selector: selector, Reason: "test"}); err != nil {
		t.Errorf("Revoke over the socket = %v", err)
	}
	open, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(open) > files*3/4 {
		t.Errorf("the broker has %d files open, %v; want at most three quarters of %d", len(open), err, files)
	}
	if text := scrape(t, s); !strings.Contains(text, fmt.Sprintf("pawl_files{share=\"kept\"} %d\n", files/4)) ||
		!strings.Contains(text, `pawl_limited_total{limit="stranger_connections",listener="agents"}`) {
		t.Errorf("the metrics do not show the files kept and the limit:\n%s", text)
	}
}

// TestLimitsOfACaller sends more requests than one caller may, over many connections with SVIDs of their own. That
// caller is told so, and another one is not refused.
func TestLimitsOfACaller(t *testing.T) {
	s := newSite(t, "example.org")
	s.identify()
	s.config.Limits = wire.Limits{Requests: 3, Connections: 5}
	w := s.start()
	root := agent.DelegationID(s.open(w, nil).ID)
	var requests, connections atomic.Int64
	var callers sync.WaitGroup
	for range 40 {
		callers.Go(func() {
			_, err := s.agent().Join(t.Context(), root)
			switch p := new(agent.Error); {
			case err == nil:
			case errors.As(err, &p) && errors.Is(err, agent.ErrOverLimit) && p.Code == "too_many_requests" && p.RetryAfterMS > 0:
				requests.Add(1)
			case errors.As(err, &p) && errors.Is(err, agent.ErrOverLimit) && p.Code == "too_many_connections":
				connections.Add(1)
			case errors.Is(err, agent.ErrUnavailable): // a connection far beyond the limit
			default:
				t.Errorf("Join = %v, want success or a limit", err)
			}
		})
	}
	callers.Wait()
	if requests.Load()+connections.Load() == 0 || connections.Load() == 0 {
		t.Errorf("%d refused by rate, %d by connections; want some", requests.Load(), connections.Load())
	}
	other, err := agent.New(agent.Config{Address: "https://" + s.config.Listen.Agents,
		Source: s.identities.Source(s.identities.ID("/other")), ServerID: s.identities.ID("/pawl")})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.Open(t.Context(), agent.Chain{Task: "t",
		Rights: []agent.Right{{Tool: "notes.read", Use: true}}}); err != nil {
		t.Errorf("Open by another caller = %v, want success", err)
	}
	text := scrape(t, s)
	for _, want := range []string{`pawl_limit{limit="requests"} 3`, `pawl_limit{limit="bodies"} 32`,
		`pawl_limited_total{limit="connections",listener="agents"}`} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics have no %s", want)
		}
	}
}

// TestShareOfTheLedger has a caller that opens chains until it has written its share. It can still end its steps, and
// another caller can write.
func TestShareOfTheLedger(t *testing.T) {
	s := newSite(t, "example.org")
	s.identify()
	s.config.Limits = wire.Limits{LedgerPerDay: 1_000_000}
	s.start()
	open := agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "notes.read", Use: true}}}
	loud := s.agent()
	var refusal *agent.Error
	opened := 0
	for ; opened < 1000 && refusal == nil; opened++ {
		_, err := loud.Open(t.Context(), open)
		errors.As(err, &refusal)
	}
	if refusal == nil || refusal.Code != "ledger_share" || refusal.Kind != agent.ErrOverLimit || refusal.RetryAfterMS < 1000 {
		t.Fatalf("after %d chains: %v, want ledger_share", opened, refusal)
	}
	if opened < 20 {
		t.Errorf("%d chains used a quarter of a megabyte up, want more", opened)
	}
	if _, err := loud.EndGrant(t.Context(), "gr000000000000000000000001"); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("EndGrant of a grant that does not exist = %v, want not found", err)
	}
	other, err := agent.New(agent.Config{Address: "https://" + s.config.Listen.Agents,
		Source: s.identities.Source(s.identities.ID("/other")), ServerID: s.identities.ID("/pawl")})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.Open(t.Context(), open); err != nil {
		t.Errorf("Open by another caller = %v, want success", err)
	}
}

// TestShareCountsTheFile writes delegations into a real ledger. The file grows by no more than their caller is charged.
func TestShareCountsTheFile(t *testing.T) {
	s := newSite(t, "example.org")
	w := s.start()
	before := sizeOf(t, s.config.Ledger)
	caller := broker.Caller{ID: s.identities.ID("/agent"), Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
	root, err := w.Broker.Open(t.Context(), caller, broker.OpenRequest{Task: "t", Depth: 1,
		Rights: []broker.Right{{Tool: "notes.read", Use: true, Delegate: true}}})
	if err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for range 64 {
		writers.Go(func() {
			for range 400 {
				if _, err := w.Broker.Delegate(t.Context(), caller, broker.DelegateRequest{From: root.ID, To: caller.ID,
					Rights: []broker.Right{{Tool: "notes.read", Use: true}}}); err != nil {
					t.Errorf("Delegate = %v", err)
					return
				}
			}
		})
	}
	writers.Wait()
	grown, charged := sizeOf(t, s.config.Ledger)-before, w.Charged(caller.ID.String())
	t.Logf("the file grew by %d bytes, and %d were charged", grown, charged)
	if grown > charged || charged > 8*grown {
		t.Errorf("the file grew by %d bytes and %d were charged; want at least as much, and not far more", grown, charged)
	}
}

func sizeOf(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}
