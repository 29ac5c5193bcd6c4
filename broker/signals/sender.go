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
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
)

// Subscriber is somebody who is told of events.
type Subscriber struct {
	Name     string      // of ours for it: the ledger's, and a label of metrics; required
	URL      string      // its push endpoint, https; required
	Audience string      // the aud of its tokens; required
	TLS      *tls.Config // whom to believe at URL, and who we are there; required
	Kinds    []string    // of [Kinds]; empty: all
}

// Source is what events are read from, and where it is kept what was told. *broker.Broker is one.
type Source interface {
	Subscribe(ctx context.Context, subscriber string) (broker.Revision, error)
	MarkDelivered(ctx context.Context, subscriber string, upto broker.Revision) error
	Entries(ctx context.Context, after broker.Revision, limit int) ([]broker.Entry, error)
	Event(ctx context.Context, e broker.Entry) (broker.Event, bool, error)
	Watch(broker.ChainID) (changed <-chan struct{}, cancel func())
}

// SenderConfig is what a [Sender] is made of.
type SenderConfig struct {
	Source      Source           // required
	Subscribers []Subscriber     // required, each name once
	Issuer      string           // the iss of its tokens; required
	Key         jose.JSONWebKey  // private Ed25519 with a kid; required
	Now         func() time.Time // required
	// Alarm is told of tokens that a subscriber refused, and once of each time that one cannot be reached.
	// Required.
	Alarm func(op string, err error)
	Mute  spiffeid.ID   // nobody is told of chains that this one opened; zero: everything is told
	Retry time.Duration // the first wait after a failure, doubled up to a minute; zero: 1 s
	Log   *slog.Logger  // one event for each delivery, never the token; nil: none
}

// Sender tells subscribers of revocations, each at least once and in order. A subscriber that is away is
// told later, from where the ledger says that it stopped, and delays nobody else. Make one with [NewSender].
type Sender struct {
	cfg    SenderConfig
	signer jose.Signer
	lines  []*line

	stop context.CancelFunc
	done sync.WaitGroup
}

// line is the way to one subscriber. Its goroutine owns all of it but oldest.
type line struct {
	s       *Sender
	to      Subscriber
	http    *http.Client
	at      broker.Revision // everything up to here was looked at
	failing bool            // an alarm was raised since the last success

	mu     sync.Mutex // guards oldest
	oldest time.Time  // of the event that is being told; zero: none
}

// Bounds of one delivery.
const (
	sendTime   = 10 * time.Second
	maxAnswer  = 16 << 10 // bytes of a refusal
	lastWait   = time.Minute
	pageOfSend = 256 // entries read at once
)

// NewSender validates cfg. Nothing is sent before [Sender.Start].
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
			return nil, fmt.Errorf("signals: subscriber %d needs a name of its own, an https URL, an audience and TLS", i+1)
		}
		for _, kind := range to.Kinds {
			if !slices.Contains(Kinds(), kind) {
				return nil, fmt.Errorf("signals: there are no events %q", kind)
			}
		}
		names[to.Name] = true
		s.lines = append(s.lines, &line{s: s, to: to, http: &http.Client{
			Timeout:       sendTime,
			Transport:     &http.Transport{TLSClientConfig: to.TLS, TLSHandshakeTimeout: sendTime, MaxResponseHeaderBytes: maxAnswer, DisableKeepAlives: true}, // a connection keeps the identity it began with
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}})
	}
	return s, nil
}

// Start begins to tell, until [Sender.Close].
func (s *Sender) Start() {
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	for _, l := range s.lines {
		s.done.Go(func() { l.run(ctx) })
	}
}

// Close stops and waits. What was not told yet is after the next start.
func (s *Sender) Close() {
	s.stop()
	s.done.Wait()
}

// Lag is how old the oldest event is that a subscriber was not told of yet; zero when there is none.
func (s *Sender) Lag(subscriber string) time.Duration {
	for _, l := range s.lines {
		if l.to.Name == subscriber {
			l.mu.Lock()
			defer l.mu.Unlock()
			return since(s.cfg.Now(), l.oldest)
		}
	}
	return 0
}

