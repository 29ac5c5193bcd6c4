package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
	"github.com/pawlsec/pawl/cmd/dev"
)

// measureConnections opens idle TLS connections to the broker, of one agent over HTTP/2, and to Vault.
func measureConnections(ctx context.Context, b *bench) error {
	const n = 500
	w := b.world
	ours, err := process.GrownBy(w.broker.PID(), n, func() (close func(), err error) {
		c, err := client.New(client.Config{Address: "https://" + w.broker.Agents, ServerID: dev.BrokerID,
			Source: w.env.Identities.Source(dev.Agent("bench-idle")), Fresh: time.Minute})
		if err != nil {
			return nil, err
		}
		_, err = c.Fetch(ctx, "/v1/nothing")
		if p := new(api.Problem); !errors.As(err, &p) { // the answer of a broker
			return c.Close, fmt.Errorf("the broker gave no answer: %w", err)
		}
		return c.Close, nil
	})
	if err != nil {
		return err
	}
	var beside report.Samples
	if w.vaultPID != 0 {
		theirs, err := process.GrownBy(w.vaultPID, n, func() (close func(), err error) {
			c := w.direct.As(w.env.Vault.RootToken())
			_, err = c.Ask(ctx, "GET", "sys/health", nil)
			return c.Close, err
		})
		if err != nil {
			return err
		}
		beside = report.Samples{theirs}
	}
	b.report.Add(report.Row{Name: "idle.tls_kb", Unit: "kB", N: n, Against: "Vault, over HTTP/1.1 and without client certificates",
		Note: "resident memory of the process for each idle connection, after one request on it"}, report.Samples{ours}, beside)
	return nil
}
