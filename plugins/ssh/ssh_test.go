package ssh_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/ssh"
	xssh "golang.org/x/crypto/ssh"
)

func newBackend(t *testing.T, krl string, now func() time.Time) *ssh.Backend {
	t.Helper()
	b, err := ssh.New(ssh.Config{KRL: krl, Now: now})
	if err != nil {
		t.Fatalf("New(%q) = %v", krl, err)
	}
	return b
}

func tool(mount string, narrow broker.Narrowing, settings map[string]string, args ...string) broker.Tool {
	t := broker.Tool{Name: "restart", Backend: "ssh", Narrowing: narrow, Path: brokertest.Path(mount + "/agent"), Settings: settings, Arguments: map[string]broker.Parameter{}}
	for _, a := range args {
		t.Arguments[a] = broker.Parameter{Kind: "string", Required: true}
	}
	return t
}

func TestLoad(t *testing.T) {
	b := newBackend(t, "", nil)
	with := func(more ...string) map[string]string {
		m := map[string]string{"principal": "root", "force_command": "/usr/bin/uptime -p"}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	for i, row := range []struct {
		tool broker.Tool
		ok   bool
	}{
		{tool("ssh", broker.NarrowNative, with()), true},
		{tool("ssh", broker.NarrowNative, with("source_address", "10.0.0.0/8,::1", "extensions", "permit-pty")), true},
		{tool("ssh", broker.NarrowNative, map[string]string{"arg.user": "principal", "arg.run": "force_command"}, "user", "run"), true},
		{tool("ssh", broker.NarrowNone, map[string]string{"principal": "root"}), true},
		{tool("ssh", broker.NarrowNative, with("outlives", "1h")), true},
		{tool("ssh", broker.NarrowNative, with("outlives", "25h")), false},
		{tool("ssh", broker.NarrowNative, map[string]string{"principal": "root"}), false},
		{tool("ssh", broker.NarrowNone, map[string]string{"force_command": "x"}), false},
		{tool("team/ssh", broker.NarrowNative, with()), false},
		{tool("ssh", broker.NarrowNative, with(), "unused"), false},
		{tool("ssh", broker.NarrowNative, with("force_command", "restart {{service}}")), false},
		{tool("ssh", broker.NarrowNative, with("force_command", "a\nb")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "root,admin")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "*")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "deploy@example.org")), true},
		{tool("ssh", broker.NarrowNative, with("principal", `DOMAIN\svc`)), true},
		{tool("ssh", broker.NarrowNative, with("principal", "Role:prod")), true},
		{tool("ssh", broker.NarrowNative, with("principal", "Domain Admins")), true},
		{tool("ssh", broker.NarrowNative, with("principal", "größe")), true},
		{tool("ssh", broker.NarrowNative, with("principal", strings.Repeat("a", 255))), true},
		{tool("ssh", broker.NarrowNative, with("principal", strings.Repeat("a", 256))), false},
		{tool("ssh", broker.NarrowNative, with("principal", "")), false},
		{tool("ssh", broker.NarrowNative, with("principal", " root")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "root ")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "a\u00a0b")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "a\u202eb")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "a\tb")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "a\xffb")), false},
		{tool("ssh", broker.NarrowNative, with("principal", "{{identity.entity.name}}")), false},
		{tool("ssh", broker.NarrowNative, with("source_address", "0.0.0.0/0")), false},
		{tool("ssh", broker.NarrowNative, with("source_address", "10.0.0.1/8")), false},
		{tool("ssh", broker.NarrowNative, with("extensions", "permit-port-forwarding")), false},
		{tool("ssh", broker.NarrowNative, with("arg.user", "principal"), "user"), false},
		{tool("ssh", broker.NarrowNative, with("arg.user", "key_id"), "user"), false},
	} {
		if err := b.Load(row.tool); (err == nil) != row.ok {
			t.Errorf("row %d: Load(%v) = %v, want ok %v", i, row.tool.Settings, err, row.ok)
		}
	}
}

func grant(t *testing.T, n int, run string) broker.Grant {
	t.Helper()
	args, err := args.New(map[string]args.Value{"run": args.String(run)})
	if err != nil {
		t.Fatal(err)
	}
	return broker.Grant{ID: broker.GrantID(fmt.Sprintf("gr%024d", n)), Args: args, Expires: time.Now().Add(time.Minute)}
}

