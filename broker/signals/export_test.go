package signals

import (
	"context"

	"github.com/pawlsec/pawl/broker"
)

// Receive processes one token and returns the revocation that it caused.
func (r *Receiver) Receive(ctx context.Context, token []byte) (broker.RevocationID, error) {
	s, err := r.receive(ctx, token)
	return s.Revocation, err
}