func (l *line) run(ctx context.Context) {
	if !l.until(ctx, func() (err error) {
		l.at, err = l.s.cfg.Source.Subscribe(ctx, l.to.Name)
		return err
	}) {
		return
	}
	for ctx.Err() == nil {
		changed, cancel := l.s.cfg.Source.Watch("") // before looking, so that nothing comes in between unseen
		for more := true; more && ctx.Err() == nil; {
			more = l.page(ctx)
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
		cancel()
	}
}

// page tells of what some entries record, and gives whether there may be more.
func (l *line) page(ctx context.Context) (more bool) {
	var entries []broker.Entry
	l.until(ctx, func() (err error) {
		entries, err = l.s.cfg.Source.Entries(ctx, l.at, pageOfSend)
		return err
	})
	for _, e := range entries {
		if !l.entry(ctx, e) {
			return false
		}
		l.at = e.Revision
	}
	return len(entries) == pageOfSend
}

// entry tells of what one entry records, and then records that. A crash between the two has the
// subscriber told again.
func (l *line) entry(ctx context.Context, e broker.Entry) (done bool) {
	var event broker.Event
	is := false
	if !l.until(ctx, func() (err error) {
		event, is, err = l.s.cfg.Source.Event(ctx, e)
		return err
	}) {
		return false
	}
	if !is || !l.s.cfg.Mute.IsZero() && event.Opener == l.s.cfg.Mute {
		return true
	}
	said := false
	l.note(e.At)
	defer l.note(time.Time{})
	for _, kind := range kindsOf(event) {
		if !l.to.wants(kind) {
			continue
		}
		said = true
		if !l.until(ctx, func() error { return l.tell(ctx, event, kind) }) {
			return false
		}
	}
	if said {
		// When the ledger takes nothing, only a restart has it told again.
		if err := l.s.cfg.Source.MarkDelivered(ctx, l.to.Name, e.Revision); err != nil && ctx.Err() == nil {
			l.s.cfg.Log.Warn("not recorded what a subscriber was told", "subscriber", l.to.Name, "error", err)
		}
	}
	return true
}

func (l *line) note(t time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.oldest = t
}

// until repeats f until it succeeds, and gives false when ctx ends before.
func (l *line) until(ctx context.Context, f func() error) bool {
	for pause := l.s.cfg.Retry; ctx.Err() == nil; pause = min(2*pause, lastWait) {
		err := f()
		if err == nil {
			l.failing = false
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if !l.failing {
			l.failing = true
			l.s.cfg.Alarm("telling subscriber "+l.to.Name, err)
		}
		timer := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
	return false
}

// tell sends one token. An error says that it must be sent again; what the subscriber refused for good is
// passed over, with an alarm.
func (l *line) tell(ctx context.Context, e broker.Event, kind string) error {
	claims, err := l.s.tokenOf(l.to, e, kind)
	if err != nil {
		return err
	}
	jws, err := l.s.signer.Sign(claims)
	if err != nil {
		return err
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, l.to.URL, bytes.NewReader([]byte(token)))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/"+tokenType)
	r.Header.Set("Accept", "application/json")
	answer, err := l.http.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	if answer.StatusCode >= 200 && answer.StatusCode < 300 {
		l.s.cfg.Log.Info("told", "subscriber", l.to.Name, "event", kind, "revocation", string(e.Revocation.ID), "revision", uint64(e.Entry.Revision))
		return nil
	}
	if refused, ok := refusalOf(answer); ok {
		l.s.cfg.Alarm("telling subscriber "+l.to.Name, fmt.Errorf("%s of %s was refused and is passed over: %w", kind, e.Revocation.ID, refused))
		return nil
	}
	return fmt.Errorf("the subscriber answers %d", answer.StatusCode)
}

// refusalOf reads a refusal of RFC 8935 section 2.4. Its text is somebody else's: quoted, and cut.
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
