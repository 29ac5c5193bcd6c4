package ssh_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	xssh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/ssh"
)

// bind gives a file a second name by a mount, as containers do, until the test ends. Without the right to mount it makes
// a hard link, which differs in one point: its name can be replaced.
func bind(t *testing.T, from, to string) {
	t.Helper()
	if err := os.WriteFile(to, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount(from, to, "", unix.MS_BIND, "")
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		t.Logf("a hard link instead of a mount: %v", err)
		if err := errors.Join(os.Remove(to), os.Link(from, to)); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(to, unix.MNT_DETACH); err != nil {
			t.Errorf("unmounting %s: %v", to, err)
		}
	})
}

// replaceable reports whether a file can be replaced, as a mounted one cannot.
func replaceable(t *testing.T, path string) bool {
	t.Helper()
	next := path + ".next"
	if err := os.Link(path, next); err != nil {
		return false
	}
	return os.Rename(next, path) == nil
}

// layouts are ways in which the broker's list and the file that sshd reads are the same, or are not.
var layouts = map[string]struct {
	layout  func(t *testing.T, dir string) (krl, sshd string)
	inPlace bool
	works   bool // sshd reads the broker's list
	mount   bool // the broker's path is a mount
}{
	"the same file": {layout: func(_ *testing.T, dir string) (string, string) {
		return filepath.Join(dir, "krl"), filepath.Join(dir, "krl")
	}, works: true},
	"a link": {layout: func(t *testing.T, dir string) (string, string) {
		krl, file := filepath.Join(dir, "krl"), filepath.Join(dir, "file")
		if err := os.Symlink("file", krl); err != nil {
			t.Fatal(err)
		}
		return krl, file
	}, works: true},
	"an empty file, mounted for the broker": {layout: func(t *testing.T, dir string) (string, string) {
		return mounted(t, dir, nil)
	}, works: true, mount: true},
	"a list, mounted for the broker": {layout: func(t *testing.T, dir string) (string, string) {
		return mounted(t, dir, ssh.EncodeKRL(nil, 1, time.Now()))
	}, works: true, mount: true},
	"a file mounted for sshd": {layout: func(t *testing.T, dir string) (string, string) {
		file, krl := mounted(t, dir, ssh.EncodeKRL(nil, 1, time.Now()))
		return krl, file
	}},
	"a file mounted for sshd, written in place": {layout: func(t *testing.T, dir string) (string, string) {
		file, krl := mounted(t, dir, ssh.EncodeKRL(nil, 1, time.Now()))
		return krl, file
	}, inPlace: true, works: true},
	"another file": {layout: func(t *testing.T, dir string) (string, string) {
		krl, file := filepath.Join(dir, "krl"), filepath.Join(dir, "file")
		if err := os.WriteFile(file, ssh.EncodeKRL(nil, 1, time.Now()), 0o644); err != nil {
			t.Fatal(err)
		}
		return krl, file
	}},
}

