package wire

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/plugins/exec"
	"github.com/pawlsec/pawl/plugins/jwt"
	"github.com/pawlsec/pawl/plugins/kv"
	"github.com/pawlsec/pawl/plugins/pki"
	"github.com/pawlsec/pawl/plugins/postgres"
	"github.com/pawlsec/pawl/plugins/ssh"
	"github.com/pawlsec/pawl/plugins/token"
	"github.com/pawlsec/pawl/plugins/vault"
)

// plugin is one row of [plugins]: all that this package knows about one kind of backend.
type plugin struct {
	name     string
	keys     []string // the keys of [Backend] that it takes; any other key is refused
	required []string // those of keys that must be set

	// open makes the backend called name.
	open func(o opener, name string, c Backend) (broker.Backend, error)

	// bare is a backend without a configuration. It answers for the abilities that depend on the tool
	// alone: [accessReporter] and [wrapReporter].
	bare broker.Backend

	// reads gives the Vault paths that the broker's own token reads for a tool. Nil: none.
	reads func(t broker.Tool, c Backend) ([]vault.ReadAccess, error)
	// writes gives the writes that a tool needs in Vault, besides its policy. Nil: none.
	writes func(t broker.Tool) ([]vault.Write, error)

	// survey checks, with the broker's rights in Vault, whether the secrets of a Vault mount can be proven dead. Nil:
	// there is nothing to check.
	survey func(ctx context.Context, v *vault.Client, mount string) (found string, err error)

	// examine checks with the broker's rights in Vault what can be wrong outside the backend, for the backend's tools. Nil:
	// there is nothing to check.
	examine func(ctx context.Context, v *vault.Client, c Backend, tools []broker.Tool) (found string, err error)

	// reach checks without a credential that the target is there, and describes it. Nil: the target is Vault.
	reach func(ctx context.Context, c Backend) (found string, err error)
}

// Backend is one target of secrets. The plugin's row in [plugins] lists the fields that it takes; the
// others must be absent.
type Backend struct {
	Plugin string `yaml:"plugin"` // postgres, pki, ssh, jwt, token, kv or exec; required

	// postgres: host, port, dbname and sslmode, never a user or password; host and port can list the primary and the
	// servers that may take its place; required
	DSN   string `yaml:"dsn"`
	Mount string `yaml:"mount"` // postgres: mount of the database engine; empty: database
	// postgres: the hot standbys at which agents can log in, each in the form of dsn with one server; empty: none
	Standbys []string `yaml:"standbys"`
	// postgres: Vault role of the broker's own login that makes shapes; empty: pawl-shaper
	Shaper string `yaml:"shaper"`
	// postgres: Vault role of the broker's own login that severs; empty: pawl-revoker
	Revoker    string        `yaml:"revoker"`
	ServiceTTL time.Duration `yaml:"service_ttl"` // postgres: lifetime of these two logins; zero: 4h
	// ssh: file of the key revocation list that sshd reads; empty: none, and certificates live until they expire
	KRL string `yaml:"krl"`
	// ssh: write into the file of krl instead of replacing it, for a file that a container of sshd mounts; sshd refuses
	// every key during a write; empty: only where the system refuses to replace the file
	KRLInPlace bool `yaml:"krl_in_place"`
	// ssh: true says that the file of krl itself is the one that every sshd reads which trusts the authority, and listed
	// certificates count as dead; empty: only hosts can show that, and without them certificates are unknown until they
	// expire
	KRLInUse bool `yaml:"krl_in_use"`
	// ssh: every sshd that trusts the authority; the broker asks each whether it refuses listed certificates; empty: none
	// is asked
	Hosts  []Host `yaml:"hosts"`
	Issuer string `yaml:"issuer"` // jwt: the iss claim; required
	// jwt: https URL at which verifiers reach GET /v1/status-lists/NAME of listen.agents; empty: tokens name no
	// status list
	StatusURI string   `yaml:"status_uri"`
	Program   *Program `yaml:"program"` // exec: the plugin; required
	// exec: a second program that proves in the plugin's place, so that the program that severs does not vouch for
	// itself; empty: the plugin proves
	Probe   *Program      `yaml:"probe"`
	Timeout time.Duration `yaml:"timeout"` // exec: limit of one run, from its start to its end; zero: 10s
}

