package pki

import (
	"context"

	"github.com/pawlsec/pawl/broker"
)

// Reader reads Vault paths with the broker's own rights. The Client of plugins/vault implements it.
type Reader interface {
	// Read returns the data at a path, or nil if there is none.
	Read(ctx context.Context, path broker.VaultPath) (map[string]any, error)
	// Fetch returns the raw response, of at most limit bytes, and waits as long as ctx allows.
	Fetch(ctx context.Context, path broker.VaultPath, limit int64) ([]byte, error)
	// List returns the names directly below a path, each with Vault's description of it, if it gives one.
	List(ctx context.Context, path broker.VaultPath) (map[string]map[string]any, error)
	// OCSP returns the raw response of a mount's responder to a request, both in DER.
	OCSP(ctx context.Context, mount string, request []byte) ([]byte, error)
}

// read is [Reader.Read] of the path with these segments.
func read(ctx context.Context, v Reader, segments ...string) (map[string]any, error) {
	path, err := broker.VaultPathOf(segments...)
	if err != nil {
		return nil, err
	}
	return v.Read(ctx, path)
}

// fetch is [Reader.Fetch] of the path with these segments.
func fetch(ctx context.Context, v Reader, limit int64, segments ...string) ([]byte, error) {
	path, err := broker.VaultPathOf(segments...)
	if err != nil {
		return nil, err
	}
	return v.Fetch(ctx, path, limit)
}
