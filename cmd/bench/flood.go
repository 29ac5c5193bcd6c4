package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/sys/unix"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// The flood: silent connections as many as this process may have files, loops of one agent that never pause, and bodies
// that do not come.
const (
	floodSilent = 20_000
	floodLoops  = 512
	floodBodies = 1000
)

// measureFlood times revocations, and the steps of another agent, while strangers and one agent flood the broker.
func measureFlood(ctx context.Context, b *bench) error {
	dir := filepath.Join(b.dir, "flood")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	w, err := openWorld(ctx, b, dir, dev.Config{MaxConnections: 1300}, wire.Limits{})
	if err != nil {
		return err
	}
	defer w.close()
	if w.env.Postgres == nil {
		return errors.New("there is no PostgreSQL on this machine")
	}
	remote, err := operator.New(operator.Config{Address: "https://" + w.listener,
		Source: w.env.Identities.Source(dev.OperatorID), ServerID: dev.BrokerID})
	if err != nil {
		return err
	}
	defer remote.Close()
	quiet, err := b.beside(ctx, w, remote)
	if err != nil {
		return err
	}
	flooding, stop := context.WithCancel(ctx)
	f := &flood{world: w}
	if err := f.begin(flooding); err != nil {
		stop()
		return err
	}
	flooded, err := b.beside(ctx, w, remote)
	stop()
	f.running.Wait()
	if err != nil {
		return err
	}
	note := fmt.Sprintf("%d silent connections at a time, %d loops with %d answers 429 and %d others, %d slow bodies; %d requests of the others failed",
		f.silent, floodLoops, f.limited.Load(), f.answered.Load(), floodBodies, flooded.failed)
	b.report.addQuantile(row{Name: "flood.revoke.socket.p99_ms", Unit: "ms", Against: "quiet", Note: note}, 0.99,
		flooded.socket, quiet.socket)
	b.report.addQuantile(row{Name: "flood.revoke.listener.p99_ms", Unit: "ms", Against: "quiet"}, 0.99,
		flooded.listener, quiet.listener)
	b.report.addQuantile(row{Name: "flood.other.p99_ms", Unit: "ms", Against: "quiet",
		Note: "a db.read step of another agent"}, 0.99, flooded.steps, quiet.steps)
	b.report.add(row{Name: "flood.rss_mb", Unit: "MB", Note: "of the broker, at most"}, flooded.memory, nil)
	return nil
}

// besides are the latencies of those that flood nothing.
type besides struct {
	socket, listener, steps, memory samples
	failed                          int // requests
}

// beside takes steps of an agent and revokes each chain, over the socket and the listener in turns.
func (b *bench) beside(ctx context.Context, w *world, remote *operator.Client) (m besides, err error) {
	client, err := w.agent("bench-other")
	if err != nil {
		return m, err
	}
	defer client.Close() //nolint:errcheck // it always succeeds
	for i := range pick(b, 200, 60) {
		d, err := client.Open(ctx, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
		if err != nil {
			m.failed++
			continue
		}
		began := time.Now()
		if _, err = d.Begin(ctx, agent.Call{Tool: "db.read", Args: agent.Args{"tables": []string{"orders"}}}); err != nil {
			m.failed++
			d.Leave()
			continue
		}
		m.steps = append(m.steps, ms(time.Since(began)))
		d.Leave()
		over, took := w.operator, &m.socket
		if i%2 == 1 {
			over, took = remote, &m.listener
		}
		began = time.Now()
		if _, err := over.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "bench"}); err != nil {
			m.failed++
			continue
		}
		*took = append(*took, ms(time.Since(began)))
		if rss, err := resident(w.broker.cmd.Process.Pid); err == nil {
			m.memory = samples{max(append(m.memory, 0)[0], rss/1e6)}
		}
	}
	return m, nil
}

type flood struct {
	*world
	silent            int
	running           sync.WaitGroup
	limited, answered atomic.Int64
}

func (f *flood) begin(ctx context.Context) error {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	f.silent = min(floodSilent, int(files.Cur)-3000)
	address := f.broker.agents
	each := f.silent / 100
	for i := range 100 {
		local := &net.TCPAddr{IP: net.IPv4(127, 0, 2, byte(1+i))}
		f.running.Go(func() { keepOpen(ctx, address, local, each) })
	}
	loud, err := f.agent("bench-loud")
	if err != nil {
		return err
	}
	defer loud.Close() //nolint:errcheck // it always succeeds
	d, err := loud.Open(ctx, agent.Chain{Task: "loops", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		return err
	}
	path := "https://" + address + "/v1/delegations/" + string(d.ID()) + "/steps"
	clients := make([]*http.Client, 8)
	for i := range clients {
		clients[i] = &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: f.tls("bench-loud")}}
	}
	for i := range floodLoops {
		f.running.Go(func() { f.loop(ctx, clients[i%len(clients)], path) })
	}
	for i := range floodBodies {
		config := f.tls(fmt.Sprintf("bench-slow-%d", i/32))
		local := &net.TCPAddr{IP: net.IPv4(127, 0, 3, byte(1+i/32))}
		f.running.Go(func() { slowBodies(ctx, address, local, config) })
	}
	return nil
}

func (f *flood) tls(name string) *tls.Config {
	source := f.env.Identities.Source(dev.Agent(name))
	return tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(dev.BrokerID))
}

// loop takes steps without a pause.
func (f *flood) loop(ctx context.Context, c *http.Client, path string) {
	for ctx.Err() == nil {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, path,
			strings.NewReader(`{"tool":"db.read","args":{"tables":["orders"]}}`))
		if err != nil {
			return
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := c.Do(req)
		if err != nil {
			continue
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusTooManyRequests {
			f.limited.Add(1)
		} else {
			f.answered.Add(1)
		}
	}
}

// keepOpen keeps n silent connections open from one address. It replaces the oldest all the time.
func keepOpen(ctx context.Context, address string, local net.Addr, n int) {
	open := make(chan net.Conn, n)
	d := net.Dialer{LocalAddr: local, Timeout: time.Second}
	for ctx.Err() == nil {
		if len(open) == n {
			_ = (<-open).Close()
		}
		if c, err := d.DialContext(ctx, "tcp", address); err == nil {
			open <- c
		}
		if len(open) == n {
			pause(ctx, 500*time.Millisecond)
		}
	}
	close(open)
	for c := range open {
		_ = c.Close()
	}
}

// slowBodies sends a header and the first byte of its body, again whenever the broker ends the connection.
func slowBodies(ctx context.Context, address string, local net.Addr, config *tls.Config) {
	for ctx.Err() == nil {
		d := tls.Dialer{NetDialer: &net.Dialer{LocalAddr: local, Timeout: 5 * time.Second}, Config: config}
		c, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			pause(ctx, 100*time.Millisecond)
			continue
		}
		end := context.AfterFunc(ctx, func() { _ = c.Close() })
		_, _ = io.WriteString(c, "POST /v1/chains HTTP/1.1\r\nHost: pawl\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
		_, _ = io.Copy(io.Discard, c)
		end()
		_ = c.Close()
		pause(ctx, time.Second)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
