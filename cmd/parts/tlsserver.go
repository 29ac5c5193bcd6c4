package parts

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// TLSConfig configures a web server that requires a client certificate.
type TLSConfig struct {
	Program     string // "nginx", "apache2" or "haproxy", each as Debian packages it
	Certificate []byte // the server's own certificate and its key, in PEM
	Authorities []byte // authorities of client certificates, in PEM
	List        []byte // their revocation list, in PEM; nil: the server checks none
	// Settings are lines of the server's TLS block; for haproxy also words of its bind line, with the prefix "bind ". They
	// may name a file with ticket keys, relative to the server's directory: nginx.key, apache.key or haproxy.keys.
	Settings []string
}

// TLSServer is a real web server on a loopback port. It answers every request of an accepted client with status 200.
// Not safe for concurrent use.
type TLSServer struct {
	config  TLSConfig
	workdir *workdir
	process *process
	port    int
}

// tlsPrograms are the command lines of the servers, in the foreground, and the signal that reloads each.
var tlsPrograms = map[string]struct {
	configuration func(*TLSServer) string
	args          func(s *TLSServer) []string
	reload        syscall.Signal
}{
	"nginx": {(*TLSServer).nginx, func(s *TLSServer) []string {
		return []string{"-c", s.workdir.path("conf"), "-p", s.workdir.dir, "-e", "stderr", "-g", "daemon off;"}
	}, syscall.SIGHUP},
	"apache2": {(*TLSServer).apache, func(s *TLSServer) []string {
		return []string{"-f", s.workdir.path("conf"), "-DFOREGROUND"}
	}, syscall.SIGUSR1},
	"haproxy": {(*TLSServer).haproxy, func(s *TLSServer) []string {
		return []string{"-W", "-db", "-f", s.workdir.path("conf")}
	}, syscall.SIGUSR2},
}

// TLS starts a web server. It returns ErrMissing if its program is not installed.
func TLS(ctx context.Context, config TLSConfig) (*TLSServer, error) {
	program, known := tlsPrograms[config.Program]
	if !known {
		return nil, fmt.Errorf("%q is no web server that is known here", config.Program)
	}
	path, err := exec.LookPath(config.Program)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + config.Program) // Debian's, which may not be on PATH
	}
	if err != nil {
		return nil, missing(config.Program, "install the package "+config.Program)
	}
	workdir, err := newWorkdir(config.Program, "KILL")
	if err != nil {
		return nil, err
	}
	s := &TLSServer{config: config, workdir: workdir}
	if s.port, err = freePort(); err == nil {
		err = s.write(program.configuration(s))
	}
	if err == nil {
		s.process, err = workdir.start(command{path: path, args: program.args(s)})
	}
	if err == nil {
		err = s.process.ready(ctx, s.answers)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s: %w", config.Program, err), s.Close())
	}
	return s, nil
}

// write writes the files that the server reads. Its workers run as another user and must be able to enter the directory.
func (s *TLSServer) write(configuration string) error {
	for name, text := range map[string][]byte{"conf": []byte(configuration), "pair.pem": s.config.Certificate,
		"ca.pem": s.config.Authorities, "crl.pem": s.config.List, "index.html": []byte("in\n"),
		"nginx.key": []byte(strings.Repeat("0123456789abcdef", 5)), "apache.key": []byte(strings.Repeat("0123456789abcdef", 3)),
		"haproxy.keys": []byte(strings.Repeat(base64.StdEncoding.EncodeToString([]byte(strings.Repeat("0123456789abcdef", 3)))+"\n", 3))} {
		if err := os.WriteFile(s.workdir.path(name), text, 0o644); err != nil {
			return err
		}
	}
	return os.Chmod(s.workdir.dir, 0o755)
}

