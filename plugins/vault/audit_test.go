package vault_test

import (
	"bytes"
	"crypto/tls"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
)

// auditDevice is a file audit device of a real Vault: a pipe, which the test can break and mend.
type auditDevice struct {
	t    *testing.T
	path string
	read sync.WaitGroup
	pipe *os.File

	written atomic.Int64 // bytes
}

// Write counts the bytes that Vault wrote.
func (d *auditDevice) Write(p []byte) (int, error) {
	d.written.Add(int64(len(p)))
	return len(p), nil
}

func newAuditDevice(t *testing.T, s *site) *auditDevice {
	d := &auditDevice{t: t, path: filepath.Join(t.TempDir(), "audit")}
	d.open()
	t.Cleanup(d.close)
	s.write(t, "sys/audit/pipe", map[string]any{"type": "file", "options": map[string]string{"file_path": d.path}})
	return d
}

// open makes the pipe and counts all that Vault writes.
func (d *auditDevice) open() {
	if err := syscall.Mkfifo(d.path, 0o600); err != nil {
		d.t.Fatal(err)
	}
	pipe, err := os.OpenFile(d.path, os.O_RDWR, 0) // never blocks, unlike a reader without a writer
	if err != nil {
		d.t.Fatal(err)
	}
	d.pipe = pipe
	d.read.Go(func() { _, _ = io.Copy(d, pipe) })
}

func (d *auditDevice) close() {
	_ = d.pipe.Close()
	d.read.Wait()
	_ = os.Remove(d.path)
}

// fail lets each write fail: nothing reads the pipe, and its name is a directory that Vault cannot open.
func (d *auditDevice) fail() {
	d.close()
	if err := os.Mkdir(d.path, 0o700); err != nil {
		d.t.Error(err)
	}
}

func (d *auditDevice) mend() {
	if err := os.Remove(d.path); err != nil {
		d.t.Error(err)
	}
	d.open()
}

// TestRealAuditRefusesList revokes leases while Vault's audit device cannot write the list of them, as a socket or
// syslog device cannot write a long entry. Vault then fails the list. A look-up of each lease answers instead.
func TestRealAuditRefusesList(t *testing.T) {
	s := newSite(t, parts.OwnVault(t, parts.VaultConfig{}))
	device := newAuditDevice(t, s)
	target, err := url.Parse(s.Address())
	if err != nil {
		t.Fatal(err)
	}
	upstream := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.admin.Roots}}
	defer upstream.CloseIdleConnections()
	forward := httputil.NewSingleHostReverseProxy(target)
	forward.Transport = upstream
	var answers bytes.Buffer // of the lists
	f := newFake(t, nil)
	f.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "LIST" {
			forward.ServeHTTP(w, r)
			return
		}
		device.fail()
		answer := httptest.NewRecorder()
		forward.ServeHTTP(answer, r)
		device.mend()
		answers.Write(answer.Body.Bytes())
		w.WriteHeader(answer.Code)
		_, _ = w.Write(answer.Body.Bytes())
	})
	var log bytes.Buffer
	c := newClient(t, vault.Config{Address: f.URL, Roots: f.roots(), Login: vault.TokenLogin(s.RootToken()),
		TokenRole: s.setup.TokenRole, Log: slog.New(slog.NewTextHandler(&log, nil))})
	branch(t, c, delegation(rootID, ""), s.a())
	var leases []string
	for range 12 {
		leases = append(leases, issue(t, c, rootID, s.a(), s.mint("a")).ID)
	}
	if err := c.Revoke(t.Context(), leases[3]); err != nil {
		t.Fatal(err)
	}
	gone, err := c.LeasesGone(t.Context(), leases)
	t.Logf("Vault answered the list with %s", answers.String())
	if err != nil || countTrue(gone) != 1 || !gone[3] {
		t.Errorf("LeasesGone() = %v, %v, want only the revoked one gone", gone, err)
	}
	if !strings.Contains(log.String(), "elide_list_responses") {
		t.Errorf("the log has %q, want the audit device named", log.String())
	}
	if _, err := c.Leases(t.Context(), brokertest.Path(s.pki+"/issue/a")); err == nil ||
		!strings.Contains(err.Error(), "audit device") {
		t.Errorf("Leases() = %v, want the audit device named", err)
	}
}

// TestRealListCost compares the bytes that a list of leases and the look-ups of the same leases cost each audit device.
// A sweep lists, and looks up unknown leases only.
func TestRealListCost(t *testing.T) {
	s := newSite(t, parts.OwnVault(t, parts.VaultConfig{}))
	c := newClient(t, s.config())
	branch(t, c, delegation(rootID, ""), s.a())
	const n = 40
	for range n {
		issue(t, c, rootID, s.a(), s.mint("a"))
	}
	device := newAuditDevice(t, s)
	path := brokertest.Path(s.pki + "/issue/a")
	cost := func(f func()) int64 {
		before := device.written.Load()
		f()
		// Vault answers when the pipe has the entries. The reader may be behind.
		end := int64(-1)
		until(t, 5*time.Second, "the entries in the pipe", func() bool {
			last := end
			end = device.written.Load()
			return end == last && end > before
		})
		return end - before
	}
	var ids []string
	list := cost(func() {
		var err error
		if ids, err = c.Leases(t.Context(), path); err != nil || len(ids) != n {
			t.Fatalf("Leases() = %d, %v, want %d", len(ids), err, n)
		}
	})
	lookUps := cost(func() {
		if found, err := c.LookUpLeases(t.Context(), ids); err != nil || len(found) != n {
			t.Fatalf("LookUpLeases() = %d, %v, want %d", len(found), err, n)
		}
	})
	t.Logf("for each of %d leases: %d bytes in a list, %d in a look-up", n, list/n, lookUps/n)
	if list/n > 250 || lookUps < 8*list {
		t.Errorf("a list of %d leases wrote %d bytes and their look-ups %d, want less than 250 for each in a list", n, list,
			lookUps)
	}
}
