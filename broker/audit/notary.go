package audit

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Entries reads the ledger's audit log: at most limit entries after a revision, oldest first.
type Entries func(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error)

// From returns the log after a revision, read page by page.
func (read Entries) From(ctx context.Context, after broker.Revision) Log {
	const page = 1000
	return func(yield func(broker.Entry, error) bool) {
		for {
			list, err := read(ctx, after, page)
			if err != nil {
				yield(broker.Entry{}, err)
				return
			}
			for _, e := range list {
				if after = e.Revision; !yield(e, nil) {
					return
				}
			}
			if len(list) < page {
				return
			}
		}
	}
}

// NotaryConfig configures a [Notary]. Every field but Archived is required.
type NotaryConfig struct {
	Source  Source
	Entries Entries
	Signer  *Signer
	Now     func() time.Time

	// Archived returns the tree of the entries that were archived, so that these are not read again. Nil: there are none.
	Archived func(context.Context) (Tree, error)
}

// Notary signs reports and checkpoints of one broker's ledger. Create one with [NewNotary]; it is safe for concurrent
// use.
type Notary struct {
	cfg NotaryConfig

	growing chan struct{} // full while a caller reads the log; guards tree
	tree    Tree
}

// NewNotary validates cfg and returns a notary.
func NewNotary(cfg NotaryConfig) (*Notary, error) {
	if cfg.Source == nil || cfg.Entries == nil || cfg.Signer == nil || cfg.Now == nil {
		return nil, errors.New("audit: every field of NotaryConfig but Archived is required")
	}
	return &Notary{cfg: cfg, growing: make(chan struct{}, 1)}, nil
}

// Report returns the signed report of a revocation as of now. Errors are the engine's: NotFound, Unavailable.
func (n *Notary) Report(ctx context.Context, id broker.RevocationID) ([]byte, error) {
	log := func(after broker.Revision) Log { return n.cfg.Entries.From(ctx, after) }
	r, err := Compile(ctx, n.cfg.Source, log, id, n.cfg.Now())
	if err != nil {
		return nil, err
	}
	return n.cfg.Signer.Sign(r)
}

// Checkpoint returns a signed checkpoint of the present log. The first call reads the whole log, and each later one
// only the new entries.
func (n *Notary) Checkpoint(ctx context.Context) ([]byte, error) {
	select {
	case n.growing <- struct{}{}:
		defer func() { <-n.growing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if n.cfg.Archived != nil && n.tree.Size() == 0 {
		t, err := n.cfg.Archived(ctx)
		if err != nil {
			return nil, fmt.Errorf("reading the tree of the archive: %w", err)
		}
		n.tree = t
	}
	log := n.cfg.Entries.From(ctx, broker.Revision(n.tree.Size()))
	if err := n.tree.Grow(log, 0); err != nil {
		return nil, fmt.Errorf("reading the audit log for a checkpoint: %w", err)
	}
	return n.cfg.Signer.Checkpoint(&n.tree)
}
