package e2e_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/pawlsec/pawl/broker"
	pawl "github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// hosts are the sshd of a row that trust one authority.
type hosts struct {
	*hunt
	ca  []byte // the authority's public key
	krl string // the broker's list
}

func (h *hunt) hosts() *hosts {
	h.Helper()
	h.write("sys/mounts/"+h.id, map[string]any{"type": "ssh"})
	made := h.write(h.id+"/config/ca", map[string]any{"generate_signing_key": true, "key_type": "ssh-ed25519"})
	h.write(h.id+"/roles/agent", map[string]any{"key_type": "ca", "allow_user_certificates": true, "allowed_users": "root",
		"allowed_critical_options": "force-command", "allowed_extensions": "", "default_extensions": map[string]any{},
		"allow_user_key_ids": true, "max_ttl": "10m"})
	key, _ := made.Data["public_key"].(string)
	return &hosts{h, []byte(key), filepath.Join(h.TempDir(), "krl")}
}

// sshd starts a host that reads a list, which may be the broker's.
func (s *hosts) sshd(file string, settings ...string) *parts.SSHDServer {
	s.Helper()
	if _, err := os.Stat(file); err != nil {
		s.must(os.WriteFile(file, nil, 0o644)) // sshd refuses every key without it
	}
	return parts.OwnSSHD(s.T, parts.SSHDConfig{UserCAKeys: s.ca, RevokedKeysFile: file, Settings: settings})
}

// other is the path of a list that is not the broker's.
func (s *hosts) other() string { return s.krl + ".other" }

// bring copies the broker's list to another host's.
func (s *hosts) bring() {
	s.Helper()
	raw, err := os.ReadFile(s.krl)
	s.must(err)
	s.must(os.WriteFile(s.other()+".new", raw, 0o644))
	s.must(os.Rename(s.other()+".new", s.other()))
}

// at is a host in the broker's configuration.
func at(server *parts.SSHDServer, address string) wire.Host {
	return wire.Host{Address: address, HostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(server.HostKey())))}
}

// answers prints the number of its process, and then repeats every line.
const answers = `sh -c 'echo $$; exec cat'`

// issue starts a broker that asks the hosts, and takes a certificate.
func (s *hosts) issue(settings string, ttl time.Duration, all ...wire.Host) thief {
	s.Helper()
	s.broker(fmt.Sprintf(`
  - name: hunt
    backend: hosts
    narrowing: native
    ttl: %s
    settings: {principal: root, force_command: %q%s}
    vault: {policy: pawl-tool-ID, path: ID/agent}`, ttl, answers, settings),
		map[string]wire.Backend{"hosts": {Plugin: "ssh", KRL: s.krl, Hosts: all}})
	return s.steal()
}

// steal takes a certificate.
func (s *hosts) steal() thief {
	s.Helper()
	m := s.take(nil, 0)
	private, err := ssh.ParsePrivateKey([]byte(m["private_key"]))
	if err != nil {
		s.Fatal("the secret has no private key")
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(m["certificate"]))
	s.must(err)
	certificate, ok := public.(*ssh.Certificate)
	if !ok {
		s.Fatal("the secret has no certificate")
	}
	signer, err := ssh.NewCertSigner(certificate, private)
	s.must(err)
	return thief{s.hunt, signer}
}

// thief has the stolen key and certificate.
type thief struct {
	*hunt
	signer ssh.Signer
}

