package vault

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// clock measures how far Vault's clock is ahead of the broker's. Vault dates its answers in whole seconds, so that each
// answer bounds the difference from both sides, and the answers of some seconds together bound it closely. Safe for
// concurrent use.
type clock struct {
	now func() time.Time

	mu       sync.Mutex // guards the fields below
	latest   bounds     // from the answers since began
	before   bounds     // from the answers of the period before
	began    time.Time  // zero: there was no answer yet
	answered time.Time  // when the last answer came
}

// bounds are the least and the greatest difference that answers allow.
type bounds struct{ low, high time.Duration }

// clockPeriod is the time over which answers are put together. The difference may change from one period to the next.
const clockPeriod = 5 * time.Second

// within returns the part of b that is inside c too, and whether there is one.
func (b bounds) within(c bounds) (bounds, bool) {
	b.low, b.high = max(b.low, c.low), min(b.high, c.high)
	return b, b.low <= b.high
}

// observe notes an answer that was dated between the sending of its request and its arrival.
func (k *clock) observe(dated, sent, arrived time.Time) {
	b := bounds{dated.Sub(arrived), dated.Add(time.Second).Sub(sent)}
	if b.low > b.high {
		return // the broker's clock was set meanwhile
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	switch k.answered = arrived; {
	case k.began.IsZero() || arrived.Sub(k.began) > 2*clockPeriod || arrived.Before(k.began):
		k.before, k.latest, k.began = b, b, arrived
	case arrived.Sub(k.began) > clockPeriod:
		k.before, k.latest, k.began = k.latest, b, arrived
	}
	var ok bool
	if k.latest, ok = b.within(k.latest); !ok { // a clock was set, or another node answered
		k.latest, k.before = b, b
	}
	if _, ok := k.latest.within(k.before); !ok {
		k.before = k.latest
	}
}

// read returns the difference. ok is false before the first answer.
func (k *clock) read() (b bounds, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	b, _ = k.latest.within(k.before)
	return b, !k.began.IsZero()
}

// quiet reports whether no answer came for a period.
func (k *clock) quiet() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	since := k.now().Sub(k.answered)
	return since >= clockPeriod-time.Second || since < 0 // the clock was set back
}

// errSkew means that the clocks differ by more than [broker.MaxSkew].
var errSkew = errors.New("the clocks of the broker and of vault differ")

// Skew returns how far Vault's clock is ahead of the broker's, and by how much that can be wrong. ok is false before
// the first answer of Vault.
func (c *Client) Skew() (ahead, uncertain time.Duration, ok bool) {
	b, ok := c.wire.clock.read()
	return (b.low + b.high) / 2, (b.high - b.low) / 2, ok
}

// CheckClock returns an error while Vault's clock certainly differs from the broker's by more than [broker.MaxSkew].
// Certificates, which end by Vault's clock, are not issued then.
func (c *Client) CheckClock() error {
	b, ok := c.wire.clock.read()
	if !ok || b.low <= broker.MaxSkew && b.high >= -broker.MaxSkew {
		return nil
	}
	ahead, side := (b.low+b.high)/2, "ahead of"
	if ahead < 0 {
		ahead, side = -ahead, "behind"
	}
	return broker.Errorf(broker.Unavailable, "vault", "Vault's clock is %v %s the broker's, of at most %v: set them right",
		ahead.Round(100*time.Millisecond), side, broker.MaxSkew).With(broker.CodeClockSkew).Because(errSkew).After(later)
}

// clockLoop asks for Vault's time while no other request does. Vault answers sys/health in each of its states, and
// without a token.
func (c *Client) clockLoop(ctx context.Context) {
	tick := time.NewTicker(clockPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if c.cfg.BehindProxy || c.wire.clock.quiet() {
			_ = c.MeasureClock(ctx) // without an answer nothing is measured
		}
	}
}

// MeasureClock asks Vault for its time, for [Client.Skew] and [Client.CheckClock].
func (c *Client) MeasureClock(ctx context.Context) error {
	_, err := c.do(ctx, call{method: "GET", path: "sys/health", query: anyHealth})
	return err
}

// anyHealth makes Vault answer 200 in each of its states.
const anyHealth = "standbyok=true&perfstandbyok=true&activecode=200&standbycode=200&drsecondarycode=200&" +
	"performancestandbycode=200&sealedcode=200&uninitcode=200&haunhealthycode=200&removedcode=200"

// date observes the date of an answer. The date is a proxy's where one may answer in Vault's place.
func (w *wire) date(h http.Header, sent time.Time) {
	if dated, err := http.ParseTime(h.Get("Date")); err == nil && !w.proxied {
		w.clock.observe(dated, sent, w.clock.now())
	}
}

// serverTime observes the time in an answer of sys/health.
func (w *wire) serverTime(unix int64, sent time.Time) {
	if unix > 0 {
		w.clock.observe(time.Unix(unix, 0), sent, w.clock.now())
	}
}