// engine is a real ssh engine.
type engine struct {
	*api.Client
	mount string
	ca    string
}

var count atomic.Int64

func newEngine(t *testing.T, more map[string]any) *engine {
	t.Helper()
	c, err := parts.NeedVault(t).Client()
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{Client: c, mount: fmt.Sprintf("ssh-%d", count.Add(1))}
	e.write(t, "sys/mounts/"+e.mount, map[string]any{"type": "ssh"})
	e.ca = e.write(t, e.mount+"/config/ca", map[string]any{"generate_signing_key": true, "key_type": "ed25519"})["public_key"].(string)
	role := map[string]any{"key_type": "ca", "allow_user_certificates": true, "allowed_users": "*", "allow_user_key_ids": true,
		"allowed_critical_options": "force-command,source-address", "allowed_extensions": "permit-pty", "max_ttl": "15m", "algorithm_signer": "default"}
	for k, v := range more {
		role[k] = v
	}
	e.write(t, e.mount+"/roles/agent", role)
	return e
}

func (e *engine) write(t *testing.T, path string, data map[string]any) map[string]any {
	t.Helper()
	s, err := e.Logical().WriteWithContext(t.Context(), path, data)
	if err != nil {
		t.Fatalf("writing %q: %v", path, err)
	}
	if s == nil {
		return nil
	}
	return s.Data
}

// issued is a secret as the agent receives it.
type issued struct {
	PrivateKey  string `json:"private_key"`
	Certificate string `json:"certificate"`
}

func (e *engine) issue(t *testing.T, b *ssh.Backend, g broker.Grant) (issued, error) {
	t.Helper()
	m, _, err := b.Prepare(t.Context(), tool(e.mount, broker.NarrowNative, map[string]string{"principal": "root", "arg.run": "force_command", "source_address": "127.0.0.1"}, "run"), g)
	if err != nil {
		t.Fatalf("Prepare() = %v", err)
	}
	f, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{})
	if err != nil {
		return issued{}, err
	}
	if !strings.HasPrefix(f.Ref, "pawl-"+string(g.ID)+" serial ") || f.Expires.After(g.Expires.Add(time.Second)) {
		t.Errorf("Finish() = %q until %v", f.Ref, f.Expires)
	}
	var s issued
	err = json.Unmarshal(f.Secret.Reveal(), &s)
	var members struct {
		Certificate string `json:"certificate"`
		PrivateKey  string `json:"private_key"`
	}
	if json.Unmarshal(f.Secret.Reveal(), &members) != nil || !slices.Equal(f.Digests, []broker.ValueDigest{broker.DigestValue(members.PrivateKey), broker.DigestValue(members.Certificate)}) {
		t.Errorf("Finish() returns the digests %v, want those of key and certificate", f.Digests)
	}
	return s, err
}

// TestRealExact checks that a certificate is rejected when the role adds to the request.
func TestRealExact(t *testing.T) {
	b := newBackend(t, "", nil)
	for name, more := range map[string]map[string]any{
		"an extension": {"default_extensions": map[string]any{"permit-port-forwarding": ""}},
		"two":          {"default_extensions": map[string]any{"permit-agent-forwarding": "", "permit-pty": ""}},
	} {
		if _, err := newEngine(t, more).issue(t, b, grant(t, 1, "id")); err == nil {
			t.Errorf("a certificate with %s from the role was accepted", name)
		}
	}
}

// login runs a command over a real sshd.
func login(t *testing.T, server *parts.SSHDServer, s issued, user, command string) (string, *xssh.Client, error) {
	t.Helper()
	c, err := dial(t, server, s, user, "127.0.0.1")
	if err != nil {
		return "", nil, err
	}
	session, err := c.NewSession()
	if err != nil {
		return "", c, err
	}
	out, err := session.Output(command)
	return string(out), c, err
}

