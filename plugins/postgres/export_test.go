package postgres

import (
	"context"
	"net/url"
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

// URLOf returns the connection URL of a secret for servers with port 5432.
func URLOf(hosts ...string) string {
	var reach []server
	for _, host := range hosts {
		reach = append(reach, server{host, 5432})
	}
	return urlOf(reach, "disable", "app", url.UserPassword("u", "p"))
}
