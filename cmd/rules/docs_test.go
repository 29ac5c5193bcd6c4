package rules_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/cmd/wire"
)

// block is a fenced block of a page. The commands that a reader types are marked sh. The tests run them in the order of
// the page and in one shell. Their marks are
//
//	sh          must succeed
//	sh fails    the last command must fail
//	sh no-run   is not run, and the text around it gives the reason
//
// A block marked text directly after it is its output, in which … matches any text.
type block struct {
	page   string
	line   int
	lang   string
	mark   string
	text   string
	prints []string // lines of the text block that follows
}

func (b block) String() string { return fmt.Sprintf("%s:%d", b.page, b.line) }

// blocks parses a page.
func blocks(page string, source []byte) (list []block) {
	var open *block
	after := false // nothing but blank lines since a block ended
	for i, line := range strings.Split(string(source), "\n") {
		info, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && open == nil:
			lang, mark, _ := strings.Cut(info, " ")
			open = &block{page: page, line: i + 1, lang: lang, mark: mark}
		case fence:
			if last := len(list) - 1; open.lang == "text" && after && list[last].lang == "sh" {
				list[last].prints = strings.Split(strings.TrimSuffix(open.text, "\n"), "\n")
				after = false
			} else {
				list, after = append(list, *open), true
			}
			open = nil
		case open != nil:
			open.text += line + "\n"
		case strings.TrimSpace(line) != "":
			after = false
		}
	}
	return list
}

// pages returns our pages with their blocks.
func pages(t *testing.T) map[string][]block {
	t.Helper()
	found := map[string][]block{}
	eachPage(t, func(page string, source []byte) { found[page] = blocks(page, source) })
	return found
}

func eachPage(t *testing.T, visit func(page string, source []byte)) {
	t.Helper()
	sources(t, ".md", func(file string, source []byte) {
		if !strings.Contains(file, "/") || strings.HasPrefix(file, "docs/") {
			visit(file, source)
		}
	})
}

func runnable(list []block) (run []block) {
	for _, b := range list {
		if b.lang == "sh" && b.mark != "no-run" {
			run = append(run, b)
		}
	}
	return run
}

// script makes one shell script of a page's blocks. It writes the number of the running block to the file at, and the
// output of block n to out.n.
func script(list []block) string {
	var s strings.Builder
	s.WriteString("set -euo pipefail\ntrap 'status=$?; kill $(jobs -p) 2>/dev/null || true; wait; exit $status' EXIT\n")
	for i, b := range list {
		fmt.Fprintf(&s, "echo %d > \"$RULES/at\"\nexec > \"$RULES/out.%d\" 2>&1\n", i, i)
		if b.mark == "fails" {
			fmt.Fprintf(&s, "if (\n%s); then echo 'this succeeded, and must fail'; exit 1; fi\n", b.text)
		} else {
			s.WriteString(b.text)
		}
	}
	return s.String()
}

// unprinted returns the first line of a page that the output lacks, in the order of the page.
func unprinted(prints []string, got string) (missing string) {
	lines := strings.Split(got, "\n")
	for _, want := range prints {
		if strings.TrimSpace(want) == "…" {
			continue
		}
		pattern := pattern(want)
		i := slices.IndexFunc(lines, pattern.MatchString)
		if i < 0 {
			return want
		}
		lines = lines[i+1:]
	}
	return ""
}

func pattern(line string) *regexp.Regexp {
	words := strings.Fields(line)
	for i, w := range words {
		words[i] = strings.ReplaceAll(regexp.QuoteMeta(w), "…", ".*")
	}
	return regexp.MustCompile(`^\s*` + strings.Join(words, `\s+`) + `\s*$`)
}

// TestPages runs the commands of each page with a real Vault and a real PostgreSQL.
func TestPages(t *testing.T) {
	// `make demo` and `make test` are no-run: they are stages of .ci/run, and a test that ran the tests would run itself.
	bin := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(bin, "pawl"), module+"/cmd/pawl").CombinedOutput(); err != nil {
		t.Fatalf("building cmd/pawl: %v\n%s", err, out)
	}
	for page, list := range pages(t) {
		run := runnable(list)
		if len(run) == 0 {
			continue
		}
		t.Run(page, func(t *testing.T) {
			for _, b := range run {
				if strings.Contains(b.text, "pawl dev") {
					needServers(t)
				}
				if strings.Contains(b.text, "spire-agent") {
					needSPIRE(t)
				}
			}
			path := bin
			for _, b := range run {
				if strings.Contains(b.text, "pawl.sql shop") {
					path = shop(t) + ":" + bin
				}
			}
			play(t, path, run)
		})
	}
}

