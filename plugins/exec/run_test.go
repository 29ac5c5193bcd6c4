package exec_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/exec"
)

// marker is a secret that must not appear in any error.
const marker = "secret-marker1"

const ok = `printf '{"version":1}'`

// TestFaults runs plugins with one fault each and checks the error. No plugin runs beyond its limits, and no error
// shows the plugin's output.
func TestFaults(t *testing.T) {
	t.Setenv("PAWL_TEST_SECRET", marker)
	for _, row := range []struct {
		name   string
		script string // of /bin/sh
		want   string // in the error; empty: none
	}{
		{"good", ok, ""},
		{"good, with a line's end", `echo '{"version":1}'`, ""},
		{"reads nothing", `exec <&-; ` + ok, ""},
		{"hangs", `exec sleep 1000`, "time limit"},
		{"hangs after its response", ok + `; exec sleep 1000`, "time limit"},
		{"hangs and ignores signals", `trap '' TERM INT HUP; while :; do sleep 1000; done`, "time limit"},
		{"hangs in a child", `sleep 1000; ` + ok, "time limit"},
		{"exits", `exit 3`, "exit status 3"},
		{"kills itself", `kill -9 $$`, "signal: killed"},
		{"writes nothing", `exit 0`, "not JSON"},
		{"half a line", `printf '{"version":1,"err'`, "not JSON"},
		{"a gigabyte", `head -c 1000000000 /dev/zero`, "output limit"},
		{"a gigabyte on standard error", `head -c 1000000000 /dev/zero >&2; ` + ok, "output limit"},
		{"one byte too many", `printf '%4096s' '{"version":1}'; echo`, "output limit"},
		{"secrets on standard error", `echo ` + marker + ` >&2; ` + ok, ""},
		{"secrets on standard error, then failing", `echo ` + marker + ` >&2; exit 1`, "exit status 1, with 15 bytes on standard error"},
		{"a secret as the response", `echo ` + marker, "not JSON"},
		{"a secret as a member", `echo '{"version":1,"` + marker + `":1}'`, "does not fit the operation"},
		{"a secret as the version", `echo '{"version":"` + marker + `"}'`, "does not fit the operation"},
		{"non-zero with valid output", ok + `; exit 1`, "exit status 1"},
		{"a child that keeps the pipe", `sleep 1000 & ` + ok, "left a process behind"},
		{"another version", `echo '{"version":2}'`, "version 2"},
		{"no version", `echo '{}'`, "version 0"},
		{"null", `echo null`, "version 0"},
		{"a list", `echo '[{"version":1}]'`, "does not fit the operation"},
		{"an unknown member", `echo '{"version":1,"ok":true}'`, "does not fit the operation"},
		{"another operation's response", `echo '{"version":1,"evidence":[]}'`, "does not fit the operation"},
		{"a member twice", `echo '{"version":2,"version":1}'`, "not JSON"},
		{"a member in another case", `echo '{"Version":1}'`, "does not fit the operation"},
		{"two responses", `echo '{"version":1}{"version":1}'`, "not JSON"},
		{"not UTF-8", `printf '{"version":1,"error":{"kind":"denied","message":"\377"}}'`, "not JSON"},
		{"a deep one", `printf '%033d' 0 | tr 0 '['`, "deeper than 32"},
		{"an error", `echo '{"version":1,"error":{"kind":"unavailable","message":"no route"}}'`, "unavailable: no route"},
		{"an error with a control character", `printf '%s' '{"version":1,"error":{"kind":"denied","message":"a\u001bb"}}'`, "denied: a?b"},
		{"an error without a kind", `echo '{"version":1,"error":{"message":"` + marker + `"}}'`, "no known kind"},
		{"an error with its environment in it", `echo '{"version":1,"error":{"kind":"denied","message":"login with '$PASSWORD' failed"}}'`, "withheld"},
		{"sees its environment only", `test "$(tr '\0' '\n' </proc/$$/environ)" = PASSWORD=` + marker + ` && ` + ok, ""},
		{"runs in the root", `test "$(pwd)" = / && ` + ok, ""},
		{"changes itself", `echo x >>/proc/self/fd/3 2>/dev/null || ` + ok, ""},
	} {
		if strings.Contains(row.script, "/proc/") && runtime.GOOS != "linux" {
			continue
		}
		p := program(t, "#!/bin/sh\n"+row.script+"\n")
		p.Env = []string{"PASSWORD=" + marker}
		cfg := exec.Config{Program: p, MaxOutput: 4096, Timeout: time.Minute}
		if strings.HasPrefix(row.name, "hangs") {
			cfg.Timeout = 300 * time.Millisecond
		}
		begun := time.Now()
		err := backend(t, cfg).Load(broker.Tool{Name: "a", Path: brokertest.Path("a")})
		if took := time.Since(begun); took > 20*time.Second {
			t.Errorf("a plugin that %s took %v", row.name, took)
		}
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("Load() with a plugin that %s = %v, want %q", row.name, err, row.want)
		}
		if err != nil && strings.Contains(fmt.Sprintf("%+v", err), marker) {
			t.Errorf("the error of Load() with a plugin that %s shows the plugin's output", row.name)
		}
	}
}

