package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/plain"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// holders is the number of chains, or of tokens in a Vault without Pawl. Each has its share of the certificates.
const holders = 16

// measureDeadCertificates revokes many certificates at once. It times until the list that Vault serves is shown to
// have each of them.
func measureDeadCertificates(ctx context.Context, b *bench) error {
	n := pick(b, 2000, 200)
	var ours, theirs report.Samples
	for range pick(b, 3, 1) {
		for _, way := range []struct {
			took  *report.Samples
			begin func(context.Context, *world, int) (serials []string, end func(context.Context) error, err error)
		}{{&ours, certificatesOurs}, {&theirs, certificatesTheirs}} {
			serials, end, err := way.begin(ctx, b.world, n)
			if err != nil {
				return fmt.Errorf("making %d certificates: %w", n, err)
			}
			began := time.Now()
			if err := end(ctx); err != nil {
				return err
			}
			*way.took = append(*way.took, time.Since(began).Seconds())
			if err := b.world.listed(ctx, serials); err != nil {
				return err
			}
		}
	}
	b.report.Add(report.Row{Name: fmt.Sprintf("dead.pki.%d.closed_seconds", n), Unit: "s", N: n * len(ours),
		Against: "Vault alone: the tokens are revoked, and when no lease is left the list is rebuilt once",
		Note:    "until the broker has evidence for each and calls the revocations CLOSED; then an observer finds each on the list"}, ours, theirs)
	return nil
}

// certificatesOurs takes steps under several chains. The command revokes all of them.
func certificatesOurs(ctx context.Context, w *world, n int) (serials []string, end func(context.Context) error, err error) {
	agents, err := w.agents(holders)
	if err != nil {
		return nil, nil, err
	}
	defer closeAgents(agents)
	chains, serials := make([]string, holders), make([]string, n)
	err = each(holders, holders, func(i int) error {
		d, err := agents[i].Open(ctx, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: "tls.call", Use: true}}})
		if err != nil {
			return err
		}
		defer d.Leave()
		chains[i] = string(d.Info().Chain)
		for k := i; k < n && err == nil; k += holders {
			var s *agent.Step
			if s, err = d.Begin(ctx, agent.Call{Tool: "tls.call", Args: agent.Args{"name": "a.agents.pawl.dev"}}); err == nil {
				serials[k] = s.Secret().Field("serial_number")
			}
		}
		return err
	})
	return serials, func(ctx context.Context) error { return w.revoke(ctx, chains) }, err
}

// certificatesTheirs makes the same certificates under as many tokens. Revoking a token only enqueues the work, so
// the command waits until no lease is left, and then rebuilds the list.
func certificatesTheirs(ctx context.Context, w *world, n int) (serials []string, end func(context.Context) error, err error) {
	accessors, serials := make([]string, holders), make([]string, n)
	err = each(holders, holders, func(i int) error {
		token, accessor, err := w.direct.Child(ctx)
		if err != nil {
			return err
		}
		accessors[i] = accessor
		mine := w.direct.As(token)
		defer mine.Close()
		for k := i; k < n && err == nil; k += holders {
			var a plain.Answer
			a, err = mine.Ask(ctx, "POST", "pki/issue/plain", map[string]any{"common_name": "a.agents.pawl.dev", "exclude_cn_from_sans": true, "ttl": "14m"})
			serials[k] = a.Text("serial_number")
		}
		return err
	})
	return serials, func(ctx context.Context) error {
		if err := each(holders, holders, func(i int) error {
			_, err := w.direct.Ask(ctx, "POST", "auth/token/revoke-accessor", map[string]any{"accessor": accessors[i]})
			return err
		}); err != nil {
			return err
		}
		if err := w.direct.NoLeases(ctx, "pki/issue/plain"); err != nil {
			return err
		}
		_, err := w.direct.Ask(ctx, "GET", "pki/crl/rotate", nil)
		return err
	}, err
}

// listed checks, as a relying party would, that the served list has each certificate.
func (w *world) listed(ctx context.Context, serials []string) error {
	a, err := w.direct.Ask(ctx, "GET", "pki/cert/crl", nil)
	if err != nil {
		return err
	}
	block, _ := pem.Decode([]byte(a.Text("certificate")))
	if block == nil {
		return errors.New("vault serves no revocation list")
	}
	crl, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		return err
	}
	revoked := make(map[string]bool, len(crl.RevokedCertificateEntries))
	for _, e := range crl.RevokedCertificateEntries {
		revoked[e.SerialNumber.Text(16)] = true
	}
	for _, s := range serials {
		if !revoked[strings.TrimLeft(strings.ReplaceAll(s, ":", ""), "0")] {
			return errors.New("a certificate that was called dead is not on the list that Vault serves")
		}
	}
	return nil
}