func (s *TLSServer) nginx() string {
	list := ""
	if s.config.List != nil {
		list = "ssl_crl crl.pem;"
	}
	return fmt.Sprintf(`worker_processes 1; pid nginx.pid; events {}
http { access_log off; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
server { listen %s ssl; ssl_certificate pair.pem; ssl_certificate_key pair.pem; ssl_protocols TLSv1.2 TLSv1.3;
ssl_verify_client on; ssl_client_certificate ca.pem; %s
%s
location / { return 200 in; } } }
`, s.Address(), list, strings.Join(s.config.Settings, "\n"))
}

func (s *TLSServer) apache() string {
	list := ""
	if s.config.List != nil {
		list = "SSLCARevocationFile crl.pem\nSSLCARevocationCheck chain"
	}
	modules := ""
	for name, file := range map[string]string{"mpm_event": "mpm_event", "authz_core": "authz_core", "ssl": "ssl", "socache_shmcb": "socache_shmcb"} {
		modules += fmt.Sprintf("LoadModule %s_module /usr/lib/apache2/modules/mod_%s.so\n", name, file)
	}
	return fmt.Sprintf(`ServerRoot %[1]s
%[2]s
ServerName localhost
KeepAliveTimeout 60
PidFile apache.pid
ErrorLog /dev/stderr
User www-data
Group www-data
Listen %[3]s
DocumentRoot %[1]s
SSLEngine on
SSLCertificateFile pair.pem
SSLVerifyClient require
SSLCACertificateFile ca.pem
%[4]s
%[5]s
`, s.workdir.dir, modules, s.Address(), list, strings.Join(s.config.Settings, "\n"))
}

func (s *TLSServer) haproxy() string {
	list, bind := "", ""
	if s.config.List != nil {
		list = "crl-file " + s.workdir.path("crl.pem")
	}
	var global []string
	for _, line := range s.config.Settings {
		if words, ok := strings.CutPrefix(line, "bind "); ok {
			bind += " " + words
		} else {
			global = append(global, line)
		}
	}
	return fmt.Sprintf(`global
  log stderr format raw daemon err
  %s
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 10s
frontend f
  bind %s ssl crt %s ca-file %s verify required %s%s
  http-request return status 200 content-type text/plain string in
`, strings.Join(global, "\n  "), s.Address(), s.workdir.path("pair.pem"), s.workdir.path("ca.pem"), list, bind)
}

// answers succeeds when the server completes a handshake, or refuses one for the lack of a client certificate.
func (s *TLSServer) answers(ctx context.Context) error {
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // only whether it is there
	conn, err := dialer.DialContext(ctx, "tcp", s.Address())
	var alert tls.AlertError
	if errors.As(err, &alert) {
		return nil
	}
	if err != nil {
		return err
	}
	return conn.Close()
}

// Address returns host:port.
func (s *TLSServer) Address() string { return "127.0.0.1:" + strconv.Itoa(s.port) }

// Replace replaces the revocation list and has the server reload its configuration. It returns before the reload has
// ended: poll with a new connection.
func (s *TLSServer) Replace(list []byte) error {
	if err := os.WriteFile(s.workdir.path("crl.pem"), list, 0o644); err != nil {
		return err
	}
	return s.process.signalLeader(tlsPrograms[s.config.Program].reload)
}

// Kill ends the server as a crash would, and with it each connection and session.
func (s *TLSServer) Kill() error { return s.process.kill() }

// Log returns the end of the server's log.
func (s *TLSServer) Log() string { return s.process.tail() }

// Close ends the server and removes its data.
func (s *TLSServer) Close() error {
	var err error
	if s.process != nil {
		err = s.process.kill()
	}
	return errors.Join(err, s.workdir.close())
}

// OwnTLS returns a web server for this test alone, closed with the test. It skips as NeedVault does, with the name of
// its program.
func OwnTLS(t TB, config TLSConfig) *TLSServer {
	t.Helper()
	server, err := TLS(t.Context(), config)
	demand(t, config.Program, err)
	closeWith(t, server.Close)
	return server
}
