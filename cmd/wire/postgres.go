package wire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/plugins/postgres"
	"github.com/pawlsec/pawl/plugins/vault"
)

func openPostgres(o opener, _ string, c Backend) (broker.Backend, error) {
	b, err := postgres.New(postgres.Config{DSN: c.DSN, Standbys: c.Standbys, Credentials: serviceLogins{o.vault, c},
		Log: o.log})
	if err == nil {
		o.onClose(b.Close)
	}
	return b, err
}

// postgresReads opens the broker's own database logins. For the doctor it also opens the Vault roles and the
// connections, of which Vault shows no password.
func postgresReads(t broker.Tool, c Backend) (reads []vault.ReadAccess, err error) {
	mount := cmp.Or(c.Mount, "database")
	for _, p := range []postgres.Purpose{postgres.Shaper, postgres.Revoker} {
		path, err := c.loginPath(p)
		if err != nil {
			return nil, err
		}
		reads = append(reads, vault.ReadAccess{Path: path})
	}
	roles, err := c.roles([]broker.Tool{t})
	if err != nil {
		return nil, err
	}
	for _, path := range roles {
		reads = append(reads, vault.ReadAccess{Path: path})
	}
	config, err := broker.VaultPathOf(mount, "config")
	return append(reads, vault.ReadAccess{Path: config, Below: true}), err
}

// roles gives the paths of the Vault roles that make logins for the tools and for the broker.
func (b Backend) roles(tools []broker.Tool) (paths []broker.VaultPath, err error) {
	seen := map[broker.VaultPath]bool{}
	add := func(mount, role string) {
		path, failed := broker.VaultPathOf(mount, "roles", role)
		err = errors.Join(err, failed)
		if !seen[path] {
			seen[path] = true
			paths = append(paths, path)
		}
	}
	for _, t := range tools {
		if segments := t.Path.Segments(); len(segments) == 2 {
			add(segments[0], segments[1])
		}
	}
	mount := cmp.Or(b.Mount, "database")
	add(mount, cmp.Or(b.Shaper, "pawl-shaper"))
	add(mount, cmp.Or(b.Revoker, "pawl-revoker"))
	return paths, err
}

// examinePostgres looks at the database with the broker's own logins, and at the connections with which Vault makes the
// logins of the tools and of the broker.
func examinePostgres(ctx context.Context, v *vault.Client, c Backend, tools []broker.Tool) (string, error) {
	paths, err := c.roles(tools)
	if err != nil {
		return "", err
	}
	connections := map[string]string{}
	for _, path := range paths {
		role, err := v.Read(ctx, path)
		name, _ := role["db_name"].(string)
		if err != nil || name == "" {
			return "", fmt.Errorf("%s cannot be read in Vault: make the role, or apply `pawl vault plan` again (%w)", path,
				cmp.Or(err, errors.New("no such role")))
		}
		if _, done := connections[path.Segments()[0]+"/"+name]; done {
			continue
		}
		at, err := broker.VaultPathOf(path.Segments()[0], "config", name)
		if err != nil {
			return "", err
		}
		config, err := v.Read(ctx, at)
		details, _ := config["connection_details"].(map[string]any)
		url, _ := details["connection_url"].(string)
		if err != nil || url == "" {
			return "", fmt.Errorf("%s cannot be read in Vault: apply `pawl vault plan` again (%w)", at,
				cmp.Or(err, errors.New("no connection_url")))
		}
		connections[path.Segments()[0]+"/"+name] = url
	}
	b, err := postgres.New(postgres.Config{DSN: c.DSN, Standbys: c.Standbys, Credentials: serviceLogins{v, c},
		CollectEvery: -1})
	if err != nil {
		return "", err
	}
	defer b.Close()
	return b.Examine(ctx, tools, connections)
}

// loginPath is the Vault path of one of the broker's own database logins.
func (b Backend) loginPath(p postgres.Purpose) (broker.VaultPath, error) {
	role := cmp.Or(b.Shaper, "pawl-shaper")
	if p == postgres.Revoker {
		role = cmp.Or(b.Revoker, "pawl-revoker")
	}
	return broker.VaultPathOf(cmp.Or(b.Mount, "database"), "creds", role)
}

// serviceLogins fetches the broker's own database logins from Vault, with the broker's own token.
type serviceLogins struct {
	vault *vault.Client // nil: the backend only checks tools, and every login is refused
	c     Backend
}

// Credential implements [postgres.Credentials].
func (l serviceLogins) Credential(
	ctx context.Context, p postgres.Purpose,
) (username, password string, expires time.Time, err error) {
	if l.vault == nil {
		return "", "", time.Time{}, errOnlyChecks
	}
	asked := time.Now()
	path, err := l.c.loginPath(p)
	if err != nil {
		return "", "", time.Time{}, err
	}
	data, err := l.vault.Read(ctx, path)
	if err != nil {
		return "", "", time.Time{}, err
	}
	username, _ = data["username"].(string)
	password, _ = data["password"].(string)
	if username == "" || password == "" {
		return "", "", time.Time{}, errors.New("vault's answer has no database login")
	}
	return username, password, asked.Add(cmp.Or(l.c.ServiceTTL, 4*time.Hour)), nil
}

func reachPostgres(ctx context.Context, c Backend) (string, error) {
	parsed, err := pgx.ParseConfig(c.DSN)
	if err != nil {
		return "", errors.New("dsn does not parse")
	}
	var all []string
	for _, f := range append([]*pgconn.FallbackConfig{{Host: parsed.Host, Port: parsed.Port}}, parsed.Fallbacks...) {
		network, address := pgconn.NetworkAddress(f.Host, f.Port)
		if slices.Contains(all, address) { // another way to use TLS
			continue
		}
		var dial net.Dialer
		conn, err := dial.DialContext(ctx, network, address)
		if err != nil {
			return "", err
		}
		_ = conn.Close() // it only had to open
		all = append(all, address)
	}
	return strings.Join(all, " and ") + " accepts connections", nil
}