// dial logs in to a real sshd from an address of this machine.
func dial(t *testing.T, server *parts.SSHDServer, s issued, user, from string) (*xssh.Client, error) {
	t.Helper()
	key, err := xssh.ParsePrivateKey([]byte(s.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	public, _, _, _, err := xssh.ParseAuthorizedKey([]byte(s.Certificate))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := xssh.NewCertSigner(public.(*xssh.Certificate), key)
	if err != nil {
		t.Fatal(err)
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second}
	conn, err := dialer.DialContext(t.Context(), "tcp", server.Address())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(time.Minute)) // an open connection accepts a deadline
	secure, channels, requests, err := xssh.NewClientConn(conn, server.Address(), &xssh.ClientConfig{User: user,
		Auth: []xssh.AuthMethod{xssh.PublicKeys(signer)}, HostKeyCallback: xssh.FixedHostKey(server.HostKey())})
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c := xssh.NewClient(secure, channels, requests)
	t.Cleanup(func() { _ = c.Close() })
	return c, nil
}

// refused reports whether err is sshd's refusal of the key, and no other failure.
func refused(err error) bool {
	return err != nil && strings.Contains(err.Error(), "unable to authenticate")
}

// TestRealNarrow makes out-of-scope calls to a real sshd with the raw secret, then severs it.
func TestRealNarrow(t *testing.T) {
	e := newEngine(t, nil)
	krl := filepath.Join(t.TempDir(), "krl")
	b, err := ssh.New(ssh.Config{KRL: krl, InUse: true})
	if err != nil {
		t.Fatal(err)
	}
	server := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(e.ca)})
	g := grant(t, 1, "echo narrow")
	s, err := e.issue(t, b, g)
	if err != nil {
		t.Fatal(err)
	}
	out, client, err := login(t, server, s, "root", "cat /etc/shadow")
	if err != nil || out != "narrow\n" {
		t.Fatalf("another command: %q, %v, want the output of the forced command", out, err)
	}
	if conn, err := client.Dial("tcp", server.Address()); err == nil {
		_ = conn.Close()
		t.Error("out of scope: a port was forwarded")
	}
	if session, err := client.NewSession(); err != nil || session.RequestPty("xterm", 24, 80, nil) == nil {
		t.Errorf("out of scope: a terminal was granted (%v)", err)
	}
	if ok, _, err := client.SendRequest("tcpip-forward", true, xssh.Marshal(struct {
		Addr string
		Port uint32
	}{"127.0.0.1", 0})); err == nil && ok {
		t.Error("out of scope: a port of the server was opened")
	}
	if _, err := dial(t, server, s, "root", "127.0.0.2"); !refused(err) {
		t.Errorf("out of scope, from another address: %v, want a refusal", err)
	}
	if _, err := dial(t, server, s, "nobody", "127.0.0.1"); !refused(err) {
		t.Errorf("out of scope, as another user: %v, want a refusal", err)
	}
	// The certificate alone causes the refusals: with another certificate, the same user and address can log in.
	m, _, err := b.Prepare(t.Context(), tool(e.mount, broker.NarrowNative, map[string]string{"principal": "nobody", "arg.run": "force_command"}, "run"), grant(t, 2, "true"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{})
	var other issued
	if err != nil || json.Unmarshal(f.Secret.Reveal(), &other) != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, server, other, "nobody", "127.0.0.2"); err != nil {
		t.Errorf("in scope, another user from another address: %v", err)
	}
	if _, err := dial(t, server, other, "root", "127.0.0.1"); !refused(err) {
		t.Errorf("out of scope, another's certificate as root: %v, want a refusal", err)
	}
	// Sever the first certificate and one that lost the response of its mint, but not the live one.
	lost := grant(t, 3, "echo lost")
	lostSecret, err := e.issue(t, b, lost)
	if err != nil {
		t.Fatal(err)
	}
	live, err := e.issue(t, b, grant(t, 4, "echo live"))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Sever(t.Context(), []broker.Grant{g, lost}); err != nil {
		t.Fatalf("Sever() = %v", err)
	}
	raw, err := os.ReadFile(krl)
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Revoke(raw); err != nil {
		t.Fatal(err)
	}
	for name, one := range map[string]issued{"severed": s, "lost": lostSecret} {
		if _, _, err := login(t, server, one, "root", "id"); err == nil {
			t.Errorf("the %s certificate logged in", name)
		}
	}
	if out, _, err := login(t, server, live, "root", "id"); err != nil || out != "live\n" {
		t.Errorf("the other certificate: %q, %v", out, err)
	}
	evidence, err := b.Prove(t.Context(), []broker.Grant{g, lost, grant(t, 4, "")})
	if err != nil || evidence[0].Outcome != broker.OutcomeDead || evidence[1].Outcome != broker.OutcomeDead || evidence[2].Outcome != broker.OutcomeAlive ||
		!evidence[0].Listed || !evidence[1].Listed || evidence[2].Listed {
		t.Errorf("Prove() = %+v, %v", evidence, err)
	}
}

