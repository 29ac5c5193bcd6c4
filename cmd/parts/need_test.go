package parts_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/parts"
)

// verdict is a TB that records how a test ended instead of ending it.
type verdict struct {
	*testing.T
	text string
}

type ended struct{}

func (v *verdict) end(word, format string, args ...any) {
	v.text = word + ": " + fmt.Sprintf(format, args...)
	panic(ended{})
}
func (v *verdict) Skipf(format string, args ...any)  { v.end("skip", format, args...) }
func (v *verdict) Fatalf(format string, args ...any) { v.end("fatal", format, args...) }

// judge runs a test that must end early, and returns how it ended.
func judge(t *testing.T, test func(parts.TB)) (how string) {
	t.Helper()
	v := &verdict{T: t}
	defer func() {
		if r := recover(); r != (ended{}) {
			t.Errorf("the test did not end early: %v", r)
		}
		how = v.text
	}()
	test(v)
	return ""
}

// bare simulates a machine that has nothing: PATH and cache are empty.
func bare(t *testing.T) {
	t.Helper()
	t.Setenv("PATH", t.TempDir())
	t.Setenv("PAWL_PARTS", t.TempDir())
}

func TestMissingPartsSkipUnlessRequired(t *testing.T) {
	ownVault := func(tb parts.TB) { parts.OwnVault(tb, parts.VaultConfig{}) }
	ownSPIRE := func(tb parts.TB) { parts.OwnSPIRE(tb, parts.SPIREConfig{}) }
	python := func(tb parts.TB) { parts.NeedPython(tb) }
	for _, row := range []struct {
		require string
		test    func(parts.TB)
		want    string
	}{
		{"", ownVault, "skip: NOT TESTED, Vault: not on this machine: build it with `make parts`"},
		{"spire,postgres", ownVault, "skip: "},
		{"spire,vault", ownVault, "fatal: PAWL_REQUIRE demands vault: Vault: not on this machine"},
		{"all", ownVault, "fatal: PAWL_REQUIRE demands vault"},
		{"", ownSPIRE, "skip: NOT TESTED, SPIRE: not on this machine"},
		{"all", ownSPIRE, "fatal: PAWL_REQUIRE demands spire"},
		{"vault", python, "skip: NOT TESTED, Python: not on this machine"},
		{"python", python, "fatal: PAWL_REQUIRE demands python"},
		{"all", python, "fatal: PAWL_REQUIRE demands python"},
	} {
		t.Run(row.want, func(t *testing.T) {
			bare(t)
			t.Setenv("PAWL_REQUIRE", row.require)
			if got := judge(t, row.test); !strings.HasPrefix(got, row.want) {
				t.Errorf("with PAWL_REQUIRE=%q the test ended with %q, want %q", row.require, got, row.want)
			}
		})
	}
}

