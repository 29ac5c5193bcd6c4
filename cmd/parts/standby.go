package parts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Standby creates a hot standby that follows this server by streaming, and starts it. It takes sessions that read. It
// has the superuser and password of this server.
func (s *PostgresServer) Standby(ctx context.Context) (*PostgresServer, error) {
	bin, err := postgresBin()
	if err != nil {
		return nil, err
	}
	dir, err := newWorkdir("standby", "QUIT")
	if err != nil {
		return nil, err
	}
	standby := &PostgresServer{workdir: dir, password: s.password}
	config, err := s.standbyConfig(ctx)
	if err == nil {
		err = standby.copy(ctx, bin, s)
	}
	if err == nil {
		standby.port, err = freePort()
	}
	if err == nil {
		standby.run = command{path: filepath.Join(bin, "postgres"), args: standby.arguments(config), user: s.run.user}
		err = standby.Start(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("creating a standby: %w", err), standby.Close())
	}
	return standby, nil
}

// standbyConfig returns the settings that must not be lower at a standby than at its primary.
func (s *PostgresServer) standbyConfig(ctx context.Context) (config PostgresConfig, err error) {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return config, errors.New("connecting to the primary: " + strings.ReplaceAll(err.Error(), s.password, "[redacted]"))
	}
	defer func() { err = errors.Join(err, conn.Close(ctx)) }()
	config = PostgresConfig{NoSync: true, Settings: map[string]string{}}
	for _, name := range []string{
		"max_connections", "max_prepared_transactions", "max_wal_senders", "max_worker_processes",
	} {
		var value string
		if err := conn.QueryRow(ctx, "SELECT current_setting($1)", name).Scan(&value); err != nil {
			return config, err
		}
		config.Settings[name] = value
	}
	return config, nil
}

// copy fills the data directory with pg_basebackup. It reads the password from a file in the working directory, and so
// does the standby itself.
func (s *PostgresServer) copy(ctx context.Context, bin string, primary *PostgresServer) error {
	passfile := s.workdir.path(".pgpass")
	line := fmt.Sprintf("127.0.0.1:%d:*:postgres:%s\n", primary.port, primary.password)
	if err := os.WriteFile(passfile, []byte(line), 0o600); err != nil {
		return err
	}
	if owner := primary.run.user; owner != nil {
		for _, path := range []string{s.workdir.dir, passfile} {
			if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
				return err
			}
		}
	}
	arguments := []string{
		"--pgdata=" + s.workdir.path("data"), "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast",
		"--no-sync", "--host=127.0.0.1", fmt.Sprintf("--port=%d", primary.port), "--username=postgres", "--no-password",
	}
	process, err := s.workdir.start(
		command{path: filepath.Join(bin, "pg_basebackup"), user: primary.run.user, args: arguments})
	if err != nil {
		return err
	}
	select {
	case <-process.exited:
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), process.kill())
	}
	if !process.cmd.ProcessState.Success() {
		return process.failure(fmt.Errorf("ended: %s", process.cmd.ProcessState))
	}
	return s.workdir.watch(0)
}

// OwnStandby returns a standby of a server, for this test alone. It is closed with the test.
func OwnStandby(t TB, primary *PostgresServer) *PostgresServer {
	t.Helper()
	standby, err := primary.Standby(t.Context())
	demand(t, "postgres", err)
	closeWith(t, standby.Close)
	return standby
}