// pipe makes a named pipe. A read from it ends when the process that has it open for writing ends.
func pipe(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestGroup checks that no process of a plugin survives it. The plugin exits or is killed, and its child holds the
// output or not.
func TestGroup(t *testing.T) {
	for name, script := range map[string]string{
		"ends well":       `sleep 1000 8>%s >/dev/null 2>&1 & ` + ok,
		"keeps the pipe":  `sleep 1000 8>%s & ` + ok,
		"takes too long":  `sleep 1000 8>%s & exec sleep 1000`,
		"writes too much": `sleep 1000 8>%s & exec cat /dev/zero`,
		"fails":           `sleep 1000 8>%s >/dev/null 2>&1 & exit 1`,
	} {
		path := pipe(t)
		gone := make(chan error, 1)
		go func() {
			f, err := os.Open(path) // waits for a writer
			if err == nil {
				_, err = io.ReadAll(f) // to the end of the last one
			}
			gone <- err
		}()
		p := program(t, "#!/bin/sh\n"+fmt.Sprintf(script, path)+"\n")
		err := backend(t, exec.Config{Program: p, Timeout: time.Second}).Load(broker.Tool{Name: "a", Path: brokertest.Path("a")})
		if (err == nil) != (name == "ends well") {
			t.Errorf("Load() with a plugin that %s = %v", name, err)
		}
		select {
		case err := <-gone:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("a child of a plugin that %s survives it", name)
		}
	}
}

// TestStopped checks that cancellation by the caller ends the plugin.
func TestStopped(t *testing.T) {
	path := pipe(t)
	p := program(t, "#!/bin/sh\nexec sleep 1000 8>"+path+"\n")
	b := backend(t, exec.Config{Program: p})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Sever(ctx, make([]broker.Grant, 1)) }()
	f, err := os.Open(path) // the plugin runs
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), context.Canceled.Error()) {
		t.Errorf("Sever() = %v, want context.Canceled in it", err)
	}
	if _, err := io.ReadAll(f); err != nil {
		t.Error(err)
	}
}

