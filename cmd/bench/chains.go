package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/operator"
	"github.com/pawlsec/pawl/broker/server"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// measureChains times what an operator sees of a ledger with many open chains: the first page of the list, and the plan
// of a revocation of one agent's eight.
func measureChains(ctx context.Context, b *bench) error {
	const few = 100
	n := pick(b, 100_000, 10_000)
	page, plan, err := b.viewChains(ctx, n)
	if err != nil {
		return err
	}
	pageOfFew, planOfFew, err := b.viewChains(ctx, few)
	if err != nil {
		return err
	}
	against := fmt.Sprintf("a ledger of %d chains", few)
	for _, q := range []struct {
		name string
		of   float64
	}{{"p50_ms", 0.5}, {"p99_ms", 0.99}} {
		b.report.AddQuantile(report.Row{Name: fmt.Sprintf("chains.%d.page.%s", n, q.name), Unit: "ms", Against: against,
			Note: "the first 100 chains of the list, over HTTP"}, q.of, page, pageOfFew)
		b.report.AddQuantile(report.Row{Name: fmt.Sprintf("chains.%d.plan.%s", n, q.name), Unit: "ms", Against: against,
			Note: "a plan for one agent's 8 chains, over HTTP"}, q.of, plan, planOfFew)
	}
	return nil
}

// viewChains makes a ledger with n open chains, serves it to an operator, and times the views.
func (b *bench) viewChains(ctx context.Context, n int) (page, plan report.Samples, err error) {
	e, err := newEngine(ctx, filepath.Join(b.dir, fmt.Sprintf("chains-%d.db", n)))
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	ours := caller()
	ours.ID = spiffeid.RequireFromString("spiffe://pawl.dev/agent/eight")
	if err := each(256, n, func(i int) error {
		c := ours
		if i >= 8 { // the chains of one caller are bounded
			c.ID = spiffeid.RequireFromString(fmt.Sprintf("spiffe://pawl.dev/agent/bench-%d", i%500))
		}
		_, err := e.Open(ctx, c, broker.OpenRequest{Task: "bench", Rights: []broker.Right{{Tool: engineTool, Use: true}}})
		return err
	}); err != nil {
		return nil, nil, err
	}
	client, stop, err := e.serve(filepath.Join(b.dir, "s"))
	if err != nil {
		return nil, nil, err
	}
	defer stop()
	for range pick(b, 500, 100) {
		began := time.Now()
		list, err := client.ChainPage(ctx, false, "", 0)
		if err != nil || len(list.Chains) != broker.DefaultPage {
			return nil, nil, fmt.Errorf("a page of %d chains: %w", len(list.Chains), err)
		}
		page = append(page, ms(time.Since(began)))
		began = time.Now()
		p, err := client.Plan(ctx, "spiffe:"+ours.ID.String())
		if err != nil || p.Chains != 8 {
			return nil, nil, fmt.Errorf("a plan of %d chains: %w", p.Chains, err)
		}
		plan = append(plan, ms(time.Since(began)))
	}
	return page, plan, nil
}

// serve serves the engine to operators over a socket.
func (e *embedded) serve(socket string) (client *operator.Client, stop func(), err error) {
	s, err := server.New(server.Config{Broker: e.Engine, Now: time.Now,
		Identify: func(*http.Request) (broker.Caller, error) { return broker.Caller{}, errors.New("no agent is served") },
		Operator: func(*http.Request) (broker.Operator, error) { return broker.Operator{Name: "ada"}, nil }})
	if err != nil {
		return nil, nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	h := &http.Server{Handler: s.Operators()}
	done := make(chan struct{})
	go func() { defer close(done); _ = h.Serve(l) }() // it ends with Close
	if client, err = operator.New(operator.Config{Address: "unix:" + socket}); err != nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	return client, func() {
		client.Close()
		_ = h.Close() // the client has no request under way
		<-done
	}, nil
}
