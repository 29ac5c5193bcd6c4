package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/cmd/bench/flooder"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/dev"
	"github.com/pawlsec/pawl/cmd/wire"
)

// measureFlood times revocations, and the steps of another agent, while strangers and one agent flood the broker.
func measureFlood(ctx context.Context, b *bench) error {
	if b.late(50 * time.Second) {
		return errLate
	}
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
		return errNoPostgres
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
	f, err := w.startFlooder(ctx, dir)
	if err != nil {
		return err
	}
	defer f.kill()
	before, began := w.processors(f), time.Now()
	loud, err := b.beside(ctx, w, remote)
	if err != nil {
		return err
	}
	share := w.processors(f).since(before, time.Since(began))
	sent, err := f.end()
	if err != nil {
		return err
	}
	peak, err := process.PeakResident(w.broker.PID())
	if err != nil {
		return err
	}
	b.reportFlood(quiet, loud, share, sent, peak)
	return nil
}

func (b *bench) reportFlood(quiet, loud besides, share shares, sent flooder.Sent, peak float64) {
	note := fmt.Sprintf("beside %s; they come from a process of its own with a lower priority, which stands for other machines", sent)
	add := func(name string, q float64, ours, theirs timed, note string) {
		if ours.failed > 0 {
			note += "; failed: " + ours.failures()
		}
		b.report.AddQuantile(report.Row{Name: name, Unit: "ms", Against: "the same without the flood", Failed: ours.failed,
			Note: note}, q, ours.took, theirs.took)
	}
	add("flood.revoke.socket.p99_ms", 0.99, loud.socket, quiet.socket, note)
	add("flood.revoke.listener.p99_ms", 0.99, loud.listener, quiet.listener, note)
	add("flood.other.p50_ms", 0.5, loud.steps, quiet.steps, "a db.read step of another agent")
	add("flood.other.p99_ms", 0.99, loud.steps, quiet.steps, "a db.read step of another agent")
	b.report.Add(report.Row{Name: "flood.rss_mb", Unit: "MB", Note: "of the broker, at most"}, report.Samples{peak / 1e6}, nil)
	for _, p := range []struct {
		name  string
		share float64
	}{{"broker", share.broker}, {"flooder", share.flooder}, {"vault", share.vault}, {"idle", share.idle}} {
		b.report.Add(report.Row{Name: "flood.cpu." + p.name, Unit: "% of all processors",
			Note: "during the flood; PostgreSQL and the measuring clients take the rest"}, report.Samples{100 * p.share}, nil)
	}
}

// besides are the requests of those that flood nothing.
type besides struct{ socket, listener, steps timed }

// timed are requests of one kind.
type timed struct {
	took   report.Samples   // of those that succeeded, in milliseconds
	codes  map[api.Code]int // of the others
	failed int
}

// longestRequest is the time after which a request has failed.
const longestRequest = 30 * time.Second

// try makes a request and records it.
func (t *timed) try(ctx context.Context, f func(context.Context) error) {
	ctx, cancel := context.WithTimeout(ctx, longestRequest)
	defer cancel()
	began := time.Now()
	if err := f(ctx); err != nil {
		t.fail(err)
		return
	}
	t.took = append(t.took, ms(time.Since(began)))
}

func (t *timed) fail(err error) {
	if t.codes == nil {
		t.codes = map[api.Code]int{}
	}
	code := api.Code("other")
	if p := new(api.Problem); errors.As(err, &p) {
		code = p.Code
	}
	t.codes[code]++
	t.failed++
}

// failures lists the codes of the requests that failed.
func (t *timed) failures() string {
	var list []string
	for _, c := range slices.Sorted(maps.Keys(t.codes)) {
		list = append(list, fmt.Sprintf("%d %s", t.codes[c], c))
	}
	return strings.Join(list, ", ")
}

// beside takes steps of an agent and revokes each chain, over the socket and the listener in turns.
func (b *bench) beside(ctx context.Context, w *world, remote *operator.Client) (m besides, err error) {
	client, err := w.agent("bench-other")
	if err != nil {
		return m, err
	}
	defer client.Close() //nolint:errcheck // it always succeeds
	start := time.Now()
	for i := range pick(b, 400, 60) {
		if ctx.Err() != nil {
			return m, ctx.Err()
		}
		if b.quick && time.Since(start) > 15*time.Second {
			break
		}
		opening, cancel := context.WithTimeout(ctx, longestRequest)
		d, err := client.Open(opening, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
		cancel()
		if err != nil {
			m.steps.fail(err) // without a chain there is no step
			continue
		}
		m.steps.try(ctx, func(ctx context.Context) error {
			_, err := d.Begin(ctx, agent.Call{Tool: "db.read", Args: agent.Args{"tables": []string{"orders"}}})
			return err
		})
		d.Leave()
		over, of := w.operator, &m.socket
		if i%2 == 1 {
			over, of = remote, &m.listener
		}
		of.try(ctx, func(ctx context.Context) error {
			_, err := over.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "bench"})
			return err
		})
	}
	return m, nil
}

// processors is the processor time that was used since some moment.
type processors struct{ broker, flooder, vault, idle time.Duration }

// shares are parts of the time of all processors.
type shares struct{ broker, flooder, vault, idle float64 }

// processors reads the processor time of the broker, of Vault and of a flooder. What cannot be read is zero.
func (w *world) processors(f *flood) (p processors) {
	p.broker, _ = process.CPUTime(w.broker.PID())
	p.flooder, _ = process.CPUTime(f.cmd.Process.Pid)
	p.vault, _ = process.CPUTime(w.vaultPID)
	p.idle, _ = process.IdleTime()
	return p
}

// since returns the shares of the time that has passed since before.
func (p processors) since(before processors, passed time.Duration) shares {
	all := float64(passed) * float64(runtime.NumCPU())
	return shares{float64(p.broker-before.broker) / all, float64(p.flooder-before.flooder) / all,
		float64(p.vault-before.vault) / all, float64(p.idle-before.idle) / all}
}