// mounted returns the mount of a file and the file.
func mounted(t *testing.T, dir string, raw []byte) (mount, file string) {
	t.Helper()
	mount, file = filepath.Join(dir, "mount"), filepath.Join(dir, "file")
	if err := os.WriteFile(file, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	bind(t, file, mount)
	return mount, file
}

// TestRealListFile severs a certificate through a list that sshd reads by another path than the broker writes. The
// certificate is dead only where sshd refuses it, and only where that is confirmed: by a query of sshd, or by the
// configuration, which a query that sshd accepts overrules.
func TestRealListFile(t *testing.T) {
	for name, row := range layouts {
		for _, confirm := range []string{"nothing", "configuration", "query", "both"} {
			t.Run(name+", confirmed by "+confirm, func(t *testing.T) {
				krl, file := row.layout(t, t.TempDir())
				e := newEngine(t, nil)
				if err := os.WriteFile(file, nil, 0o644); err != nil { // sshd refuses every key without it
					t.Fatal(err)
				}
				server := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(e.ca), RevokedKeysFile: file})
				inPlace := row.inPlace || row.mount && replaceable(t, krl)
				config := ssh.Config{KRL: krl, InPlace: inPlace, InUse: confirm == "configuration" || confirm == "both"}
				if confirm == "query" || confirm == "both" {
					config.Hosts = []ssh.Host{hostOf(server)}
				}
				b, err := ssh.New(config)
				if err != nil {
					t.Fatalf("New() = %v", err)
				}
				g := grant(t, 1, "echo in")
				g.Expires = time.Now().Add(5 * time.Minute)
				s, err := e.issue(t, b, g)
				if err != nil {
					t.Fatal(err)
				}
				if out, _, err := login(t, server, s, "root", "id"); err != nil || out != "in\n" {
					t.Fatalf("before the revocation: %q, %v\n%s", out, err, server.Log())
				}
				for range 2 { // severing may be repeated
					if err := b.Sever(t.Context(), []broker.Grant{g}); err != nil {
						t.Fatalf("Sever() = %v", err)
					}
				}
				out, _, err := login(t, server, s, "root", "id")
				if works := err == nil; works == row.works {
					t.Fatalf("after the revocation: %q, %v; want sshd to read the list: %v", out, err, row.works)
				}
				want := broker.OutcomeUnknown
				switch {
				case row.works && confirm != "nothing", confirm == "configuration":
					want = broker.OutcomeDead // the configuration is taken at its word
				case confirm != "nothing":
					want = broker.OutcomeAlive
				}
				evidence, err := b.Prove(t.Context(), []broker.Grant{g})
				if err != nil || evidence[0].Outcome != want || evidence[0].Listed != (want == broker.OutcomeDead) {
					t.Errorf("Prove() = %+v, %v, want %s", evidence, err, want)
				}
			})
		}
	}
}

func hostOf(server *parts.SSHDServer) ssh.Host {
	return ssh.Host{Address: server.Address(), Key: string(xssh.MarshalAuthorizedKey(server.HostKey()))}
}

// TestRealQueries checks when the answers of hosts confirm a list: a refusal counts only of a certificate that the host
// accepted before, and only of hosts that are who they should be. One host that is away leaves it unknown.
func TestRealQueries(t *testing.T) {
	dir := t.TempDir()
	krl := filepath.Join(dir, "krl")
	e := newEngine(t, nil)
	good := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(e.ca), RevokedKeysFile: krl})
	stranger := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(newEngine(t, nil).ca)})
	other := hostOf(good)
	other.Key = hostOf(stranger).Key
	gone := hostOf(good)
	gone.Address = "127.0.0.1:1"
	var count int
	for name, row := range map[string]struct {
		hosts []ssh.Host
		from  string
		want  broker.Outcome
	}{
		"all confirm":              {[]ssh.Host{hostOf(good)}, "127.0.0.1", broker.OutcomeDead},
		"one never accepted it":    {[]ssh.Host{hostOf(good), hostOf(stranger)}, "127.0.0.1", broker.OutcomeUnknown},
		"one has another key":      {[]ssh.Host{hostOf(good), other}, "127.0.0.1", broker.OutcomeUnknown},
		"one is away":              {[]ssh.Host{gone, hostOf(good)}, "127.0.0.1", broker.OutcomeUnknown},
		"not from here, by itself": {[]ssh.Host{hostOf(good)}, "127.0.0.9", broker.OutcomeUnknown},
	} {
		count++
		b, err := ssh.New(ssh.Config{KRL: krl, Hosts: row.hosts})
		if err != nil {
			t.Fatal(err)
		}
		g := grant(t, count, "true")
		g.Expires = time.Now().Add(5 * time.Minute)
		m, _, err := b.Prepare(t.Context(), tool(e.mount, broker.NarrowNative, map[string]string{"principal": "root",
			"arg.run": "force_command", "source_address": row.from}, "run"), g)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{}); err != nil {
			t.Fatal(err)
		}
		lost := grant(t, 100+count, "true") // its answer was lost, so no host is asked about it
		lost.Expires = g.Expires
		if err := b.Sever(t.Context(), []broker.Grant{g, lost}); err != nil {
			t.Fatal(err)
		}
		evidence, err := b.Prove(t.Context(), []broker.Grant{g, lost})
		if err != nil || evidence[0].Outcome != row.want || evidence[1].Outcome != row.want {
			t.Errorf("%s: Prove() = %+v, %v, want %s", name, evidence, err, row.want)
		}
	}
	for name, config := range map[string]ssh.Config{
		"hosts without a list":   {Hosts: []ssh.Host{hostOf(good)}},
		"in use without a list":  {InUse: true},
		"a host without a port":  {KRL: krl, Hosts: []ssh.Host{{Address: "localhost", Key: hostOf(good).Key}}},
		"a host without its key": {KRL: krl, Hosts: []ssh.Host{{Address: good.Address()}}},
	} {
		if _, err := ssh.New(config); err == nil {
			t.Errorf("New() accepted %s", name)
		}
	}
	if err := ssh.CheckHost(t.Context(), hostOf(good)); err != nil {
		t.Errorf("CheckHost() = %v", err)
	}
	if err := ssh.CheckHost(t.Context(), other); err == nil {
		t.Error("CheckHost() accepted another host's key")
	}
}