// tree creates a source tree with the given program as its vaultserver.
func tree(t *testing.T, program string) string {
	t.Helper()
	root := t.TempDir()
	module := filepath.Join(root, "cmd", "parts", "vaultserver")
	if err := os.MkdirAll(module, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"go.mod":  "module example.test/vaultserver\n\ngo 1.26\n",
		"main.go": program,
	} {
		if err := os.WriteFile(filepath.Join(module, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestBuildRunsOnceAndReports(t *testing.T) {
	var progress strings.Builder
	binaries := parts.Binaries{
		Cache:    t.TempDir(),
		Source:   tree(t, "package main\n\nfunc main() {}\n"),
		Progress: &progress,
	}
	first, _, err := binaries.Vault(t.Context())
	if err != nil {
		t.Fatalf("Vault() = %v, want nil", err)
	}
	if text := progress.String(); !strings.Contains(text, "building") || !strings.Contains(text, "built in") {
		t.Errorf("progress = %q, want the start and the end of a build", text)
	}
	progress.Reset()
	second, official, err := binaries.Vault(t.Context())
	if second != first || official || err != nil || progress.Len() > 0 {
		t.Errorf("Vault() again = %q, %v, %v with progress %q, want %q without progress", second, official, err, progress.String(), first)
	}
}

func TestBrokenBuildShowsTheCompilerError(t *testing.T) {
	binaries := parts.Binaries{Cache: t.TempDir(), Source: tree(t, "package main\n\nfunc main() { nothing }\n"), Progress: io.Discard}
	_, _, err := binaries.Vault(t.Context())
	if err == nil || errors.Is(err, parts.ErrMissing) || !strings.Contains(err.Error(), "undefined: nothing") {
		t.Errorf("Vault() = %v, want the compiler's error", err)
	}
	if left, _ := filepath.Glob(filepath.Join(binaries.Cache, "*")); len(left) != 1 {
		t.Errorf("the cache holds %v, want only its lock", left)
	}
}

func TestFailedStartShowsTheLog(t *testing.T) {
	const program = "package main\n\nimport \"os\"\n\nfunc main() { println(\"the disk is made of cheese\"); os.Exit(3) }\n"
	config := parts.VaultConfig{Binaries: parts.Binaries{Cache: t.TempDir(), Source: tree(t, program), Progress: io.Discard}}
	t.Setenv("TMPDIR", t.TempDir())
	_, err := parts.Vault(t.Context(), config)
	if err == nil || !strings.Contains(err.Error(), "made of cheese") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("Vault() = %v, want exit status and log", err)
	}
	if left, _ := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "*")); len(left) > 0 {
		t.Errorf("a failed start leaves %v", left)
	}
}

func TestOfficialVaultGetsAConfigurationFile(t *testing.T) {
	bin := t.TempDir()
	script := "#!/bin/sh\necho \"$1\"; cat \"${2#-config=}\"; exit 1\n"
	if err := os.WriteFile(filepath.Join(bin, "bao"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	_, err := parts.Vault(t.Context(), parts.VaultConfig{Persistent: true})
	for _, want := range []string{"server\n", `"tls_cert_file":"/`, `"storage":{"file":{"path":"/`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Vault() = %v, want the program called with %s", err, want)
		}
	}
}

// childVariable makes this test binary start servers, print their addresses, and wait to be killed.
const childVariable = "PAWL_PARTS_TEST_CHILD"

func TestServersDieWithTheirParent(t *testing.T) {
	if os.Getenv(childVariable) != "" {
		vault, postgres := parts.NeedVault(t), parts.NeedPostgreSQL(t)
		fmt.Println("here", vault.Address(), vault.CAFile(), postgres.Address(), postgres.SocketDir())
		<-t.Context().Done() // the parent kills us long before
	}
	parts.OwnPostgreSQL(t, parts.PostgresConfig{NoSync: true}) // skips here where the child would skip
	parts.NeedVault(t)

	child := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	child.Env = append(os.Environ(), childVariable+"=1")
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatalf("starting a child: %v", err)
	}
	var vault, authority, postgres, socketDir string
	for lines := bufio.NewScanner(out); socketDir == "" && lines.Scan(); {
		_, _ = fmt.Sscanf(lines.Text(), "here %s %s %s %s", &vault, &authority, &postgres, &socketDir) // other lines do not match
	}
	killErr := child.Process.Kill()
	_ = child.Wait() // it was killed
	if killErr != nil || socketDir == "" {
		t.Fatalf("the child started no servers (kill: %v)", killErr)
	}
	eventually(t, "both servers and their directories gone", func() bool {
		return !reachable(vault) && !reachable(postgres) && !exists(authority) && !exists(socketDir)
	})
}

var _ parts.TB = (*testing.T)(nil)

// TestBuiltServersNeedNoSource finds the server that was built last from a directory outside the source tree, as `pawl dev`
// does on a machine that has the program and the cache alone.
func TestBuiltServersNeedNoSource(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("PATH", t.TempDir())
	t.Chdir(t.TempDir())
	b := parts.Binaries{Cache: cache, NoBuild: true}
	if path, _, err := b.Vault(t.Context()); !errors.Is(err, parts.ErrMissing) {
		t.Errorf("Vault with an empty cache = %q, %v, want ErrMissing", path, err)
	}
	for i, name := range []string{"vaultserver-2", "vaultserver-1", "building-3"} {
		dir := filepath.Join(cache, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "vaultserver"), nil, 0o700); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(int64(1_000_000+i), 0)
		if err := os.Chtimes(dir, at, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(cache, "vaultserver-empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(cache, "vaultserver-1", "vaultserver")
	if path, official, err := b.Vault(t.Context()); err != nil || official || path != want {
		t.Errorf("Vault = %q, %v, %v, want %q", path, official, err, want)
	}
}
