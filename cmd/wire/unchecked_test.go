package wire_test

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

// TestUncheckedLedger starts a broker on a ledger that lost a record. The check finds that after the start: the broker
// takes fences, which stay over another start, and gives out nothing.
func TestUncheckedLedger(t *testing.T) {
	s := newSite(t, "example.org")
	s.identify()
	w := s.start()
	first, second := s.open(w, nil), s.open(w, nil)
	w.Close()
	db, err := bbolt.Open(s.config.Ledger, 0o600, &bbolt.Options{NoFreelistSync: true})
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("records"))
		k, _ := b.Cursor().Seek([]byte("e/")) // an index that nothing reads at a start
		return b.Delete(bytes.Clone(k))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	damaged, err := os.ReadFile(s.config.Ledger)
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{string(first.Chain), string(second.Chain)} {
		log := &lockedBuffer{}
		w := s.startLogging(log)
		rv, err := s.operator().Revoke(t.Context(), api.RevokeRequest{Selector: "chain:" + root, Reason: "test"})
		if err != nil || rv.Fenced.IsZero() {
			t.Errorf("Revoke = %+v, %v, want fenced", rv, err)
		}
		_, err = s.agent().Open(t.Context(), agent.Chain{Task: "t", Rights: []agent.Right{{Tool: "notes.read", Use: true}}})
		var p *agent.Error
		if !errors.As(err, &p) || p.Code != "issuing_stopped" || p.RetryAfter() == 0 {
			t.Errorf("Open = %v, want issuing_stopped and a time to wait", err)
		}
		if status := health(t, s); status != http.StatusServiceUnavailable {
			t.Errorf("GET /healthz = %d, want 503", status)
		}
		within(t, 10*time.Second, "an alarm about the ledger", func() bool {
			return strings.Contains(log.String(), "the ledger failed its check")
		})
		for _, chain := range []string{string(first.Chain), root} {
			list, err := s.operator().Revocations(t.Context())
			found := false
			for _, rv := range list {
				found = found || rv.Selector == "chain:"+chain
			}
			if err != nil || !found {
				t.Errorf("the revocations have none of %s: %+v, %v", chain, list, err)
			}
		}
		w.Close()
	}
	if now, err := os.ReadFile(s.config.Ledger); err != nil || !bytes.Equal(now, damaged) {
		t.Errorf("the damaged file was changed (%v)", err)
	}
}

// lockedBuffer is safe for concurrent use.
type lockedBuffer struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