// TestRealHalfWritten checks that sshd refuses every key while a list is rewritten in place, and that the next start of
// the broker writes the list again.
func TestRealHalfWritten(t *testing.T) {
	krl := filepath.Join(t.TempDir(), "krl")
	e := newEngine(t, nil)
	b := newBackend(t, krl, nil)
	server := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(e.ca), RevokedKeysFile: krl})
	s, err := e.issue(t, b, grant(t, 1, "true"))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Sever(t.Context(), []broker.Grant{grant(t, 2, "")}); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(krl)
	if err != nil {
		t.Fatal(err)
	}
	half := append(bytes.Clone(raw[:8]), 0xff, 0xff, 0xff, 0xff)
	for _, written := range [][]byte{half, append(bytes.Clone(half), raw[12:]...), append(bytes.Clone(half), raw[12:len(raw)-3]...)} {
		if err := os.WriteFile(krl, written, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := dial(t, server, s, "root", "127.0.0.1"); !refused(err) {
			t.Errorf("with %d bytes of a list written: %v, want a refusal", len(written), err)
		}
		if _, err := b.Prove(t.Context(), []broker.Grant{grant(t, 2, "")}); err == nil {
			t.Error("Prove() with a list that was left half written returned evidence")
		}
		newBackend(t, krl, nil)
		if _, err := dial(t, server, s, "root", "127.0.0.1"); err != nil {
			t.Errorf("after a restart: %v", err)
		}
	}
}