// TestKRL checks our list with OpenSSH's own tool.
func TestKRL(t *testing.T) {
	keygen, err := exec.LookPath("ssh-keygen")
	if err != nil {
		t.Skip("NOT TESTED, there is no ssh-keygen")
	}
	dir := t.TempDir()
	run := func(args ...string) error {
		return exec.CommandContext(t.Context(), keygen, args...).Run()
	}
	for _, name := range []string{"ca", "a", "b"} {
		if err := run("-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range []string{"a", "b"} {
		id := fmt.Sprintf("pawl-gr%024d", i+1)
		if err := run("-q", "-s", filepath.Join(dir, "ca"), "-I", id, "-n", "root", "-V", "+5m", filepath.Join(dir, name+".pub")); err != nil {
			t.Fatal(err)
		}
	}
	krl := filepath.Join(dir, "krl")
	revoked := func(name string) bool { // ssh-keygen -Q exits with 1 for a revoked key
		err := run("-Q", "-f", krl, filepath.Join(dir, name+"-cert.pub"))
		var exit *exec.ExitError
		if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
			t.Fatalf("ssh-keygen -Q: %v", err)
		}
		return err != nil
	}
	now := time.Now()
	b := newBackend(t, krl, func() time.Time { return now })
	if revoked("a") || revoked("b") {
		t.Error("the empty list revokes certificates")
	}
	for range 2 {
		if err := b.Sever(t.Context(), []broker.Grant{grant(t, 1, "")}); err != nil {
			t.Fatal(err)
		}
	}
	if !revoked("a") || revoked("b") {
		t.Errorf("after Sever(a): revoked a %v, b %v", revoked("a"), revoked("b"))
	}
	b = newBackend(t, krl, func() time.Time { return now }) // a restart
	if err := b.Sever(t.Context(), []broker.Grant{grant(t, 2, "")}); err != nil {
		t.Fatal(err)
	}
	if !revoked("a") || !revoked("b") {
		t.Errorf("after a restart and Sever(b): revoked a %v, b %v", revoked("a"), revoked("b"))
	}
	now = now.Add(broker.MaxTTL + 2*time.Minute) // all have expired
	if err := b.Sever(t.Context(), []broker.Grant{{ID: "gr000000000000000000000009", Expires: now.Add(time.Minute)}}); err != nil {
		t.Fatal(err)
	}
	if revoked("a") || revoked("b") {
		t.Error("expired certificates are still listed")
	}
	if err := os.WriteFile(krl, []byte("ssh-ed25519 AAAA another program's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ssh.New(ssh.Config{KRL: krl}); err == nil {
		t.Error("New() accepted a file that is not ours, and would have overwritten it")
	}
	if _, err := b.Prove(t.Context(), []broker.Grant{grant(t, 1, "")}); err == nil {
		t.Error("Prove() with an unreadable list returned evidence")
	}
}

// TestProveUnrecorded holds that a certificate whose record a crash may have lost is not called expired before its
// latest end.
func TestProveUnrecorded(t *testing.T) {
	b := newBackend(t, "", nil)
	lost := grant(t, 1, "")
	lost.State, lost.Expires, lost.Longest = broker.StateHandle, time.Now().Add(-2*time.Minute), 5*time.Minute
	lost.Created = lost.Expires.Add(-time.Minute)
	ended := lost
	lost.MintDeadline, ended.MintDeadline = time.Now().Add(-time.Minute), time.Now().Add(-10*time.Minute)
	e, err := b.Prove(t.Context(), []broker.Grant{lost, ended})
	if err != nil || e[0].Outcome == broker.OutcomeDead || e[1].Outcome != broker.OutcomeDead {
		t.Errorf("Prove() = %+v, %v, want only the second dead", e, err)
	}
}

func TestProveWithoutList(t *testing.T) {
	b := newBackend(t, "", nil)
	g, expired := grant(t, 1, ""), grant(t, 2, "")
	expired.Expires = time.Now().Add(-2 * time.Minute)
	if err := b.Sever(t.Context(), []broker.Grant{g}); err != nil {
		t.Fatal(err)
	}
	e, err := b.Prove(t.Context(), []broker.Grant{g, expired})
	if err != nil || e[0].Outcome != broker.OutcomeAlive || e[1].Outcome != broker.OutcomeDead || e[1].Listed {
		t.Errorf("Prove() = %+v, %v, want alive, dead", e, err)
	}
}

// FuzzKRL checks that a list keeps its version, our key ids and the sections of other programs when it is written again.
func FuzzKRL(f *testing.F) {
	f.Add(ssh.EncodeKRL(nil, 1, time.Unix(1, 0)))
	f.Add(ssh.EncodeKRL([]string{"pawl-a", "pawl-b"}, 2, time.Unix(1, 0)))
	f.Add(ssh.EncodeKRL([]string{"other", "pawl-b"}, 3, time.Unix(1, 0)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		ids, version, err := ssh.DecodeKRL(raw)
		if err != nil {
			return
		}
		once, err := ssh.Recode(raw)
		if err != nil {
			t.Fatal(err)
		}
		again, v, err := ssh.DecodeKRL(once)
		if err != nil || v != version || !slices.Equal(ids, again) {
			t.Errorf("decoding again = %q, %d, %v, want %q, %d", again, v, err, ids, version)
		}
		if twice, err := ssh.Recode(once); err != nil || !bytes.Equal(once, twice) {
			t.Errorf("encoding again = %x, %v, want %x", twice, err, once)
		}
	})
}

// TestRealForceCommand holds docs/narrowing.md to a real sshd: a ForceCommand of the host runs instead of the
// certificate's command, which the host's command cannot even read.
func TestRealForceCommand(t *testing.T) {
	e := newEngine(t, nil)
	b := newBackend(t, "", nil)
	for settings, want := range map[string]string{
		"":                                   "certificate\n",
		"ForceCommand env":                   "SSH_ORIGINAL_COMMAND=client\n",
		"Match User root\nForceCommand env":  "SSH_ORIGINAL_COMMAND=client\n",
		"Match User other\nForceCommand env": "certificate\n",
	} {
		server := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(e.ca), Settings: strings.Split(settings, "\n")})
		s, err := e.issue(t, b, grant(t, 1, "echo certificate"))
		if err != nil {
			t.Fatal(err)
		}
		out, _, err := login(t, server, s, "root", "client")
		if err != nil || !strings.Contains(out, want) || (out == "certificate\n") != (want == "certificate\n") || strings.Contains(out, "echo certificate") {
			t.Errorf("with %q: %q, %v, want %q", settings, out, err, want)
		}
	}
}

