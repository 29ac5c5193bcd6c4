package vault

import (
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

// check returns an error while the clocks certainly differ by more than [broker.MaxSkew].
func (k *clock) check() error {
	b, ok := k.read()
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