// TestChecksum checks at every start that only the configured program runs.
func TestChecksum(t *testing.T) {
	script := "#!/bin/sh\n" + ok + "\n"
	load := func(b *exec.Backend) error { return b.Load(broker.Tool{Name: "a", Path: brokertest.Path("a")}) }
	p := program(t, script)
	wrong := p
	wrong.SHA256 = sum("another program")
	if _, err := exec.New(exec.Config{Name: "keys", Program: wrong}); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("New() with another checksum = %v, want a refusal", err)
	}
	if _, err := exec.New(exec.Config{Name: "keys", Program: p, Probe: &wrong}); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("New() with another checksum of the probe = %v, want a refusal", err)
	}
	b := backend(t, exec.Config{Program: p})
	replace(t, p, script+"# changed\n")
	if err := load(b); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("Load() after the file was changed = %v, want a refusal", err)
	}
	replace(t, p, script)
	if err := load(b); err != nil {
		t.Errorf("Load() after the file was put back = %v", err)
	}
	for name, put := range map[string]func() error{
		"nothing":       func() error { return nil },
		"a directory":   func() error { return os.Mkdir(p.Path, 0o700) },
		"a FIFO":        func() error { return syscall.Mkfifo(p.Path, 0o600) },
		"another file":  func() error { return os.Symlink("/bin/true", p.Path) },
		"an empty file": func() error { return os.WriteFile(p.Path, nil, 0o700) },
	} {
		if err := os.RemoveAll(p.Path); err != nil {
			t.Fatal(err)
		}
		if err := put(); err != nil {
			t.Fatal(err)
		}
		if err := load(b); err == nil {
			t.Errorf("Load() with %s in the program's place succeeded", name)
		}
	}
}

// TestReplacedWhileRunning overwrites the file of a running plugin.
func TestReplacedWhileRunning(t *testing.T) {
	path := pipe(t)
	p := program(t, "#!/bin/sh\nread x <"+path+"\n"+ok+"\n")
	b := backend(t, exec.Config{Program: p})
	done := make(chan error, 1)
	go func() { done <- b.Load(broker.Tool{Name: "a", Path: brokertest.Path("a")}) }()
	f, err := os.OpenFile(path, os.O_WRONLY, 0) // the plugin waits for this
	if err != nil {
		t.Fatal(err)
	}
	replace(t, p, strings.Repeat("exit 7\n", 100))
	if _, err := fmt.Fprintln(f, "continue"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("Load() while the file was overwritten = %v, want nil: the verified copy runs", err)
	}
}

// TestRequest checks that a request has the members that the plugin needs, and no others.
func TestRequest(t *testing.T) {
	seen := filepath.Join(t.TempDir(), "seen")
	p := program(t, "#!/bin/sh\nexec cat >"+seen+"\n")
	b := backend(t, exec.Config{Program: p})
	g := broker.Grant{ID: "gr000000000000000000000001", Chain: "ch1", Delegation: "dl1", Purpose: "why", Tool: "keys", Path: brokertest.Path("keys/creds/app"),
		Args: given(t, `{"scope":"<&>"}`), Expires: time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("", 3600)),
		Token: broker.Handle{Accessor: "accessor"}, Lease: broker.Lease{ID: "lease", Ref: "name-1"}, Policies: []string{"p"}}
	full := tool()
	full.Policy, full.Settings["region"] = "pawl-tool-keys", "eu"
	const wireTool = `"tool":{"name":"keys","narrowing":"none","path":["keys","creds","app"],"arguments":{"scope":{"kind":"string","required":true}},"settings":{"region":"eu"}}`
	const wireGrant = `{"id":"gr000000000000000000000001","tool":"keys","path":"keys/creds/app","args":{"scope":"\u003c\u0026\u003e"},"expires":"2026-01-02T02:04:05Z","ref":"name-1"}`
	for _, row := range []struct {
		op   string
		ask  func()
		want string
	}{
		{"load", func() { _ = b.Load(full) }, `{"version":1,"op":"load",` + wireTool + `}`},
		{"prepare", func() { _, _, _ = b.Prepare(t.Context(), full, g) },
			`{"version":1,"op":"prepare",` + wireTool + `,"grant":` + wireGrant + `}`},
		{"sever", func() { _ = b.Sever(t.Context(), []broker.Grant{g}) }, `{"version":1,"op":"sever","grants":[` + wireGrant + `]}`},
		{"prove", func() { _, _ = b.Prove(t.Context(), []broker.Grant{g}) }, `{"version":1,"op":"prove","grants":[` + wireGrant + `]}`},
		{"find", func() { _, _ = b.Find(t.Context()) }, `{"version":1,"op":"find"}`},
	} {
		row.ask() // the response is empty and rejected
		if got, err := os.ReadFile(seen); err != nil || string(got) != row.want {
			t.Errorf("the request to %s = %s, %v, want %s", row.op, got, err, row.want)
		}
	}
}

