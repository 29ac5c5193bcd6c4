package vault_test

import (
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/vault"
)

// checkSkew checks the answer of a client about a Vault whose clock is ahead.
func checkSkew(t *testing.T, c *vault.Client, ahead time.Duration) {
	t.Helper()
	if low, high := c.Bounds(); low > ahead || high < ahead || high-low > 3*time.Second {
		t.Errorf("Vault is %v ahead, and the bounds are %v and %v", ahead, low, high)
	}
	var refusal *broker.Error
	err := c.CheckClock()
	if off := ahead.Abs() > broker.MaxSkew+time.Second; off != (err != nil) && (off || ahead.Abs() <= broker.MaxSkew) {
		t.Errorf("Vault is %v ahead: CheckClock() = %v", ahead, err)
	}
	if err != nil && (!errors.As(err, &refusal) || refusal.Code != broker.CodeClockSkew || refusal.RetryAfter <= 0) {
		t.Errorf("CheckClock() = %v, want code clock_skew with a time to retry", err)
	}
}

// TestRealSkew measures the clock of a real Vault, and mints certificates up to the bound.
func TestRealSkew(t *testing.T) {
	s := newSite(t, parts.NeedVault(t))
	for _, ahead := range []time.Duration{-time.Hour, -5 * time.Second, -2 * time.Second, 0, 2 * time.Second, 5 * time.Second, time.Hour} {
		cfg := s.config()
		cfg.Now = func() time.Time { return time.Now().Add(-ahead) }
		c := newClient(t, cfg)
		if _, err := c.CreateDelegationToken(t.Context(), broker.Delegation{ID: rootID, Expires: cfg.Now().Add(time.Minute)}, []string{s.a()}); err != nil {
			t.Fatal(err)
		}
		checkSkew(t, c, ahead)
	}
}

// TestSkewBehindProxy holds that the date of an answer is not Vault's where a proxy may answer, and that the body of
// sys/health is.
func TestSkewBehindProxy(t *testing.T) {
	for _, ahead := range []time.Duration{-6 * time.Second, 0, 6 * time.Second} {
		f := newFake(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/v1/sys/health" {
				t.Errorf("the client asked for %s", r.URL.Path)
			}
			_, _ = fmt.Fprintf(w, `{"sealed":true,"server_time_utc":%d}`, time.Now().Add(ahead).Unix())
		})
		c := f.client(t, func(cfg *vault.Config) { cfg.BehindProxy = true })
		if _, _, ok := c.Skew(); ok {
			t.Error("the clock was measured by a date that may be a proxy's")
		}
		if err := c.MeasureClock(t.Context()); err != nil {
			t.Fatal(err)
		}
		checkSkew(t, c, ahead)
	}
}
