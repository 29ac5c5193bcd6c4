package wire

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/store/bolt"
)

// UnfreezeAlone lifts a freeze in the ledger of a stopped broker, as root and without a second person. The audit log and
// later reports show it, with the reason.
func UnfreezeAlone(ctx context.Context, c Config, id broker.RevocationID, reason string) (broker.Revocation, error) {
	if os.Getuid() != 0 {
		return broker.Revocation{}, errors.New("only root may lift a freeze alone")
	}
	if _, err := os.Stat(c.Ledger); err != nil {
		return broker.Revocation{}, fmt.Errorf("ledger: %w", err)
	}
	ledger, err := bolt.Open(bolt.Config{Path: c.Ledger})
	if err != nil {
		return broker.Revocation{}, fmt.Errorf("the broker must be stopped: %w", err)
	}
	rv, err := engine.UnfreezeAlone(ctx, ledger, time.Now, broker.LocalOperator(0), id, reason)
	return rv, errors.Join(err, ledger.Close())
}
