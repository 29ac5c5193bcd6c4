package wire

import (
	"context"
	"fmt"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// trier is a backend that can use a secret of its own as an agent does. Try compares what the secret reaches with what
// the step asked for. ended is never nil. Called once after the revocation, it reports an error if the secret or what
// was opened with it still works. No error holds anything of the secret.
type trier interface {
	Try(ctx context.Context, t broker.Tool, a args.Args, secret []byte) (ended func(context.Context) error, err error)
}

// try uses the secret of a step. See [trier].
type try func(context.Context, broker.Issued) (ended func(context.Context) error, err error)

func tryNothing(context.Context, broker.Issued) (func(context.Context) error, error) {
	return func(context.Context) error { return nil }, nil
}

// tries returns the function with which the self-test uses the secret of its own step. Where the backend cannot, it does
// nothing.
func tries(backends map[string]broker.Backend, tool func() (broker.Tool, bool)) try {
	return func(ctx context.Context, issued broker.Issued) (func(context.Context) error, error) {
		t, known := tool()
		b, able := backends[t.Backend].(trier)
		if !known || !able || issued.Secret.Empty() {
			return tryNothing(ctx, issued)
		}
		ended, err := b.Try(ctx, t, issued.Grant.Args, issued.Secret.Reveal())
		if err != nil {
			err = fmt.Errorf("using the secret as an agent does: %w", err)
		}
		return ended, err
	}
}