// TestRealPrincipals logs in at a real sshd with principals of a directory, which a host maps to a user. Each
// certificate has its own alone. From an argument such a principal is refused.
func TestRealPrincipals(t *testing.T) {
	e := newEngine(t, nil)
	b := newBackend(t, "", nil)
	all := []string{"deploy@example.org", `DOMAIN\svc`, "Role:prod"}
	for i, principal := range all {
		server := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(e.ca), Principals: []string{principal}})
		for j, fixed := range all {
			declared := tool(e.mount, broker.NarrowNative, map[string]string{"principal": fixed, "force_command": "echo in"})
			if err := b.Load(declared); err != nil {
				t.Fatalf("Load() with principal %q = %v", fixed, err)
			}
			m, _, err := b.Prepare(t.Context(), declared, grant(t, 1, "x"))
			if err != nil {
				t.Fatal(err)
			}
			f, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{})
			if err != nil {
				t.Fatalf("Finish() with principal %q = %v", fixed, err)
			}
			var s issued
			if err := json.Unmarshal(f.Secret.Reveal(), &s); err != nil {
				t.Fatal(err)
			}
			if out, _, err := login(t, server, s, "root", "x"); i == j && (err != nil || out != "in\n") || i != j && !refused(err) {
				t.Errorf("as %q where %q may log in: %q, %v", fixed, principal, out, err)
			}
		}
		args, err := args.New(map[string]args.Value{"user": args.String(principal)})
		if err != nil {
			t.Fatal(err)
		}
		g := broker.Grant{ID: "gr000000000000000000000001", Args: args, Expires: time.Now().Add(time.Minute)}
		_, _, err = b.Prepare(t.Context(), tool(e.mount, broker.NarrowNative,
			map[string]string{"arg.user": "principal", "force_command": "id"}, "user"), g)
		if !errors.Is(err, broker.Malformed) {
			t.Errorf("Prepare() with the argument %q = %v, want malformed", principal, err)
		}
	}
}