// TestResponses checks which well-formed responses are rejected.
func TestResponses(t *testing.T) {
	const id = "gr000000000000000000000001"
	evidence := func(s string) string { return `{"version":1,"evidence":[` + s + `]}` }
	good := `{"grant":"` + id + `","outcome":"dead","check":"lookup","answer":"gone"}`
	native := broker.Grant{ID: id, Args: given(t, `{}`), Narrowing: broker.NarrowNative}
	for _, row := range []struct {
		name, response string
		label          broker.Narrowing
		ok             bool
	}{
		{"good", evidence(good), broker.NarrowNative, true},
		{"unknown", evidence(strings.Replace(good, `"dead"`, `"unknown"`, 1)), broker.NarrowNative, true},
		{"static, and labelled none", evidence(strings.Replace(good, `"dead"`, `"static"`, 1)), broker.NarrowNone, true},
		{"static, and labelled native", evidence(strings.Replace(good, `"dead"`, `"static"`, 1)), broker.NarrowNative, false},
		{"no outcome", evidence(strings.Replace(good, `"dead"`, `""`, 1)), broker.NarrowNative, false},
		{"another outcome", evidence(strings.Replace(good, `"dead"`, `"Dead"`, 1)), broker.NarrowNative, false},
		{"another grant", evidence(strings.Replace(good, id, "gr000000000000000000000002", 1)), broker.NarrowNative, false},
		{"no words", evidence(strings.Replace(good, `"gone"`, `""`, 1)), broker.NarrowNative, false},
		{"none", evidence(""), broker.NarrowNative, false},
		{"two", evidence(good + "," + good), broker.NarrowNative, false},
		{"nothing", `{"version":1}`, broker.NarrowNative, false},
	} {
		b := backend(t, exec.Config{Program: program(t, "#!/bin/sh\nprintf '%s' '"+row.response+"'\n")})
		native.Narrowing = row.label
		found, err := b.Prove(t.Context(), []broker.Grant{native})
		if (err == nil) != row.ok {
			t.Errorf("Prove() with a response that is %s = %v, %v, want ok %v", row.name, found, err, row.ok)
		}
	}
	b := backend(t, exec.Config{Program: program(t, "#!/bin/sh\n"+`echo '{"version":1,"grants":["`+id+`","x"]}'`+"\n")})
	if ids, err := b.Find(t.Context()); err == nil {
		t.Errorf("Find() with an invalid grant id = %v, want an error", ids)
	}
}

// TestMint checks the paths at which a plugin may mint, and the data that it may send.
func TestMint(t *testing.T) {
	path := brokertest.Path("keys/creds")
	for _, row := range []struct {
		response string
		write    bool
		ok       bool
	}{
		{`"secret":["a"]`, false, true},
		{`"secret":["a","b_c.d-e"],"path":["keys","creds"]`, false, true},
		{`"secret":["a"],"path":["keys","creds","eu"]`, false, true},
		{`"secret":["a"],"data":{}`, true, true},
		{`"secret":["a"],"data":{"n":12345678901234567890,"l":[{"a":null}]}`, true, true},
		{`"secret":["a"],"data":{}`, false, false},
		{`"secret":["a"]`, true, false},
		{`"secret":["a"],"data":null`, true, false},
		{`"secret":["a"],"data":{"a b":1}`, true, false},
		{`"secret":["a"],"data":{"":1}`, true, false},
		{`"secret":["a"],"data":{"a":{"b":1,"b":2}}`, true, false},
		{`"secret":["a"],"data":[]`, true, false},
		{`"secret":["a"],"path":["keys"]`, false, false},
		{`"secret":["a"],"path":["keys","other"]`, false, false},
		{`"secret":["a"],"path":["sys","mounts"]`, false, false},
		{`"secret":["a"],"path":["keys","creds",".."]`, false, false},
		{`"secret":["a"],"path":["keys","creds","a/b"]`, false, false},
		{`"secret":["a"],"path":["keys","creds",""]`, false, false},
		{`"secret":["a"],"path":["keys","creds","a\n"]`, false, false},
		{`"secret":["a"],"path":["keys","creds"` + strings.Repeat(`,"a"`, 15) + `]`, false, false},
		{`"secret":[]`, false, false},
		{`"path":["keys","creds"]`, false, false},
		{`"secret":["a","a"]`, false, false},
		{`"secret":[""]`, false, false},
		{`"secret":["a"],"display_name":"x"`, false, false},
		{`"secret":["a"],"leased":false`, false, false},
	} {
		_, _, _, err := exec.DecodePrepared([]byte(`{"version":1,`+row.response+`}`), path, row.write)
		if (err == nil) != row.ok {
			t.Errorf("a response to prepare with %s (write %v) = %v, want ok %v", row.response, row.write, err, row.ok)
		}
	}
}

