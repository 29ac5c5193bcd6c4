package parts

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
)

// PostgresConfig configures a PostgreSQL cluster.
type PostgresConfig struct {
	// MaxConnections is PostgreSQL's max_connections. Zero is 100.
	MaxConnections int
	// NoSync trades durability across a power cut for speed (fsync=off). A kill loses nothing in either mode.
	NoSync bool
	// Settings are further server settings, such as "log_statement": "all". Nil adds none.
	Settings map[string]string
}

// PostgresServer is a real PostgreSQL cluster on a loopback port and a Unix socket, with SCRAM on both and one
// superuser, postgres. Its methods are not safe for concurrent use with Start.
type PostgresServer struct {
	workdir  *workdir
	run      command
	process  *process
	port     int
	password string
}

// PostgreSQL creates and starts a cluster, as the user postgres if we are root. It returns ErrMissing if PostgreSQL
// is not installed.
func PostgreSQL(ctx context.Context, config PostgresConfig) (*PostgresServer, error) {
	bin, err := postgresBin()
	if err != nil {
		return nil, err
	}
	owner, err := postgresOwner()
	if err != nil {
		return nil, err
	}
	workdir, err := newWorkdir("postgres", "QUIT")
	if err != nil {
		return nil, err
	}
	s := &PostgresServer{workdir: workdir, password: rand.Text()}
	if err := s.initialise(ctx, bin, owner); err != nil {
		return nil, errors.Join(fmt.Errorf("creating a PostgreSQL cluster: %w", err), s.Close())
	}
	if s.port, err = freePort(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.run = command{path: filepath.Join(bin, "postgres"), args: s.arguments(config), user: owner}
	if err := s.Start(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// postgresBin returns the directory of the newest PostgreSQL that has both required programs.
func postgresBin() (string, error) {
	var candidates []string
	if path, err := exec.LookPath("postgres"); err == nil {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
		candidates = append(candidates, filepath.Dir(path))
	}
	debian, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", fmt.Errorf("looking for PostgreSQL: %w", err)
	}
	newest, newestDir := 0, ""
	for _, dir := range debian {
		if version, err := strconv.Atoi(filepath.Base(filepath.Dir(dir))); err == nil && version > newest {
			newest, newestDir = version, dir
		}
	}
	for _, dir := range append(candidates, newestDir) {
		_, serverErr := os.Stat(filepath.Join(dir, "postgres"))
		_, initErr := os.Stat(filepath.Join(dir, "initdb"))
		if serverErr == nil && initErr == nil {
			return dir, nil
		}
	}
	return "", missing("PostgreSQL", "install the package postgresql, or put its bin directory on PATH")
}

// postgresOwner returns the user to run as. Nil means our own user, because PostgreSQL refuses only root.
func postgresOwner() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	account, err := user.Lookup("postgres")
	if err != nil {
		return nil, missing("the user postgres", "PostgreSQL does not run as root; its Debian package creates that user")
	}
	uid, uidErr := strconv.ParseUint(account.Uid, 10, 32)
	gid, gidErr := strconv.ParseUint(account.Gid, 10, 32)
	if err := errors.Join(uidErr, gidErr); err != nil {
		return nil, fmt.Errorf("reading the user postgres: %w", err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// initialise creates the data directory. The password passes through a file because initdb accepts it in no other
// way.
func (s *PostgresServer) initialise(ctx context.Context, bin string, owner *syscall.Credential) error {
	passwordFile := s.workdir.path("password")
	if err := os.WriteFile(passwordFile, []byte(s.password), 0o600); err != nil {
		return err
	}
	if owner != nil {
		for _, path := range []string{s.workdir.dir, passwordFile} {
			if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
				return err
			}
		}
	}
	process, err := s.workdir.start(command{path: filepath.Join(bin, "initdb"), user: owner, args: []string{
		"--pgdata=" + s.workdir.path("data"), "--username=postgres", "--pwfile=" + passwordFile,
		"--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync",
	}})
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
	return errors.Join(os.Remove(passwordFile), s.workdir.watch(0))
}

func (s *PostgresServer) arguments(config PostgresConfig) []string {
	settings := map[string]string{
		"listen_addresses":        "127.0.0.1",
		"port":                    strconv.Itoa(s.port),
		"unix_socket_directories": s.workdir.dir,
		"max_connections":         "100",
		"wal_keep_size":           "256MB", // a standby is made while other tests write
	}
	if config.MaxConnections > 0 {
		settings["max_connections"] = strconv.Itoa(config.MaxConnections)
	}
	if config.NoSync {
		settings["fsync"], settings["full_page_writes"], settings["synchronous_commit"] = "off", "off", "off"
	}
	for name, value := range config.Settings {
		settings[name] = value
	}
	arguments := []string{"-D", s.workdir.path("data")}
	for name, value := range settings {
		arguments = append(arguments, "-c", name+"="+value)
	}
	return arguments
}

// Start starts the cluster after Stop or Kill, with the same port and data. It returns when the cluster accepts
// connections.
func (s *PostgresServer) Start(ctx context.Context) (err error) {
	for {
		if s.process, err = s.workdir.start(s.run); err != nil {
			return err
		}
		if err = s.process.ready(ctx, s.accepts); err == nil {
			return nil
		}
		// After Kill its sessions may still be ending, because they are in process groups of their own.
		if ctx.Err() != nil || s.process.running() || !strings.HasSuffix(s.process.tail(), s.leftover()) {
			return fmt.Errorf("starting PostgreSQL: %w", err)
		}
	}
}

// leftover returns the end of the log of a start that found remains of the killed server.
func (s *PostgresServer) leftover() string {
	return fmt.Sprintf("HINT:  Terminate any old server processes associated with data directory %q.", s.workdir.path("data"))
}

func (s *PostgresServer) accepts(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return errors.New("no connection yet") // pgx's text quotes the DSN, and so the password
	}
	return conn.Close(ctx)
}

// DSN returns the URL of a database for the superuser, over TCP.
func (s *PostgresServer) DSN(database string) string {
	return s.DSNFor("postgres", s.password, database)
}

// DSNFor returns the URL of a database for a role, over TCP and without TLS.
func (s *PostgresServer) DSNFor(role, password, database string) string {
	dsn := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword(role, password),
		Host:     s.Address(),
		Path:     database,
		RawQuery: "sslmode=disable",
	}
	return dsn.String()
}

// Address returns host:port. It stays the same across a Start.
func (s *PostgresServer) Address() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

// SocketDir returns the directory of the Unix socket, for use as the host. The socket also requires a password.
func (s *PostgresServer) SocketDir() string { return s.workdir.dir }

// Password returns the superuser's password.
func (s *PostgresServer) Password() string { return s.password }

// Log returns the end of the server's log.
func (s *PostgresServer) Log() string { return s.process.tail() }

// CreateDatabase creates an empty database and returns its DSN for the superuser.
func (s *PostgresServer) CreateDatabase(ctx context.Context) (dsn string, err error) {
	conn, err := pgx.Connect(ctx, s.DSN("postgres"))
	if err != nil {
		return "", errors.New("connecting to PostgreSQL: " + strings.ReplaceAll(err.Error(), s.password, "[redacted]"))
	}
	defer func() { err = errors.Join(err, conn.Close(ctx)) }()
	name := "db_" + strings.ToLower(rand.Text())
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()); err != nil {
		return "", fmt.Errorf("creating a database: %w", err)
	}
	return s.DSN(name), nil
}

// Stop ends the cluster in order and disconnects its sessions.
func (s *PostgresServer) Stop() error { return s.process.end(syscall.SIGINT) }

// Kill ends the server process as a crash would. Its sessions end by themselves right after.
func (s *PostgresServer) Kill() error { return s.process.kill() }

// Close ends the cluster and removes its data.
func (s *PostgresServer) Close() error {
	var err error
	if s.process != nil {
		err = s.process.end(syscall.SIGQUIT)
	}
	return errors.Join(err, s.workdir.close())
}
