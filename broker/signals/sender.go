package signals

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
)

// Subscriber is a receiver of our events.
type Subscriber struct {
	Name     string      // our name for it, in the ledger and as a metric label; required
	URL      string      // its push endpoint, https; required
	Audience string      // the aud of its tokens; required
	TLS      *tls.Config // the roots to trust at URL, and our identity there; required
	Kinds    []string    // of [Kinds]; empty: all
}

// Source provides the events and stores the delivery cursors. *broker.Broker implements it.
type Source interface {
	Subscribe(ctx context.Context, subscriber string) (broker.Revision, error)
	MarkDelivered(ctx context.Context, subscriber string, upto broker.Revision) error
	Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error)
	Event(ctx context.Context, e broker.Entry) (broker.Event, bool, error)
	Watch(broker.ChainID) (changed <-chan struct{}, cancel func())
}

// SenderConfig configures a [Sender].
type SenderConfig struct {
	Source      Source           // required
	Subscribers []Subscriber     // required, each name once
	Issuer      string           // the iss of its tokens; required
	Key         jose.JSONWebKey  // private Ed25519 with a kid; required
	Now         func() time.Time // required
	// Alarm receives the tokens that a subscriber refused. It is also called once each time that a subscriber becomes
	// unreachable. Required.
	Alarm func(op string, err error)
	Mute  spiffeid.ID   // events about chains opened by this ID are not sent; zero: all are sent
	Retry time.Duration // the first wait after a failure, doubled up to a minute; zero: 1 s
	Log   *slog.Logger  // one event for each delivery, never the token; nil: none
}

// Sender pushes events about revocations to subscribers, each at least once and in order. An unreachable subscriber
// is served later, from its delivery cursor in the ledger, and delays no other. Create one with [NewSender].
type Sender struct {
	cfg     SenderConfig
	signer  jose.Signer
	workers []*worker

	stop context.CancelFunc
	done sync.WaitGroup
}

// worker delivers to one subscriber. Its goroutine owns every field but oldest.
type worker struct {
	s       *Sender
	to      Subscriber
	http    *http.Client
	cursor  broker.Revision // entries up to here are processed
	failing bool            // an alarm was raised since the last success

	mu     sync.Mutex // guards oldest
	oldest time.Time  // of the event in delivery; zero: none
}

// Limits of one delivery.
const (
	sendTime   = 10 * time.Second
	maxAnswer  = 16 << 10 // bytes of a refusal
	maxBackoff = time.Minute
	sendPage   = 256 // entries read at once
)

// NewSender validates cfg and returns a sender. Nothing is sent before [Sender.Start].
func NewSender(cfg SenderConfig) (*Sender, error) {
	if cfg.Source == nil || len(cfg.Subscribers) == 0 || cfg.Issuer == "" || cfg.Now == nil || cfg.Alarm == nil {
		return nil, errors.New("signals: SenderConfig.Source, Subscribers, Issuer, Now and Alarm are required")
	}
	if key, ok := cfg.Key.Key.(ed25519.PrivateKey); !ok || len(key) != ed25519.PrivateKeySize || cfg.Key.KeyID == "" {
		return nil, errors.New("signals: SenderConfig.Key must be a private Ed25519 key with a kid")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Retry = cmp.Or(cfg.Retry, time.Second)
	s := &Sender{cfg: cfg}
	var err error
	if s.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: cfg.Key}, (&jose.SignerOptions{}).WithType(tokenType)); err != nil {
		return nil, fmt.Errorf("signals: %w", err)
	}
	names := map[string]bool{}
	for i, to := range cfg.Subscribers {
		u, err := url.Parse(to.URL)
		if to.Name == "" || names[to.Name] || to.Audience == "" || to.TLS == nil ||
			err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
			return nil, fmt.Errorf("signals: subscriber %d needs a unique name, an https URL, an audience and TLS", i+1)
		}
		for _, kind := range to.Kinds {
			if !slices.Contains(Kinds(), kind) {
				return nil, fmt.Errorf("signals: unknown kind of event %q", kind)
			}
		}
		names[to.Name] = true
		s.workers = append(s.workers, &worker{s: s, to: to, http: &http.Client{
			Timeout:       sendTime,
			Transport:     &http.Transport{TLSClientConfig: to.TLS, TLSHandshakeTimeout: sendTime, MaxResponseHeaderBytes: maxAnswer, DisableKeepAlives: true}, // a reused connection would keep an old identity
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}})
	}
	return s, nil
}

// Start starts the delivery. [Sender.Close] ends it.
func (s *Sender) Start() {
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	for _, w := range s.workers {
		s.done.Go(func() { w.run(ctx) })
	}
}

// Close stops the delivery and waits. Undelivered events are sent after the next start.
func (s *Sender) Close() {
	s.stop()
	s.done.Wait()
}

