package parts

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// PoolerConfig configures a connection pooler in front of a PostgreSQL server.
type PoolerConfig struct {
	Program string // "pgbouncer" or "pgpool", each as Debian packages it
	Server  *PostgresServer
	// FixedUser makes pgbouncer let in every client, and log in to the server as the superuser for all of them.
	FixedUser bool
	// Settings are further lines of pgbouncer.ini or pgpool.conf. Nil adds none.
	Settings []string
}

// Pooler is a real connection pooler on a loopback port. It knows every login of its server. Its own log may hold no
// secrets, but its directory does.
type Pooler struct {
	config  PoolerConfig
	workdir *workdir
	process *process
	port    int
}

// poolers has the package, the configuration file and the arguments of each program.
var poolers = map[string]struct {
	pkg   string
	files func(*Pooler) map[string]string
	args  func(*Pooler) []string
}{
	"pgbouncer": {"pgbouncer", (*Pooler).pgbouncer, func(p *Pooler) []string {
		return []string{p.workdir.path("pgbouncer.ini")}
	}},
	"pgpool": {"pgpool2", (*Pooler).pgpool, func(p *Pooler) []string {
		return []string{"-n", "-f", p.workdir.path("pgpool.conf"), "-a", p.workdir.path("pool_hba.conf"),
			"-F", p.workdir.path("pcp.conf")}
	}},
}

// StartPooler starts a pooler, as the user that its server runs as. It returns ErrMissing if its program is not
// installed.
func StartPooler(ctx context.Context, config PoolerConfig) (*Pooler, error) {
	program, known := poolers[config.Program]
	if !known {
		return nil, fmt.Errorf("%q is no pooler that is known here", config.Program)
	}
	path, err := exec.LookPath(config.Program)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + config.Program) // Debian's, which may not be on PATH
	}
	if err != nil {
		return nil, missing(config.Program, "install the package "+program.pkg)
	}
	workdir, err := newWorkdir(config.Program, "KILL")
	if err != nil {
		return nil, err
	}
	p := &Pooler{config: config, workdir: workdir}
	if p.port, err = freePort(); err == nil {
		err = p.write(program.files(p))
	}
	if err == nil {
		p.process, err = workdir.start(command{path: path, args: program.args(p), user: config.Server.run.user})
	}
	if err == nil {
		err = p.process.ready(ctx, p.answers)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s: %w", config.Program, err), p.Close())
	}
	return p, nil
}

// write writes the files for the user that the pooler runs as.
func (p *Pooler) write(files map[string]string) error {
	paths := []string{p.workdir.dir}
	for name, text := range files {
		paths = append(paths, p.workdir.path(name))
		if err := os.WriteFile(p.workdir.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	owner := p.config.Server.run.user
	if owner == nil {
		return nil
	}
	for _, path := range paths {
		if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pooler) pgbouncer() map[string]string {
	_, port, _ := strings.Cut(p.config.Server.Address(), ":")
	fixed, auth := "", "scram-sha-256\nauth_user = postgres"
	if p.config.FixedUser {
		fixed, auth = " user=postgres password="+p.config.Server.password, "any"
	}
	return map[string]string{
		"users": fmt.Sprintf("%q %q\n", "postgres", p.config.Server.password),
		"pgbouncer.ini": fmt.Sprintf(`[databases]
* = host=127.0.0.1 port=%s%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_file = %s
auth_type = %s
ignore_startup_parameters = extra_float_digits
%s
`, port, fixed, p.port, p.workdir.path("users"), auth, strings.Join(p.config.Settings, "\n"))}
}

func (p *Pooler) pgpool() map[string]string {
	_, port, _ := strings.Cut(p.config.Server.Address(), ":")
	return map[string]string{
		"pool_hba.conf": "", "pcp.conf": "",
		"pgpool.conf": fmt.Sprintf(`listen_addresses = '127.0.0.1'
port = %d
socket_dir = '%[2]s'
pcp_listen_addresses = ''
pcp_socket_dir = '%[2]s'
wd_ipc_socket_dir = '%[2]s'
pid_file_name = '%[2]s/pgpool.pid'
logdir = '%[2]s'
backend_clustering_mode = 'streaming_replication'
backend_hostname0 = '127.0.0.1'
backend_port0 = %[3]s
backend_weight0 = 1
num_init_children = 8
allow_clear_text_frontend_auth = on
sr_check_period = 0
sr_check_user = 'postgres'
sr_check_password = '%[4]s'
%[5]s
`, p.port, p.workdir.dir, port, p.config.Server.password, strings.Join(p.config.Settings, "\n"))}
}

// answers succeeds when the superuser can log in.
func (p *Pooler) answers(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, p.DSNFor("postgres", p.config.Server.password, "postgres"))
	if err != nil {
		return errors.New("no connection yet") // pgx's text quotes the DSN, and so the password
	}
	return conn.Close(ctx)
}

// Address returns host:port.
func (p *Pooler) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.port)) }

// DSNFor returns the URL of a database for a role through the pooler.
func (p *Pooler) DSNFor(role, password, database string) string {
	return strings.Replace(p.config.Server.DSNFor(role, password, database), p.config.Server.Address(), p.Address(), 1)
}

// Log returns the end of the pooler's log.
func (p *Pooler) Log() string { return p.process.tail() }

// Close ends the pooler and removes its data.
func (p *Pooler) Close() error {
	var err error
	if p.process != nil {
		err = p.process.kill()
	}
	return errors.Join(err, p.workdir.close())
}

// OwnPooler returns a pooler for this test alone, closed with the test. It skips as NeedVault does, with the name of its
// program.
func OwnPooler(t TB, config PoolerConfig) *Pooler {
	t.Helper()
	pooler, err := StartPooler(t.Context(), config)
	demand(t, config.Program, err)
	closeWith(t, pooler.Close)
	return pooler
}
