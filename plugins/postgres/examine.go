package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pawlsec/pawl/broker"
)

// Examine checks everything that the backend needs and that can be wrong outside it: to which program and server its
// addresses lead, Vault's connections by name with their connection_url, the hosts of tools, the setup, and the limits
// of connections. It changes nothing. found describes the server. The error has every fault, and the remedy.
func (b *Backend) Examine(
	ctx context.Context, tools []broker.Tool, connections map[string]string,
) (found string, err error) {
	faults := []error{b.examineAddress(ctx)}
	for _, name := range slices.Sorted(maps.Keys(connections)) {
		faults = append(faults, b.examineConnection(ctx, name, connections[name]))
	}
	if err := errors.Join(faults...); err != nil {
		return "", err // the rest would repeat it in other words
	}
	if err := b.Check(ctx); err != nil {
		return "", err
	}
	faults = []error{b.CheckStandbys(ctx)}
	for _, t := range tools {
		s, err := b.parseTool(t)
		if err == nil {
			err = b.hosts.check(ctx, s.own, 0)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("tool %s: %w", t.Name, err))
		}
	}
	lacks, err := b.Limits(ctx)
	faults = append(faults, err)
	room, err := b.examineLimits(ctx, tools)
	if err := errors.Join(append(faults, err)...); err != nil {
		return "", err
	}
	found = "the database is set up"
	if len(lacks) > 0 {
		found += ", but " + strings.Join(lacks, ", and ")
	}
	return found + "; " + room, nil
}

// addressesOf returns host and port of each server that a configuration names.
func addressesOf(c *pgx.ConnConfig) (all []place) {
	all = append(all, place{name: c.Host, address: c.Host, port: c.Port})
	for _, f := range c.Fallbacks {
		if p := (place{name: f.Host, address: f.Host, port: f.Port}); !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	return all
}

// examineProgram returns an error if a pooler is at one of the addresses, or if nothing answers at any.
func examineProgram(ctx context.Context, all []place) error {
	var silent error
	answers := false
	for _, at := range all {
		network, address := pgconn.NetworkAddress(at.address, at.port)
		program, err := Program(ctx, network, address)
		switch {
		case err != nil:
			silent = fmt.Errorf("%s does not answer", at)
		case program != postgreSQL:
			return &poolerError{fmt.Sprintf("%s is %s", at, program)}
		default:
			answers = true
		}
	}
	if answers {
		return nil
	}
	return silent
}

func (b *Backend) examineAddress(ctx context.Context) error {
	if err := examineProgram(ctx, addressesOf(b.address.ConnConfig)); err != nil {
		return fmt.Errorf("dsn: %w", err)
	}
	return nil
}

var template = regexp.MustCompile(`\{\{[^{}]*\}\}`)

// examineConnection checks where Vault makes the logins.
func (b *Backend) examineConnection(ctx context.Context, name, url string) error {
	config, err := pgx.ParseConfig(template.ReplaceAllString(url, "x"))
	if err != nil {
		return fmt.Errorf("the connection_url of Vault's connection %s does not parse", name) // pgx's text quotes it
	}
	pooler := (*poolerError)(nil)
	switch err := examineProgram(ctx, addressesOf(config)); {
	case errors.As(err, &pooler):
		return fmt.Errorf("Vault's connection %s: %s: write the PostgreSQL server itself into its connection_url, with the "+
			"host of dsn", name, pooler.what)
	case err != nil:
		return fmt.Errorf("Vault's connection %s: %w here, so it is not known to be the server of dsn", name, err)
	case config.Database != b.database:
		return fmt.Errorf("Vault's connection %s makes logins in database %q, and dsn names %q: the broker would end none "+
			"of them", name, config.Database, b.database)
	}
	if err := b.examineFailover(name, config); err != nil {
		return err
	}
	host := net.JoinHostPort(config.Host, strconv.Itoa(int(config.Port)))
	if host == nameOf(b.address) {
		return nil
	}
	known, err := b.identities(ctx)
	if err == nil {
		err = b.hosts.ask(ctx, "its host", host, known)
	}
	if err != nil {
		return fmt.Errorf("Vault's connection %s must lead to the server of dsn, where the broker ends its logins: %w",
			name, err)
	}
	return nil
}

// examineFailover returns an error if Vault's connection stays with one server of dsn when another becomes the primary.
// A name that dsn does not have may lead to the primary by itself.
func (b *Backend) examineFailover(name string, config *pgx.ConnConfig) error {
	named, all := b.servers.named, addressesOf(config)
	if len(named) == 1 || !slices.Contains(named, server{config.Host, config.Port}) ||
		len(all) >= len(named) && config.ValidateConnect != nil {
		return nil
	}
	return fmt.Errorf("Vault's connection %s does not follow a failover among the %d servers of dsn: write all of them into "+
		"its connection_url, with target_session_attrs=read-write", name, len(named))
}

// ownConnections are those of the broker's two logins and of Vault, by [VaultSetup.Writes].
const ownConnections = 4 + 4 + 16

const limitsQuery = `SELECT current_setting('max_connections')::int,
	current_setting('superuser_reserved_connections')::int
	+ coalesce(current_setting('reserved_connections', true)::int, 0), current_setting('max_prepared_transactions')::int,
	count(*), coalesce(sum(rolconnlimit), 0)
	FROM pg_roles WHERE rolname ~ '^pawl-gr[0-9a-z]{24}-' AND rolcanlogin AND rolvaliduntil > now()`

// examineLimits compares the connections that agents may open with those that the server has.
func (b *Backend) examineLimits(ctx context.Context, tools []broker.Tool) (string, error) {
	var most, reserved, prepared, logins, allowed int
	err := b.revoker.do(ctx, func(ctx context.Context, pool *pgxpool.Pool) error {
		return pool.QueryRow(ctx, limitsQuery).Scan(&most, &reserved, &prepared, &logins, &allowed)
	})
	if err != nil {
		return "", fmt.Errorf("reading the server's limits: %w", err)
	}
	room := most - reserved - ownConnections
	found := fmt.Sprintf("max_connections %d, of which %d are reserved and %d are for Vault and the broker",
		most, reserved, ownConnections)
	each := 0
	for _, t := range tools {
		if s, err := b.parseTool(t); err == nil {
			each = max(each, s.connections)
		}
	}
	if each > 0 {
		found += fmt.Sprintf(": room for %d logins at a time with %d connections each", max(room, 0)/each, each)
	}
	found += fmt.Sprintf("; now %d logins may open %d", logins, allowed)
	if prepared > 0 {
		found += fmt.Sprintf("; max_prepared_transactions is %d: agents can prepare transactions, and severing rolls them "+
			"back only in databases where the revoker may connect, so set it to 0 unless you need it", prepared)
	}
	if room < each || room < allowed {
		return "", fmt.Errorf("agents can take every connection of the server: %s; raise max_connections, or lower the "+
			"setting connections of the tools", found)
	}
	return found, nil
}
