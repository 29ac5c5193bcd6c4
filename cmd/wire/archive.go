package wire

import (
	"context"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/store/archive"
)

// openArchive returns the archive of a ledger. It is nil when keep is not set and the ledger lists no segment: then all
// is as if there were no archives.
func openArchive(ctx context.Context, l broker.Ledger, c Config, sign func(string, []byte) ([]byte, error),
) (*archive.Archive, error) {
	a, err := archive.New(archive.Config{Ledger: l, Dir: c.Ledger + ".archive", Sign: sign})
	if err != nil || c.Keep > 0 {
		return a, err
	}
	if list, err := a.List(ctx); err == nil && len(list) == 0 {
		return nil, nil
	}
	return a, nil // an unreadable list: reads say so
}

// ledgers returns the engine's ledger, with its archive if it has one.
func (s *Server) ledgers() (broker.Ledger, broker.Archive) {
	if s.archive == nil {
		return s.Ledger, nil
	}
	return s.archive, s.archive
}
