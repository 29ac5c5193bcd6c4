package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/dev"
)

// errFenced ends a stream when the fence has arrived on it.
var errFenced = errors.New("fenced")

// measureEvents opens streams of events on one chain, 200 for each of its agents. It fences the chain and times when
// the fence arrives on each stream.
func measureEvents(ctx context.Context, b *bench) error {
	const perAgent = 200 // over one connection, which allows 250 requests at once
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	w, listeners := b.world, pick(b, 10_000, 1000)
	root, err := w.agent("bench-root")
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // it always succeeds
	d, err := root.Open(ctx, agent.Chain{Task: "bench", Depth: 1, Rights: []agent.Right{{Tool: "notes.read", Delegate: true}}})
	if err != nil {
		return err
	}
	alone, _ := process.Resident(w.broker.PID()) // zero where it cannot be read
	l := &listening{}
	l.ready.Add(listeners)
	l.done.Add(listeners)
	for i := range listeners / perAgent {
		name := fmt.Sprintf("listener-%d", i)
		id, err := d.Delegate(ctx, dev.Agent(name).String(), agent.Share{Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
		if err != nil {
			return err
		}
		c, err := client.New(client.Config{Address: "https://" + w.broker.Agents, Source: w.env.Identities.Source(dev.Agent(name)),
			ServerID: dev.BrokerID, Fresh: time.Minute})
		if err != nil {
			return err
		}
		defer c.Close()
		first := make(chan struct{})
		go l.listen(ctx, c, "/v1/delegations/"+string(id)+"/events", first)
		<-first // the others share its connection
		for range perAgent - 1 {
			go l.listen(ctx, c, "/v1/delegations/"+string(id)+"/events", make(chan struct{}))
		}
	}
	l.ready.Wait()
	if err := l.failed(); err != nil {
		return err
	}
	before, _ := process.Resident(w.broker.PID()) // zero where it cannot be read
	l.begin()
	if _, err := w.operator.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "bench"}); err != nil {
		return err
	}
	fenced := ms(time.Since(l.began))
	l.done.Wait()
	if err := l.failed(); err != nil {
		return err
	}
	b.report.AddQuantile(report.Row{Name: "events.listeners_10000.p99_ms", Unit: "ms",
		Against: "the answer to the command, sent once it is fenced",
		Note:    fmt.Sprintf("%d streams over mTLS; the listeners run on the same processors", listeners)}, 0.99, l.latency, report.Samples{fenced})
	b.report.Add(report.Row{Name: "events.listeners_10000.rss_mb", Unit: "MB", N: listeners,
		Note: "of the broker with all streams open"}, report.Samples{before / 1e6}, nil)
	b.report.Add(report.Row{Name: "events.listeners_10000.kb_each", Unit: "kB", N: listeners,
		Note: fmt.Sprintf("by how much the broker grew for each stream; %d on a connection", perAgent)},
		report.Samples{(before - alone) / float64(listeners) / 1000}, nil)
	return nil
}

// listening is many streams, with the time at which the fence arrived on each.
type listening struct {
	ready, done sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	began   time.Time
	latency report.Samples // from began to the fence, in milliseconds
	err     error
}

func (l *listening) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.began = time.Now()
}

func (l *listening) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// listen follows a stream until the fence arrives. It closes opened after the first event.
func (l *listening) listen(ctx context.Context, c *client.Client, path string, opened chan<- struct{}) {
	var once sync.Once
	ready := func() { once.Do(func() { close(opened); l.ready.Done() }) }
	defer l.done.Done()
	defer ready()
	err := c.Follow(ctx, path, func(ev client.Event) error {
		if ev.Name != api.EventStanding {
			return nil
		}
		var st api.Standing
		if err := ev.Read(&st); err != nil {
			return err
		}
		ready()
		if st.Fence == nil {
			return nil
		}
		return errFenced
	})
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if errors.Is(err, errFenced) {
		l.latency = append(l.latency, ms(now.Sub(l.began)))
	} else if l.err == nil {
		l.err = fmt.Errorf("a stream ended early, after the fence had arrived on %d others: %v", len(l.latency), err)
	}
}