func needServers(t *testing.T) {
	t.Helper()
	parts.NeedVault(t)
	parts.NeedPostgreSQL(t)
	if _, err := exec.LookPath("psql"); err != nil {
		if os.Getenv("PAWL_REQUIRE") != "" {
			t.Fatal("PAWL_REQUIRE is set, and there is no psql")
		}
		t.Skip("NOT TESTED, there is no psql: the commands of this page")
	}
}

// shop is the reader's own PostgreSQL, with the database that the page is about: a directory in which psql is its
// superuser's.
func shop(t *testing.T) (dir string) {
	t.Helper()
	server := parts.OwnPostgreSQL(t, parts.PostgresConfig{NoSync: true})
	for _, in := range []struct{ database, sql string }{
		{"postgres", "CREATE DATABASE shop"},
		{"shop", "CREATE TABLE orders (id serial); CREATE TABLE customers (id int)"},
	} {
		out, err := exec.CommandContext(t.Context(), "psql", "-v", "ON_ERROR_STOP=1", "-c", in.sql, server.DSN(in.database)).CombinedOutput()
		if err != nil {
			t.Fatalf("making the reader's database: %v\n%s", err, out)
		}
	}
	psql, err := exec.LookPath("psql")
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(server.Address(), ":")
	dir = t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nPGHOST=%s PGPORT=%s PGUSER=postgres PGPASSWORD='%s' exec %s \"$@\"\n", host, port, server.Password(), psql)
	if err := os.WriteFile(filepath.Join(dir, "psql"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// play runs a page in a directory of its own below build, as a reader of the page would.
func play(t *testing.T, bin string, run []block) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(root(t), "build"), 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(filepath.Join(root(t), "build"), "page-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "vault-ca.pem"), parts.NeedVault(t).CAPEM(), 0o600); err != nil { // the reader's own
		t.Fatal(err)
	}
	state := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script(run))
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "RULES="+state)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	said, runErr := cmd.CombinedOutput()
	if runErr != nil {
		var at int
		raw, _ := os.ReadFile(filepath.Join(state, "at"))
		_, _ = fmt.Sscan(string(raw), &at) // no block ran: the first
		out, _ := os.ReadFile(filepath.Join(state, fmt.Sprintf("out.%d", at)))
		t.Fatalf("%s: %v\n%s%s%s", run[at], runErr, run[at].text, out, said)
	}
	for i, b := range run {
		out, err := os.ReadFile(filepath.Join(state, fmt.Sprintf("out.%d", i)))
		if err != nil {
			t.Fatal(err)
		}
		if missing := unprinted(b.prints, string(out)); missing != "" {
			t.Errorf("%s does not print %q, but\n%s", b, missing, out)
		}
	}
}

var (
	linkTo   = regexp.MustCompile(`\]\(([^)#\s]+)[^)]*\)`)
	testFile = regexp.MustCompile(`\b[a-z0-9_/]+_test\.go\b`)
	testName = regexp.MustCompile(`\bTest[A-Z][A-Za-z0-9]*\b`)
	makes    = regexp.MustCompile(`(?m)^\s*make ([a-z ]+?)\s*(#|$|&&)`)
)

