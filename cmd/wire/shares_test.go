package wire_test

import (
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/wire"
)

// TestEachPaysForItsOwn holds that a transaction with the ends of many callers' grants charges each caller for its own
// records, and not the first one for all of them.
func TestEachPaysForItsOwn(t *testing.T) {
	const small, large = 1000, 100_000
	charged, err := wire.ChargedFor(brokertest.NewMemory(), func(tx broker.Tx) error {
		for _, one := range []struct {
			actor string
			bytes int
		}{{"first", small}, {"second", large}, {"first", small}} {
			if err := tx.Put("g/"+one.actor, make([]byte, one.bytes)); err != nil {
				return err
			}
			if _, err := tx.Append(broker.Entry{Actor: one.actor, Op: broker.OpClosed}); err != nil {
				return err
			}
		}
		return nil
	}, "first", "second")
	if err != nil || charged[0] >= large || charged[0] < 2*small || charged[1] < large {
		t.Errorf("charged = %v, %v; want the first for about %d bytes and the second for about %d", charged, err, 2*small, large)
	}
}