// TestRealSession keeps a session open over the revocation. The host goes on with it, and with its processes. With the
// setting outlives the certificate is not dead before they have ended.
func TestRealSession(t *testing.T) {
	e := newEngine(t, nil)
	krl := filepath.Join(t.TempDir(), "krl")
	later := time.Duration(0) // the clock runs: Vault's does, too
	b, err := ssh.New(ssh.Config{KRL: krl, InUse: true, Now: func() time.Time { return time.Now().Add(later) }})
	if err != nil {
		t.Fatal(err)
	}
	server := parts.OwnSSHD(t, parts.SSHDConfig{UserCAKeys: []byte(e.ca), RevokedKeysFile: krl})
	for n, row := range []struct {
		outlives string
		want     broker.Outcome
	}{{"", broker.OutcomeDead}, {"1h", broker.OutcomeUnknown}} {
		settings := map[string]string{"principal": "root", "force_command": "cat"}
		if row.outlives != "" {
			settings["outlives"] = row.outlives
		}
		g := grant(t, n+1, "")
		g.Args = args.Args{}
		m, _, err := b.Prepare(t.Context(), tool(e.mount, broker.NarrowNative, settings), g)
		if err != nil {
			t.Fatal(err)
		}
		f, err := m.Finish(e.write(t, m.Path.String(), m.Data), time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		g.Lease = broker.Lease{Ref: f.Ref, Expires: f.Expires, Outlives: f.Outlives}
		var s issued
		if err := json.Unmarshal(f.Secret.Reveal(), &s); err != nil {
			t.Fatal(err)
		}
		client, err := dial(t, server, s, "root", "127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		session, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		in, err := session.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := session.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := session.Start(""); err != nil {
			t.Fatal(err)
		}
		if err := b.Sever(t.Context(), []broker.Grant{g}); err != nil {
			t.Fatal(err)
		}
		if _, err := dial(t, server, s, "root", "127.0.0.1"); !refused(err) {
			t.Errorf("a new login: %v, want a refusal", err)
		}
		echo := make([]byte, 3)
		if _, err := in.Write([]byte("in\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, echo); err != nil || string(echo) != "in\n" {
			t.Errorf("the open session answers %q, %v; docs/promises.md says that it continues", echo, err)
		}
		if evidence, err := b.Prove(t.Context(), []broker.Grant{g}); err != nil || evidence[0].Outcome != row.want {
			t.Errorf("outlives %q: Prove() = %+v, %v, want %s", row.outlives, evidence, err, row.want)
		}
		later = 2 * time.Hour
		if evidence, err := b.Prove(t.Context(), []broker.Grant{g}); err != nil || evidence[0].Outcome != broker.OutcomeDead {
			t.Errorf("outlives %q, later: Prove() = %+v, %v, want dead", row.outlives, evidence, err)
		}
		later = 0
	}
}

// TestRestore checks that the next process lists ended certificates again when the file was emptied meanwhile.
func TestRestore(t *testing.T) {
	krl := filepath.Join(t.TempDir(), "krl")
	ended, live, expired := grant(t, 1, ""), grant(t, 2, ""), grant(t, 3, "")
	expired.Expires = time.Now().Add(-2 * time.Minute)
	if err := newBackend(t, krl, nil).Sever(t.Context(), []broker.Grant{ended}); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(krl, 0); err != nil {
		t.Fatal(err)
	}
	b := newBackend(t, krl, nil)
	active := func(id broker.GrantID) (bool, error) { return id == live.ID, nil }
	if err := b.Restore([]broker.Grant{ended, live, expired}, active); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(krl)
	if err != nil {
		t.Fatal(err)
	}
	if ids, _, err := ssh.DecodeKRL(raw); err != nil || !slices.Equal(ids, []string{"pawl-" + string(ended.ID)}) {
		t.Errorf("after Restore() the list has %q, %v, want the ended grant alone", ids, err)
	}
	down := errors.New("down")
	err = b.Restore([]broker.Grant{ended}, func(broker.GrantID) (bool, error) { return false, down })
	if !errors.Is(err, down) {
		t.Errorf("Restore() without a ledger = %v, want its error", err)
	}
	if err := newBackend(t, "", nil).Restore([]broker.Grant{ended}, nil); err != nil {
		t.Errorf("Restore() without a list = %v", err)
	}
}

// TestTornRead checks that a reader which gets the start of one version of a list and the end of a later one never gets
// a valid list without an entry that both have.
func TestTornRead(t *testing.T) {
	ids := []string{"pawl-a", "pawl-b", "pawl-c", "pawl-d", "pawl-e"}
	var versions [][]byte
	var has []map[string]bool
	for n := range 24 {
		var some []string
		in := map[string]bool{}
		for k, id := range ids {
			if n>>k&1 == 0 || id == "pawl-c" {
				some, in[id] = append(some, id), true
			}
		}
		versions, has = append(versions, ssh.EncodeKRL(some, uint64(n+1), time.Unix(int64(n), 0))), append(has, in)
	}
	valid := 0
	for o, older := range versions {
		for n := o + 1; n < len(versions); n++ {
			for cut := 1; cut < min(len(older), len(versions[n])); cut++ {
				got, _, err := ssh.DecodeKRL(append(bytes.Clone(older[:cut]), versions[n][cut:]...))
				if err != nil {
					continue
				}
				valid++
				for id := range has[o] {
					if has[n][id] && !slices.Contains(got, id) {
						t.Fatalf("the first %d bytes of version %d with the rest of version %d have %q, without %s", cut, o+1, n+1, got, id)
					}
				}
			}
		}
	}
	if valid == 0 {
		t.Error("no mixture was valid, although the headers differ in version and date only")
	}
}

// keygen runs ssh-keygen.
func keygen(t *testing.T, args ...string) error {
	t.Helper()
	path, err := exec.LookPath("ssh-keygen")
	if err != nil {
		parts.Without(t, "sshd", "install the package openssh-client")
	}
	return exec.CommandContext(t.Context(), path, args...).Run()
}

// TestForeignSections adds to a list that another program wrote and keeps that program's entries.
func TestForeignSections(t *testing.T) {
	dir := t.TempDir()
	krl, spec := filepath.Join(dir, "krl"), filepath.Join(dir, "spec")
	for _, name := range []string{"ca", "a", "b", "c", "d"} {
		if err := keygen(t, "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	sign := func(name, id, serial string) {
		t.Helper()
		if err := keygen(t, "-q", "-s", filepath.Join(dir, "ca"), "-I", id, "-z", serial, "-n", "root", "-V", "+5m", filepath.Join(dir, name+".pub")); err != nil {
			t.Fatal(err)
		}
	}
	sign("a", "other", "7")
	sign("b", "pawl-"+string(grant(t, 1, "").ID), "8")
	sign("c", "third", "9")
	sign("d", "free", "10")
	if err := os.WriteFile(spec, []byte("serial: 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := keygen(t, "-q", "-k", "-f", krl, "-s", filepath.Join(dir, "ca.pub"), spec); err != nil {
		t.Fatal(err)
	}
	revoked := func() (names string) {
		t.Helper()
		for _, name := range []string{"a", "b", "c", "d"} {
			err := keygen(t, "-Q", "-f", krl, filepath.Join(dir, name+"-cert.pub"))
			var exit *exec.ExitError
			switch {
			case errors.As(err, &exit) && exit.ExitCode() == 1:
				names += name
			case err != nil:
				t.Fatalf("ssh-keygen -Q: %v", err)
			}
		}
		return names
	}
	b, err := ssh.New(ssh.Config{KRL: krl})
	if err != nil {
		t.Fatalf("New() with another program's list = %v", err)
	}
	if got := revoked(); got != "a" {
		t.Errorf("after the start %q are revoked, want a", got)
	}
	if err := b.Sever(t.Context(), []broker.Grant{grant(t, 1, "")}); err != nil {
		t.Fatal(err)
	}
	if got := revoked(); got != "ab" {
		t.Errorf("after Sever(b) %q are revoked, want ab", got)
	}
	if err := os.WriteFile(spec, []byte("id: third\n"), 0o600); err != nil { // the other program adds an entry
		t.Fatal(err)
	}
	if err := keygen(t, "-q", "-k", "-u", "-f", krl, "-s", "none", spec); err != nil {
		t.Fatal(err)
	}
	if got := revoked(); got != "abc" {
		t.Fatalf("after ssh-keygen -u %q are revoked, want abc", got)
	}
	if err := b.Sever(t.Context(), []broker.Grant{grant(t, 2, "")}); err != nil {
		t.Fatal(err)
	}
	if got := revoked(); got != "abc" {
		t.Errorf("after another Sever %q are revoked, want abc", got)
	}
}