// TestPagesPoint checks that the targets of the pages' references exist: linked files, tests by name and make targets.
// Each block must have a mark.
func TestPagesPoint(t *testing.T) {
	tests := map[string]bool{}
	sources(t, ".go", func(file string, source []byte) {
		for _, m := range regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9]*)\(`).FindAllSubmatch(source, -1) {
			tests[string(m[1])] = true
		}
	})
	makefile, err := os.ReadFile(filepath.Join(root(t), "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	eachPage(t, func(page string, source []byte) {
		for _, m := range linkTo.FindAllSubmatch(source, -1) {
			if to := string(m[1]); !strings.Contains(to, "://") && !exists(t, path.Join(path.Dir(page), to)) {
				t.Errorf("%s links to %s, which does not exist", page, to)
			}
		}
		for _, file := range testFile.FindAllString(string(source), -1) {
			if strings.Contains(file, "/") && !exists(t, file) {
				t.Errorf("%s names %s, which does not exist", page, file)
			}
		}
		for _, name := range testName.FindAllString(string(source), -1) {
			if !tests[name] {
				t.Errorf("%s names %s, and no test has that name", page, name)
			}
		}
		for _, b := range blocks(page, source) {
			if b.lang == "" || b.lang == "bash" || b.lang == "console" || b.lang == "shell" {
				t.Errorf("%s is marked %q: mark commands sh, and other text by its language", b, b.lang)
			}
			if b.lang == "sh" && !slices.Contains([]string{"", "fails", "no-run"}, b.mark) {
				t.Errorf("%s has the unknown mark %q", b, b.mark)
			}
			for _, m := range makes.FindAllStringSubmatch(b.text, -1) {
				for target := range strings.FieldsSeq(m[1]) {
					if b.lang == "sh" && !regexp.MustCompile(`(?m)^`+target+`:`).Match(makefile) {
						t.Errorf("%s: there is no `make %s`", b, target)
					}
				}
			}
		}
	})
}

func exists(t *testing.T, file string) bool {
	t.Helper()
	_, err := os.Stat(filepath.Join(root(t), file))
	return err == nil
}

// TestConfigurationPage parses the examples of configuration on the pages.
func TestConfigurationPage(t *testing.T) {
	seen := 0
	for _, list := range pages(t) {
		for _, b := range list {
			if b.lang != "yaml" || b.mark != "configuration" {
				continue
			}
			seen++
			if _, err := wire.ParseConfig([]byte(b.text)); err != nil {
				t.Errorf("%s: %v", b, err)
			}
		}
	}
	if seen == 0 {
		t.Error("no page shows a configuration")
	}
}

// TestPagesBite checks the page reader itself.
func TestPagesBite(t *testing.T) {
	list := blocks("p.md", []byte("a\n```sh\none\n```\n\n```text\nx  …\n```\nb\n```text\nalone\n```\n```sh fails\ntwo\n```\n```sh no-run\nthree\n```\n"))
	if len(list) != 4 || list[0].prints[0] != "x  …" || len(runnable(list)) != 2 || list[2].mark != "fails" || list[2].line != 13 {
		t.Errorf("blocks() = %+v", list)
	}
	for _, row := range []struct{ prints, got, want string }{
		{"a b", "a   b\n", ""}, {"a b", "ab", "a b"}, {"a …", "a c d", ""}, {"a\n…\nb", "a\nx\ny\nb", ""},
		{"a\nb", "b\na", "b"}, {"a.c", "abc", "a.c"}, {"chain:…  x", "chain:ch01 x", ""},
	} {
		if got := unprinted(strings.Split(row.prints, "\n"), row.got); got != row.want {
			t.Errorf("unprinted(%q, %q) = %q, want %q", row.prints, row.got, got, row.want)
		}
	}
	for _, row := range []struct {
		text, mark string
		want       bool
	}{{"true", "", true}, {"false; true", "", false}, {"false", "fails", true}, {"true", "fails", false}, {"false | true", "", false}} {
		cmd := exec.CommandContext(t.Context(), "bash", "-c", script([]block{{text: row.text + "\n", mark: row.mark}}))
		cmd.Env = append(os.Environ(), "RULES="+t.TempDir())
		if err := cmd.Run(); (err == nil) != row.want {
			t.Errorf("running %q marked %q = %v, want success %v", row.text, row.mark, err, row.want)
		}
	}
}

// needSPIRE skips a page that uses SPIRE where it is not built: building it takes minutes.
func needSPIRE(t *testing.T) {
	t.Helper()
	if _, _, err := (parts.Binaries{NoBuild: true}).SPIRE(t.Context()); err != nil {
		parts.Without(t, "spire", err.Error())
	}
}
