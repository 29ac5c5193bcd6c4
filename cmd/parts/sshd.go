package parts

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"

	"golang.org/x/crypto/ssh"
)

// SSHDConfig configures an sshd.
type SSHDConfig struct {
	// UserCAKeys are the authorities for user certificates, in the form of an authorized_keys file. Nil accepts none.
	UserCAKeys []byte
	// RevokedKeys is a key revocation list, or public keys, one a line. Nil revokes nothing. Revoke replaces it.
	RevokedKeys []byte
	// RevokedKeysFile is the file that sshd reads as its list of revoked keys. Empty: a file that RevokedKeys and Revoke
	// write.
	RevokedKeysFile string
	// Principals lists names; a certificate with one of them can log in as any user. Nil keeps sshd's own rule: the
	// certificate must have the user's name.
	Principals []string
	// Settings are further lines of sshd_config. Nil adds none.
	Settings []string
}

// SSHDServer is a real OpenSSH server on a loopback port that accepts only certificates. Safe for concurrent use.
type SSHDServer struct {
	workdir *workdir
	process *process
	port    int
	hostKey ssh.PublicKey
}

// SSHD starts an sshd. It returns ErrMissing if there is none, or if we are not root: the sshd of any other user can
// log in only that user.
func SSHD(ctx context.Context, config SSHDConfig) (*SSHDServer, error) {
	path, err := sshdPath()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, missing("root, for sshd", "run as root")
	}
	workdir, err := newWorkdir("sshd", "KILL")
	if err != nil {
		return nil, err
	}
	s := &SSHDServer{workdir: workdir}
	if err := s.prepare(config); err != nil {
		return nil, errors.Join(fmt.Errorf("preparing sshd: %w", err), s.Close())
	}
	// -D and -e keep it in the foreground with its log on standard error.
	s.process, err = workdir.start(command{path: path, args: []string{"-D", "-e", "-f", workdir.path("sshd_config")}})
	if err == nil {
		err = s.process.ready(ctx, s.answers)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting sshd: %w", err), s.Close())
	}
	return s, nil
}

// sshdPath returns an absolute path, because sshd must be called by one.
func sshdPath() (string, error) {
	for _, name := range []string{"sshd", "/usr/sbin/sshd"} { // Debian's, which may not be on PATH
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", missing("sshd", "install the package openssh-server")
}

func (s *SSHDServer) prepare(config SSHDConfig) (err error) {
	if s.port, err = freePort(); err != nil {
		return err
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	if s.hostKey, err = ssh.NewPublicKey(public); err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return err
	}
	files := map[string][]byte{
		"host_key":    pem.EncodeToMemory(block),
		"user_ca":     config.UserCAKeys,
		"revoked":     config.RevokedKeys,
		"sshd_config": s.settings(config),
	}
	if config.Principals != nil {
		var lines bytes.Buffer
		for _, principal := range config.Principals {
			fmt.Fprintln(&lines, principal)
		}
		files["principals"] = lines.Bytes()
	}
	for name, text := range files {
		if err := os.WriteFile(s.workdir.path(name), text, 0o600); err != nil {
			return err
		}
	}
	const separation = "/run/sshd" // compiled into Debian's sshd, which does not start without it
	return os.MkdirAll(separation, 0o755)
}

func (s *SSHDServer) settings(config SSHDConfig) []byte {
	lines := []string{
		"ListenAddress " + s.Address(),
		"HostKey " + s.workdir.path("host_key"),
		"TrustedUserCAKeys " + s.workdir.path("user_ca"),
		"RevokedKeys " + cmp.Or(config.RevokedKeysFile, s.workdir.path("revoked")),
		"AuthorizedKeysFile none",
		"AuthenticationMethods publickey",
		"PermitRootLogin prohibit-password",
		"UsePAM no",
		"StrictModes no", // the temporary directory is below a world-writable one
		"PidFile none",
		"LogLevel VERBOSE",
	}
	if config.Principals != nil {
		lines = append(lines, "AuthorizedPrincipalsFile "+s.workdir.path("principals"))
	}
	var text bytes.Buffer
	for _, line := range append(lines, config.Settings...) {
		fmt.Fprintln(&text, line)
	}
	return text.Bytes()
}

// answers succeeds when the server sends its greeting.
func (s *SSHDServer) answers(ctx context.Context) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", s.Address())
	if err != nil {
		return err
	}
	greeting := make([]byte, len("SSH-2.0"))
	_, err = conn.Read(greeting)
	return errors.Join(err, conn.Close())
}

// Address returns host:port.
func (s *SSHDServer) Address() string { return "127.0.0.1:" + strconv.Itoa(s.port) }

// ConfigFile returns the path of its sshd_config, which exists until Close.
func (s *SSHDServer) ConfigFile() string { return s.workdir.path("sshd_config") }

// HostKey returns the key that the server must present.
func (s *SSHDServer) HostKey() ssh.PublicKey { return s.hostKey }

// Revoke replaces the list of revoked keys (see SSHDConfig). sshd reads it at every login.
func (s *SSHDServer) Revoke(list []byte) error {
	// sshd refuses every login while it cannot read the list, so the new list replaces the old one atomically.
	fresh := s.workdir.path("revoked.new")
	if err := os.WriteFile(fresh, list, 0o600); err != nil {
		return fmt.Errorf("writing revoked keys: %w", err)
	}
	return os.Rename(fresh, s.workdir.path("revoked"))
}

// Log returns the end of the server's log, with each login and the reason for each refusal.
func (s *SSHDServer) Log() string { return s.process.tail() }

// Close ends the server and removes its data. An open session ends when its client closes it.
func (s *SSHDServer) Close() error {
	var err error
	if s.process != nil {
		err = s.process.kill()
	}
	return errors.Join(err, s.workdir.close())
}
