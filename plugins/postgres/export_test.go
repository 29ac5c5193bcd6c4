package postgres

import (
	"context"
	"time"
)

// Verifier lets a test make logins as Vault does.
func Verifier(password string) (string, error) { return scramVerifier(password) }

// Collect lets a test collect at once instead of every CollectEvery.
func (b *Backend) Collect(ctx context.Context, unused time.Duration) error {
	return b.collect(ctx, unused)
}

// Renew lets a test renew the revoker's credential at once instead of every maintainEvery.
func (b *Backend) Renew(ctx context.Context) error { return b.revoker.renewIfDue(ctx) }

// SpellTable returns the spelling of a table that the backend uses.
func SpellTable(text, schema string) (string, error) {
	t, err := parseTable(text, schema)
	if err != nil {
		return "", err
	}
	return t.String(), nil
}
