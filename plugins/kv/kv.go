// Package kv delivers static secrets from Vault's KV engine, version 2. Such a secret cannot be narrowed and outlives
// every step, so its label is always none.
package kv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Config configures a [Backend].
type Config struct {
	Now func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend] and [broker.Prover]. Safe for concurrent use.
type Backend struct{ now func() time.Time }

// New returns a Backend.
func New(cfg Config) *Backend {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Backend{now: cfg.Now}
}

// Load implements [broker.Backend]. The tool's Path is the mount followed by the secret's path. There are no settings.
// It rejects every label but none, because nothing narrows a static secret.
func (b *Backend) Load(t broker.Tool) error {
	if t.Narrowing != broker.NarrowNone {
		return fmt.Errorf("tool %q: a static secret must be labelled none, not %s", t.Name, t.Narrowing)
	}
	if len(t.Path.Segments()) < 2 {
		return fmt.Errorf("tool %q: the path must be a mount and at least one more segment", t.Name)
	}
	if len(t.Settings) > 0 {
		return fmt.Errorf("tool %q: kv takes no settings", t.Name)
	}
	return nil
}

// Access returns the Vault path of the tool's mint, whether the mint is a write, and whether it yields a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return t.Path.Insert(1, "data"), false, false
}

// Prepare implements [broker.Backend]. The secret is the stored object, unchanged.
func (b *Backend) Prepare(_ context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	if err := b.Load(t); err != nil {
		return broker.Mint{}, "", err
	}
	path, _, _ := b.Access(t)
	return broker.Mint{Path: path, NoLease: true, Finish: finish}, string(g.ID), nil
}

func finish(answer map[string]any, _ time.Time) (broker.Finished, error) {
	data, ok := answer["data"].(map[string]any)
	if !ok || len(data) == 0 {
		return broker.Finished{}, errors.New("kv: the secret is deleted or empty")
	}
	raw, err := json.Marshal(data)
	if err != nil {
		return broker.Finished{}, errors.New("kv: encoding the secret")
	}
	meta, _ := answer["metadata"].(map[string]any)
	version, _ := meta["version"].(json.Number)
	return broker.Finished{Secret: broker.NewSecret(raw), Ref: "version " + version.String()}, nil
}

// Prove implements [broker.Prover]. A static secret works until it is rotated.
func (b *Backend) Prove(_ context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	out := make([]broker.Evidence, len(grants))
	for i := range out {
		out[i] = broker.Evidence{At: b.now().UTC(), Check: "kv: the kind of secret", Outcome: broker.OutcomeStatic,
			Answer: "static: it works until it is rotated"}
	}
	return out, nil
}