// Lag returns the age of the oldest event that a subscriber has not received, or zero if there is none.
func (s *Sender) Lag(subscriber string) time.Duration {
	for _, w := range s.workers {
		if w.to.Name == subscriber {
			w.mu.Lock()
			defer w.mu.Unlock()
			return since(s.cfg.Now(), w.oldest)
		}
	}
	return 0
}

func (w *worker) run(ctx context.Context) {
	if !w.retry(ctx, func() (err error) {
		w.cursor, err = w.s.cfg.Source.Subscribe(ctx, w.to.Name)
		return err
	}) {
		return
	}
	for ctx.Err() == nil {
		changed, cancel := w.s.cfg.Source.Watch("") // before reading, so that no change in between is lost
		for more := true; more && ctx.Err() == nil; {
			more = w.page(ctx)
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
		cancel()
	}
}

// page delivers the events of some entries, and reports whether there may be more.
func (w *worker) page(ctx context.Context) (more bool) {
	var entries []broker.Entry
	w.retry(ctx, func() (err error) {
		entries, err = w.s.cfg.Source.Entries(ctx, w.cursor, sendPage)
		return err
	})
	for _, e := range entries {
		if !w.entry(ctx, e) {
			return false
		}
		w.cursor = e.Revision
	}
	return len(entries) == sendPage
}

// entry delivers the events of one entry and then marks them delivered. After a crash between the two they are sent
// again.
func (w *worker) entry(ctx context.Context, e broker.Entry) (done bool) {
	var event broker.Event
	is := false
	if !w.retry(ctx, func() (err error) {
		event, is, err = w.s.cfg.Source.Event(ctx, e)
		return err
	}) {
		return false
	}
	if !is || !w.s.cfg.Mute.IsZero() && event.Opener == w.s.cfg.Mute {
		return true
	}
	sent := false
	w.setOldest(e.At)
	defer w.setOldest(time.Time{})
	for _, kind := range kindsOf(event) {
		if !w.to.wants(kind) {
			continue
		}
		sent = true
		if !w.retry(ctx, func() error { return w.push(ctx, event, kind) }) {
			return false
		}
	}
	if sent {
		// If the ledger does not record this, a restart sends the events again.
		if err := w.s.cfg.Source.MarkDelivered(ctx, w.to.Name, e.Revision); err != nil && ctx.Err() == nil {
			w.s.cfg.Log.Warn("recording a delivery failed", "subscriber", w.to.Name, "error", err)
		}
	}
	return true
}

func (w *worker) setOldest(t time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.oldest = t
}

// retry repeats f with back-off until it succeeds. It returns false if ctx ends first.
func (w *worker) retry(ctx context.Context, f func() error) bool {
	series := backoff.Exponential{First: w.s.cfg.Retry, Most: maxBackoff, Jitter: 0.5}
	for ctx.Err() == nil {
		err := f()
		if err == nil {
			w.failing = false
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if !w.failing {
			w.failing = true
			w.s.cfg.Alarm("delivering to subscriber "+w.to.Name, err)
		}
		if series.Wait(ctx) != nil {
			return false
		}
	}
	return false
}

// push sends one token. An error means that it must be sent again. A token that the subscriber refused is skipped,
// with an alarm.
func (w *worker) push(ctx context.Context, e broker.Event, kind string) error {
	claims, err := w.s.tokenOf(w.to, e, kind)
	if err != nil {
		return err
	}
	jws, err := w.s.signer.Sign(claims)
	if err != nil {
		return err
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, w.to.URL, bytes.NewReader([]byte(token)))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/"+tokenType)
	r.Header.Set("Accept", "application/json")
	answer, err := w.http.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	if answer.StatusCode >= 200 && answer.StatusCode < 300 {
		w.s.cfg.Log.Info("event delivered", "subscriber", w.to.Name, "event", kind, "revocation", string(e.Revocation.ID), "revision", uint64(e.Entry.Revision))
		return nil
	}
	if refused, ok := refusalOf(answer); ok {
		w.s.cfg.Alarm("delivering to subscriber "+w.to.Name, fmt.Errorf("%s of %s was refused and is skipped: %w", kind, e.Revocation.ID, refused))
		return nil
	}
	return fmt.Errorf("the subscriber answered %d", answer.StatusCode)
}

// refusalOf reads a refusal of RFC 8935 section 2.4. Its text is external: it is quoted and truncated.
func refusalOf(answer *http.Response) (error, bool) {
	if answer.StatusCode != http.StatusBadRequest {
		return nil, false
	}
	raw, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	var refused Refusal
	if err != nil || json.Unmarshal(raw, &refused) != nil || refused.Code == "" {
		return nil, false
	}
	return fmt.Errorf("%.40q: %.200q", refused.Code, refused.Description), true
}
