// Package flooder floods a broker from a process of its own: it stands for the other machines from which a flood comes.
package flooder

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/pawlsec/pawl/cmd/bench/report"
)

// The flood: silent connections, loops of one agent that never pause, and bodies that do not come. The broker closes
// connections, and the flooder replaces them at a steady rate: otherwise one machine would spend its time on both sides
// of handshakes.
const (
	silentMost = 20_000
	loops      = 512
	bodiesMost = 1000

	silentPerSecond = 500 // new connections, when all are open
	bodiesPerSecond = 100 // new connections with an SVID and a slow body

	addresses = 100 // of the silent connections
	// IDs is how many SPIFFE IDs the slow bodies have, each with an address of its own.
	IDs = 32
)

// Orders tell a flooder where to send its flood, and as whom.
type Orders struct {
	Address string // of the agents' listener
	Path    string // of the loops' requests
	Loud    Identity
	Slow    []Identity
}

// Identity is an SVID and its key, as PEM.
type Identity struct{ Certificate, Key []byte }

// Sent has the counts of a flood since it was complete.
type Sent struct {
	Silent         int   // open connections, as far as the flooder knows
	Connected      int64 // silent connections that were opened
	Bodies         int64 // slow bodies that were begun
	Limited        int64 // requests of the loops with answer 429
	Answered, Lost int64 // with another answer, and without one
	Seconds        float64
}

// String describes the flood.
func (s Sent) String() string {
	per := func(n int64) string { return report.Figure(float64(n) / s.Seconds) }
	return fmt.Sprintf("%d silent connections, of which %s a second are new; %d loops of one agent with %s answers 429 a second, "+
		"%s others and %s without an answer; %d slow bodies, of which %s a second are new",
		s.Silent, per(s.Connected), loops, per(s.Limited), per(s.Answered), per(s.Lost), bodiesMost, per(s.Bodies))
}

// flooding is the flood, in its own process.
type flooding struct {
	Orders
	running                                                sync.WaitGroup
	open, connected, bodies, limited, answered, unanswered atomic.Int64
}

// Run floods as the orders in a file say, until the standard input ends. It prints a line when the flood is complete,
// and its [Sent] at the end.
func Run(ctx context.Context, file string) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	f := &flooding{}
	if err := json.Unmarshal(raw, &f.Orders); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // the parent has ended the flood, or has ended itself
		stop()
	}()
	silent, err := f.begin(ctx)
	if err != nil {
		stop()
		return err
	}
	for start := time.Now(); f.open.Load() < int64(silent) || f.bodies.Load() < bodiesMost; {
		if pause(ctx, 10*time.Millisecond); ctx.Err() != nil || time.Since(start) > 30*time.Second { // the counts tell
			break
		}
	}
	before, began := f.sent(), time.Now()
	fmt.Println("ready")
	<-ctx.Done()
	s := f.sent()
	s.Seconds = time.Since(began).Seconds()
	s.Connected, s.Bodies = s.Connected-before.Connected, s.Bodies-before.Bodies
	s.Limited, s.Answered, s.Lost = s.Limited-before.Limited, s.Answered-before.Answered, s.Lost-before.Lost
	f.running.Wait()
	return json.NewEncoder(os.Stdout).Encode(s)
}

func (f *flooding) sent() Sent {
	return Sent{Silent: int(f.open.Load()), Connected: f.connected.Load(), Bodies: f.bodies.Load(),
		Limited: f.limited.Load(), Answered: f.answered.Load(), Lost: f.unanswered.Load()}
}

// begin starts the flood. It returns how many silent connections there will be: as many as this process may have files.
func (f *flooding) begin(ctx context.Context) (silent int, err error) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return 0, err
	}
	each := min(silentMost, int(files.Cur)-bodiesMost-200) / addresses
	fill, renew := rate.NewLimiter(4000, 1), rate.NewLimiter(silentPerSecond, 1)
	for i := range addresses {
		local := &net.TCPAddr{IP: net.IPv4(127, 0, 2, byte(1+i))}
		f.running.Go(func() { f.keepOpen(ctx, local, each, fill, renew) })
	}
	loud, err := f.Loud.tls("h2")
	if err != nil {
		return 0, err
	}
	clients := make([]*http.Client, 8)
	for i := range clients {
		clients[i] = &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: loud.Clone()}}
	}
	for i := range loops {
		f.running.Go(func() { f.loop(ctx, clients[i%len(clients)]) })
	}
	bodies := rate.NewLimiter(bodiesPerSecond, 1)
	for i := range bodiesMost {
		config, err := f.Slow[i%IDs].tls("http/1.1")
		if err != nil {
			return 0, err
		}
		local := &net.TCPAddr{IP: net.IPv4(127, 0, 3, byte(1+i%IDs))}
		f.running.Go(func() { f.slowBodies(ctx, local, config, bodies) })
	}
	return each * addresses, nil
}

// tls returns the configuration of a client that checks no server: it saves the time.
func (id Identity) tls(proto string) (*tls.Config, error) {
	cert, err := tls.X509KeyPair(id.Certificate, id.Key)
	if err != nil {
		return nil, err
	}
	if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, NextProtos: []string{proto}}, nil
}

// loop takes steps without a pause.
func (f *flooding) loop(ctx context.Context, c *http.Client) {
	for ctx.Err() == nil {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+f.Address+f.Path,
			strings.NewReader(`{"tool":"db.read","args":{"tables":["orders"]}}`))
		if err != nil {
			return
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := c.Do(req)
		if err != nil {
			f.unanswered.Add(1)
			pause(ctx, 100*time.Millisecond)
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

// keepOpen keeps n silent connections open from one address. Then it replaces the oldest, again and again.
func (f *flooding) keepOpen(ctx context.Context, local net.Addr, n int, fill, renew *rate.Limiter) {
	open := make(chan net.Conn, n)
	d := net.Dialer{LocalAddr: local, Timeout: time.Second}
	for pace := fill; pace.Wait(ctx) == nil; {
		if len(open) == n {
			pace = renew
			_ = (<-open).Close()
			f.open.Add(-1)
		}
		if c, err := d.DialContext(ctx, "tcp", f.Address); err == nil {
			open <- c
			f.open.Add(1)
			f.connected.Add(1)
		}
	}
	close(open)
	for c := range open {
		_ = c.Close()
	}
}

// slowBodies sends a header and the first byte of its body, again whenever the broker ends the connection.
func (f *flooding) slowBodies(ctx context.Context, local net.Addr, config *tls.Config, pace *rate.Limiter) {
	d := tls.Dialer{NetDialer: &net.Dialer{LocalAddr: local, Timeout: 5 * time.Second}, Config: config}
	for pace.Wait(ctx) == nil {
		c, err := d.DialContext(ctx, "tcp", f.Address)
		if err != nil {
			continue
		}
		end := context.AfterFunc(ctx, func() { _ = c.Close() })
		_, _ = io.WriteString(c, "POST /v1/chains HTTP/1.1\r\nHost: pawl\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
		f.bodies.Add(1)
		_, _ = io.Copy(io.Discard, c)
		end()
		_ = c.Close()
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