// Host is an sshd.
type Host struct {
	Address string `yaml:"address"`  // host:port; required
	HostKey string `yaml:"host_key"` // type and key, as in known_hosts: "ssh-ed25519 AAAA…"; required
}

// Program is an external plugin.
type Program struct {
	Path string `yaml:"path"` // absolute path of one file that needs no other file beside it; required
	// checksum of the file, 64 lower-case hexadecimal digits, checked at every start; required
	SHA256 string   `yaml:"sha256"`
	Args   []string `yaml:"args"` // arguments after the program's name
	Env    []string `yaml:"env"`  // NAME=value; empty: the environment is empty
}

// check refuses keys that the plugin would ignore: a setting without an effect misleads.
func (b Backend) check(name string) error {
	p, ok := pluginNamed(b.Plugin)
	if !ok {
		return fmt.Errorf("%s.plugin is %q; it is %s", name, b.Plugin, pluginNames())
	}
	set := b.keysSet()
	for _, key := range set {
		if !slices.Contains(p.keys, key) {
			return fmt.Errorf("%s.%s is not a key of plugin %s", name, key, b.Plugin)
		}
	}
	for _, key := range p.required {
		if !slices.Contains(set, key) {
			return fmt.Errorf("%s.%s is required", name, key)
		}
	}
	return checkVaultNames(name+".", map[string]string{"mount": b.Mount, "shaper": b.Shaper, "revoker": b.Revoker})
}

// opener has the parts of the broker that a backend needs.
type opener struct {
	vault *vault.Client
	log   *slog.Logger
	now   func() time.Time // nil: time.Now

	// checking opens a backend to check tools alone: it must not reach Vault and must not open a file that a running
	// broker may hold.
	checking bool

	onClose func(func())                                        // runs when the broker stops
	active  func(context.Context, broker.GrantID) (bool, error) // a grant's secret is good as far as the ledger knows
	sign    func(typ string, payload []byte) ([]byte, error)    // signs a status list
}

// plugins has a row for each plugin of this build. A new plugin is a new row; its configuration keys are
// fields of [Backend].
var plugins = []plugin{
	{
		name: "postgres", keys: []string{"dsn", "mount", "standbys", "shaper", "revoker", "service_ttl"},
		required: []string{"dsn"},
		open:     openPostgres, bare: new(postgres.Backend), reads: postgresReads, reach: reachPostgres,
		examine: examinePostgres,
	},
	{name: "pki", open: openPKI, bare: new(pki.Backend), reads: pkiReads, survey: surveyPKI},
	{name: "ssh", keys: []string{"krl", "krl_in_place", "krl_in_use", "hosts"}, open: openSSH, bare: new(ssh.Backend), reach: reachSSH},
	{
		name: "jwt", keys: []string{"issuer", "status_uri"}, required: []string{"issuer"},
		open: openJWT, bare: new(jwt.Backend), reads: jwtReads,
	},
	{name: "token", open: openToken, bare: new(token.Backend), writes: tokenWrites},
	{name: "kv", open: openKV, bare: new(kv.Backend)},
	{
		name: "exec", keys: []string{"program", "probe", "timeout"}, required: []string{"program"},
		open: openExec, bare: new(exec.Backend), reach: reachExec,
	},
}

// inVault is the answer of [Reach] for a backend without a target outside Vault.
const inVault = "in Vault"

func pluginNamed(name string) (plugin, bool) {
	for _, p := range plugins {
		if p.name == name {
			return p, true
		}
	}
	return plugin{}, false
}