func TestConfig(t *testing.T) {
	good := program(t, "#!/bin/sh\n"+ok+"\n")
	change := func(f func(*exec.Program)) exec.Config {
		p := good
		f(&p)
		return exec.Config{Name: "keys", Program: p}
	}
	for name, cfg := range map[string]exec.Config{
		"no name":        {Program: good},
		"a bad name":     {Name: "Keys!", Program: good},
		"no program":     {Name: "keys"},
		"a search path":  change(func(p *exec.Program) { p.Path = "plugin" }),
		"no checksum":    change(func(p *exec.Program) { p.SHA256 = "" }),
		"capitals":       change(func(p *exec.Program) { p.SHA256 = strings.ToUpper(p.SHA256) }),
		"no such file":   change(func(p *exec.Program) { p.Path += "x" }),
		"a bad Env":      change(func(p *exec.Program) { p.Env = []string{marker} }),
		"a zero byte":    change(func(p *exec.Program) { p.Args = []string{"a\x00"} }),
		"a relative Dir": change(func(p *exec.Program) { p.Dir = "tmp" }),
		"negative":       {Name: "keys", Program: good, Timeout: -1},
		"a bad probe":    {Name: "keys", Program: good, Probe: &exec.Program{}},
	} {
		if _, err := exec.New(cfg); err == nil || strings.Contains(err.Error(), marker) {
			t.Errorf("New() with %s = %v, want an error that shows no environment", name, err)
		}
	}
}

// FuzzPrepared checks that an accepted response to prepare stays within the tool's path. A lenient decoder, which
// accepts duplicates and other cases, must read the same values.
func FuzzPrepared(f *testing.F) {
	for _, s := range []string{`{"version":1,"secret":["a"]}`, `{"version":1,"path":["keys","creds","x"],"data":{"a":[1,{"b":null}]},"secret":["a","b"]}`,
		`{"version":1,"error":{"kind":"denied","message":"no"}}`, `null`, `{"Version":1}`, `{"version":1,"secret":["a"]}x`} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	path := brokertest.Path("keys/creds")
	f.Fuzz(func(t *testing.T, raw []byte, write bool) {
		mint, secret, data, err := exec.DecodePrepared(raw, path, write)
		if err != nil {
			if mint != nil || secret != nil || data != nil {
				t.Errorf("DecodePrepared(%q) returns values with %v", raw, err)
			}
			return
		}
		var loose struct {
			Path   []string
			Secret []string
			Data   map[string]json.RawMessage
		}
		if err := json.Unmarshal(raw, &loose); err != nil || !slices.Equal(loose.Path, mint) || !slices.Equal(loose.Secret, secret) || len(loose.Data) != len(data) {
			t.Errorf("DecodePrepared(%q) = %q, %q, %q; a lenient decoder reads %v, %v", raw, mint, secret, data, loose, err)
		}
		if len(mint) > 0 && !strings.HasPrefix(strings.Join(mint, "/")+"/", "keys/creds/") {
			t.Errorf("DecodePrepared(%q) = path %q outside the tool's", raw, mint)
		}
		for name, value := range data {
			if !json.Valid([]byte(value)) {
				t.Errorf("DecodePrepared(%q) = data %q that is not JSON at %q", raw, value, name)
			}
		}
	})
}