// open logs in at a host, and starts the command.
func (l thief) open(server *parts.SSHDServer) (in io.Writer, out *bufio.Reader, end func(), err error) {
	ctx, cancel := context.WithTimeout(l.Context(), 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", server.Address())
	if err != nil {
		return nil, nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	secure, channels, requests, err := ssh.NewClientConn(conn, server.Address(), &ssh.ClientConfig{User: "root",
		Auth: []ssh.AuthMethod{ssh.PublicKeys(l.signer)}, HostKeyCallback: ssh.FixedHostKey(server.HostKey())})
	if err != nil {
		_ = conn.Close() // it was refused
		return nil, nil, nil, err
	}
	client := ssh.NewClient(secure, channels, requests)
	end = func() { _ = client.Close() } // the host may have ended it
	session, err := client.NewSession()
	if err == nil {
		if in, err = session.StdinPipe(); err == nil {
			var text io.Reader
			if text, err = session.StdoutPipe(); err == nil {
				out = bufio.NewReader(text)
				err = session.Start("anything")
			}
		}
	}
	if err != nil {
		end()
	}
	return in, out, end, err
}

// logsIn gives a way: a login runs the command.
func (l thief) logsIn(server *parts.SSHDServer) func() bool {
	return func() bool {
		_, out, end, err := l.open(server)
		if err != nil {
			return false
		}
		defer end()
		line, err := out.ReadString('\n')
		return err == nil && strings.TrimSpace(line) != ""
	}
}

// session opens a session and gives a way: it answers. kill ends its command at the host.
func (l thief) session(server *parts.SSHDServer) (answers func() bool, kill func()) {
	l.Helper()
	in, out, end, err := l.open(server)
	l.must(err)
	l.Cleanup(end)
	line, err := out.ReadString('\n')
	l.must(err)
	process, err := strconv.Atoi(strings.TrimSpace(line))
	l.must(err)
	answers = func() bool {
		if _, err := io.WriteString(in, "still\n"); err != nil {
			return false
		}
		line, err := out.ReadString('\n')
		return err == nil && line == "still\n"
	}
	return answers, func() { l.must(syscall.Kill(process, syscall.SIGKILL)) }
}

const huntKey = 5 * time.Minute // the life of an SSH certificate

var huntHosts = []huntRow{
	{plugin: "ssh", name: "another file", end: broker.ClosureClosed,
		why: "sshd reads another file than the broker writes",
		set: func(h *hunt) quarry {
			s := h.hosts()
			server := s.sshd(s.other())
			l := s.issue("", huntKey, at(server, server.Address()))
			return quarry{ways: map[string]func() bool{"a login": l.logsIn(server)}, mend: s.bring}
		}},
	{plugin: "ssh", name: "nobody asked", end: broker.ClosureUnknown,
		why: "nothing shows which file sshd reads",
		set: func(h *hunt) quarry {
			s := h.hosts()
			server := s.sshd(s.other())
			return quarry{ways: map[string]func() bool{"a login": s.issue("", huntKey).logsIn(server)}}
		}},
	{plugin: "ssh", name: "a second host with an old list", end: broker.ClosureClosed,
		why: "the list has been brought to one host, and the other has the one before",
		set: func(h *hunt) quarry {
			s := h.hosts()
			first, second := s.sshd(s.krl), s.sshd(s.other())
			l := s.issue("", huntKey, at(first, first.Address()), at(second, second.Address()))
			return quarry{ways: map[string]func() bool{"a login at one of them": func() bool {
				return l.logsIn(first)() || l.logsIn(second)()
			}}, mend: s.bring}
		}},
	{plugin: "ssh", name: "a host out of reach", end: broker.ClosureUnknown,
		why: "the broker cannot reach the host, and agents can",
		set: func(h *hunt) quarry {
			s := h.hosts()
			server := s.sshd(s.other())
			l := s.issue("", huntKey, at(server, "127.0.0.1:1")) // nothing listens there
			return quarry{ways: map[string]func() bool{"a login": l.logsIn(server)}, mend: s.bring}
		}},
	{plugin: "ssh", name: "a mount of the old file", end: broker.ClosureClosed,
		why: "the broker replaced the file, and sshd has the old one by another name, as by a mount",
		set: func(h *hunt) quarry {
			s := h.hosts()
			h.must(os.WriteFile(s.krl, nil, 0o644))
			h.must(os.Link(s.krl, s.other()))
			server := s.sshd(s.other())
			l := s.issue("", huntKey, at(server, server.Address()))
			return quarry{ways: map[string]func() bool{"a login": l.logsIn(server)},
				mend: func() { h.must(os.Remove(s.other())); h.must(os.Link(s.krl, s.other())) }}
		}},
	{plugin: "ssh", name: "a list that is missing for a moment", unnamed: true, end: broker.ClosurePartial,
		why: "sshd refuses every key while it has no list, and takes the certificate once the old list is back",
		set: func(h *hunt) quarry {
			s := h.hosts()
			server := s.sshd(s.other())
			s.issue("", huntKey, at(server, server.Address())) // the broker learns that the host reads the list
			rv, err := h.w.operator().Revoke(h.Context(), pawl.RevokeRequest{Selector: "chain:" + h.chain, Reason: "hunt"})
			h.must(err)
			h.until("the first revocation is closed", func() bool {
				s.bring()
				now, err := h.w.operator().Revocation(h.Context(), rv.ID)
				return err == nil && now.Closure == string(broker.ClosureClosed)
			})
			l, missing := s.steal(), false
			old, err := os.ReadFile(s.other())
			h.must(err)
			return quarry{ways: map[string]func() bool{"a login": func() bool { return missing || l.logsIn(server)() }},
				change: func() { h.must(os.Remove(s.other())); missing = true },
				mend:   func() { h.must(os.WriteFile(s.other(), old, 0o644)); missing = false }}
		}},
	{plugin: "ssh", name: "an open session", end: broker.ClosureClosed,
		why: "sshd reads its list at logins only, and the session is open",
		set: func(h *hunt) quarry {
			s := h.hosts()
			server := s.sshd(s.krl)
			l := s.issue(", outlives: 5s", 10*time.Second, at(server, server.Address()))
			answers, kill := l.session(server)
			return quarry{ways: map[string]func() bool{"a session": answers}, mend: kill}
		}},
}