// pluginNames lists the names for a message: "a, b or c".
func pluginNames() string {
	var names []string
	for _, p := range plugins {
		names = append(names, p.name)
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// keysSet gives the configuration keys that b sets, besides plugin, in the order of its fields.
func (b Backend) keysSet() (keys []string) {
	for f, v := range reflect.ValueOf(b).Fields() {
		empty := v.IsZero() || v.Kind() == reflect.Slice && v.Len() == 0
		if key := f.Tag.Get("yaml"); key != "plugin" && !empty {
			keys = append(keys, key)
		}
	}
	return keys
}

func openPKI(o opener, _ string, _ Backend) (broker.Backend, error) {
	return pki.New(pki.Config{Vault: o.vault, Now: o.now})
}

func openSSH(o opener, _ string, c Backend) (broker.Backend, error) {
	config := ssh.Config{KRL: c.KRL, InPlace: c.KRLInPlace, InUse: c.KRLInUse, Hosts: c.hosts(), Now: o.now}
	if err := config.Check(); err != nil || !o.checking {
		return ssh.New(config)
	}
	return ssh.New(ssh.Config{}) // a running broker may hold the file
}

func (b Backend) hosts() (all []ssh.Host) {
	for _, h := range b.Hosts {
		all = append(all, ssh.Host{Address: h.Address, Key: h.HostKey})
	}
	return all
}

func openJWT(o opener, _ string, c Backend) (broker.Backend, error) {
	return jwt.New(jwt.Config{Vault: o.vault, Issuer: c.Issuer, Active: o.active, StatusURI: c.StatusURI, Sign: o.sign, Now: o.now})
}

func openToken(o opener, _ string, _ Backend) (broker.Backend, error) {
	return token.New(token.Config{Vault: o.vault})
}

func openKV(opener, string, Backend) (broker.Backend, error) { return kv.New(kv.Config{}), nil }

func openExec(_ opener, name string, c Backend) (broker.Backend, error) {
	return exec.New(exec.Config{Name: name, Program: *c.Program.program(), Probe: c.Probe.program(), Timeout: c.Timeout})
}

func (p *Program) program() *exec.Program {
	if p == nil {
		return nil
	}
	return &exec.Program{Path: p.Path, SHA256: p.SHA256, Args: p.Args, Env: p.Env}
}

// pkiReads opens what proves certificates dead: their records, the authorities, and the revocation lists with their
// configuration.
func pkiReads(t broker.Tool, _ Backend) (reads []vault.ReadAccess, err error) {
	mount := t.Path.Segments()[0]
	for _, read := range []struct {
		below    bool
		segments []string
	}{
		{true, []string{"cert"}},
		{true, []string{"issuer"}},
		{false, []string{"config", "crl"}},
		{false, []string{"crl", "rotate"}},
	} {
		path, err := broker.VaultPathOf(append([]string{mount}, read.segments...)...)
		if err != nil {
			return nil, err
		}
		reads = append(reads, vault.ReadAccess{Path: path, Below: read.below})
	}
	return reads, nil
}

func surveyPKI(ctx context.Context, v *vault.Client, mount string) (string, error) {
	return pki.Survey(ctx, v, mount, time.Now())
}

// jwtReads opens the public half of the tool's transit key, which verifies tokens.
func jwtReads(t broker.Tool, _ Backend) ([]vault.ReadAccess, error) {
	return []vault.ReadAccess{{Path: t.Path.Insert(1, "keys")}}, nil
}

// tokenWrites makes the Vault token role that limits the tool's tokens.
func tokenWrites(t broker.Tool) ([]vault.Write, error) {
	path, data, err := token.Role(t)
	if err != nil {
		return nil, err
	}
	return []vault.Write{{Why: "The token role that limits the tokens of tool " + string(t.Name),
		Method: "POST", Path: path.String(), Data: data}}, nil
}

// The modes of access(2).
const (
	mayExecute = 1 // of a directory: search
	mayWrite   = 2
)

func reachSSH(ctx context.Context, c Backend) (string, error) {
	if c.KRL == "" {
		return inVault, nil
	}
	file, err := filepath.EvalSymlinks(c.KRL)
	if err != nil { // it will be made at the first start
		file = c.KRL
	}
	if err := syscall.Access(file, mayWrite); err != nil || !c.KRLInPlace {
		if err := syscall.Access(filepath.Dir(file), mayWrite|mayExecute); err != nil {
			return "", fmt.Errorf("the directory of krl: %w", err)
		}
	}
	for _, h := range c.hosts() {
		if err := ssh.CheckHost(ctx, h); err != nil {
			return "", fmt.Errorf("sshd at %s: %w", h.Address, err)
		}
	}
	found := c.KRL + " can be written"
	switch {
	case len(c.Hosts) > 0:
		return fmt.Sprintf("%s; the sshd of %d hosts answer", found, len(c.Hosts)), nil
	case c.KRLInUse:
		return found + "; by the configuration sshd reads it", nil
	}
	return found + "; certificates stay unknown until they expire: set krl_in_use, or hosts to ask", nil
}

func reachExec(_ context.Context, c Backend) (string, error) {
	if err := syscall.Access(c.Program.Path, mayExecute); err != nil {
		return "", fmt.Errorf("program: %w", err)
	}
	return c.Program.Path + " can be run", nil
}
