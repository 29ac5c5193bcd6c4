package server_test

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/server"
)

// TestUnknownIDIsHeldBack refuses ids after some work. The answer to an unknown one comes at the next multiple of 25 ms,
// whatever the work took, and every other one at once.
func TestUnknownIDIsHeldBack(t *testing.T) {
	const ms = time.Millisecond
	for _, row := range []struct {
		code       broker.Code
		work, want time.Duration
	}{
		{broker.CodeDelegationUnknown, ms, 25 * ms}, {broker.CodeDelegationUnknown, 24 * ms, 25 * ms},
		{broker.CodeGrantUnknown, 26 * ms, 50 * ms}, {broker.CodeRevocationUnknown, ms, ms},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, func(c *server.Config) {
				identify := c.Identify
				c.Now = time.Now
				c.Identify = func(q *http.Request) (broker.Caller, error) { time.Sleep(row.work); return identify(q) }
			})
			r.fake.err = broker.Errorf(broker.NotFound, "op", "no").With(row.code)
			began := time.Now()
			w := r.ask("agents", "POST", steps, `{"tool":"postgres"}`)
			if took := time.Since(began); took != row.want || w.Code != http.StatusNotFound {
				t.Errorf("%s after %v of work: %d after %v, want 404 after %v", row.code, row.work, w.Code, took, row.want)
			}
		})
	}
}
