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
	"github.com/pawlsec/pawl/cmd/dev"
)

// errHeard ends a stream that has told what it was opened for.
var errHeard = errors.New("heard")

// measureEvents opens streams of events on one chain, 200 for each of its agents, fences the
// chain and times when each stream has told of it.
func measureEvents(ctx context.Context, b *bench) error {
	const perAgent = 200 // over one connection, which takes 250 requests at once
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
	l := &listening{}
	l.ready.Add(listeners)
	l.done.Add(listeners)
	for i := range listeners / perAgent {
		name := fmt.Sprintf("listener-%d", i)
		id, err := d.Delegate(ctx, dev.Agent(name).String(), agent.Share{Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
		if err != nil {
			return err
		}
		c, err := client.New(client.Config{Address: "https://" + w.broker.agents, Source: w.env.Identities.Source(dev.Agent(name)),
			ServerID: dev.BrokerID, Fresh: time.Minute})
		if err != nil {
			return err
		}
		defer c.Close()
		first := make(chan struct{})
		go l.listen(ctx, c, "/v1/delegations/"+string(id)+"/events", first)
		<-first // now there is a connection for the others
		for range perAgent - 1 {
			go l.listen(ctx, c, "/v1/delegations/"+string(id)+"/events", make(chan struct{}))
		}
	}
	l.ready.Wait()
	if err := l.failed(); err != nil {
		return err
	}
	before, _ := resident(w.broker.cmd.Process.Pid) // zero where it cannot be read
	l.begin()
	if _, err := w.operator.Revoke(ctx, api.RevokeRequest{Selector: "chain:" + string(d.Info().Chain), Reason: "bench"}); err != nil {
		return err
	}
	fenced := ms(time.Since(l.began))
	l.done.Wait()
	if err := l.failed(); err != nil {
		return err
	}
	b.report.addQuantile(row{Name: "events.listeners_10000.p99_ms", Unit: "ms", Against: "the answer to the command, which says fenced",
		Note: fmt.Sprintf("%d streams over mTLS; the listeners run on the same processors", listeners)}, 0.99, l.heard, samples{fenced})
	b.report.add(row{Name: "events.listeners_10000.rss_mb", Unit: "MB", N: listeners, Note: "of the broker with all streams open"}, samples{before / 1e6}, nil)
	return nil
}

// listening is many streams and what they heard.
type listening struct {
	ready, done sync.WaitGroup

	mu    sync.Mutex // guards what follows
	began time.Time
	heard samples
	err   error
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

// listen follows a stream until it tells of the fence; opened is closed once it has begun.
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
		return errHeard
	})
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if errors.Is(err, errHeard) {
		l.heard = append(l.heard, ms(now.Sub(l.began)))
	} else if l.err == nil {
		l.err = fmt.Errorf("a stream ended early, when %d others had told: %v", len(l.heard), err)
	}
}
