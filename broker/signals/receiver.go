package signals

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/jws"
	"github.com/pawlsec/pawl/broker/selector"
)

// Transmitter is a trusted source of events.
type Transmitter struct {
	Issuer   string            // the iss of its tokens, exactly; required
	Audience string            // the aud of tokens for us, exactly; required
	Keys     []jose.JSONWebKey // from ParseKeys; required
	Freeze   bool              // freeze the subjects of its events; false: revoke them permanently

	// Subjects maps the transmitter's names for its subjects to selectors. A name that is not listed must be a SPIFFE
	// ID. It then selects the delegations with that holder.
	Subjects map[string]selector.Selector

	// ChainLabel is the label of chains here that continue a chain, or session, of the transmitter; its value is the
	// name of that session. An event about the session selects these chains. Empty: there is no such label, and such
	// events are refused.
	ChainLabel string
}

// Config configures a [Receiver].
type Config struct {
	Transmitters []Transmitter // required, each issuer once
	// Revoke is the engine's method. Required.
	Revoke func(context.Context, broker.Operator, selector.Request) (broker.Revocation, error)
	// Domains lists the trust domains of the SPIFFE IDs that an event may name. Required.
	Domains []string
	Now     func() time.Time // required
	// Remember limits how many tokens of the last minutes are remembered. Further tokens are deferred: the
	// transmitter must send them later. Only tokens signed by a transmitter count. Zero: 16,384.
	Remember int
	// Before lists the revocations and freezes made until now. A token that caused one of these is not accepted
	// again, so that a restart repeats none.
	Before []broker.Revocation
	Log    *slog.Logger // one event for each token, never the token; nil: none
}

// Receiver accepts tokens and calls the engine. It is the http.Handler of the push endpoint. Create one with [New];
// it is safe for concurrent use.
type Receiver struct {
	cfg          Config
	transmitters map[string]Transmitter                // by issuer
	keys         map[string]map[string]jose.JSONWebKey // issuer → kid
	domains      map[string]bool                       // Domains

	mu   sync.Mutex // guards seen
	seen map[seenID]time.Time
}

// seenID identifies a received token by the actor and the reason of its revocation, because the ledger keeps these.
// seen has the time until which a repeated token must be refused.
type seenID struct{ actor, reason string }

// actorOf returns the name under which a transmitter acts here.
func actorOf(issuer string) string { return "set:" + issuer }

// New validates cfg and returns a receiver.
func New(cfg Config) (*Receiver, error) {
	if len(cfg.Transmitters) == 0 || cfg.Revoke == nil || cfg.Now == nil || len(cfg.Domains) == 0 {
		return nil, errors.New("signals: Config.Transmitters, Revoke, Domains and Now are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Remember = cmp.Or(cfg.Remember, 16<<10)
	r := &Receiver{cfg: cfg, transmitters: map[string]Transmitter{}, keys: map[string]map[string]jose.JSONWebKey{}, domains: map[string]bool{},
		seen: map[seenID]time.Time{}}
	for _, d := range cfg.Domains {
		r.domains[d] = true
	}
	for i, t := range cfg.Transmitters {
		if _, twice := r.transmitters[t.Issuer]; twice || t.Issuer == "" || t.Audience == "" || len(t.Keys) == 0 {
			return nil, fmt.Errorf("signals: transmitter %d needs a unique issuer, an audience and keys", i+1)
		}
		r.transmitters[t.Issuer], r.keys[t.Issuer] = t, map[string]jose.JSONWebKey{}
		for _, k := range t.Keys {
			if alg, err := jws.Algorithm(k); err != nil || string(alg) != k.Algorithm {
				return nil, fmt.Errorf("signals: a key of transmitter %d is not from ParseKeys", i+1)
			}
			r.keys[t.Issuer][k.KeyID] = k
		}
	}
	for _, rv := range cfg.Before {
		if until := rv.Fenced.Add(MaxAge + MaxSkew); strings.HasPrefix(rv.By, actorOf("")) && cfg.Now().Before(until) {
			r.seen[seenID{rv.By, rv.Reason}] = until
		}
	}
	return r, nil
}

// Refusal is the reason why a token was refused, in the terms of RFC 8935 section 2.4.
type Refusal struct {
	Code        string `json:"err"` // invalid_request, invalid_key, invalid_issuer, invalid_audience
	Description string `json:"description"`
}

func (r *Refusal) Error() string { return r.Code + ": " + r.Description }

func refuse(code string, err error) *Refusal { return &Refusal{code, err.Error()} }

// signal is an authenticated token.
type signal struct {
	Issuer     string
	ID         string              // its jti
	Event      string              // "session-revoked", "credential-change revoke", …
	Selector   string              // selects its subject here; empty without effect
	Revocation broker.RevocationID // the revocation that it caused; empty without effect
}

// receive processes one token, and returns once its subject is fenced. A refusal is a *[Refusal]. Any other error is
// the engine's, and the same token may then be sent again.
func (r *Receiver) receive(ctx context.Context, token []byte) (signal, error) {
	now := r.cfg.Now()
	o, err := open(token)
	if err != nil {
		return signal{}, refuse("invalid_request", err)
	}
	t, err := r.authenticate(o)
	if err != nil {
		return signal{}, err
	}
	s := signal{Issuer: t.Issuer, ID: o.claims.ID}
	if err := o.claims.checkTime(now); err != nil {
		return s, refuse("invalid_request", err)
	}
	event, effective, err := o.claims.effect()
	if err != nil {
		return s, refuse("invalid_request", err)
	}
	s.Event = event
	sel, err := r.selectorOf(t, o.claims.Subject)
	if err != nil {
		return s, refuse("invalid_request", err)
	}
	this := seenID{actorOf(t.Issuer), reason(event, o.claims.ID)}
	if err := r.checkReplay(this, time.Unix(*o.claims.Issued, 0).Add(MaxAge), now); err != nil {
		return s, err
	}
	if !effective {
		return s, nil
	}
	s.Selector = sel.String()
	rv, err := r.cfg.Revoke(ctx, broker.Operator{Name: this.actor}, selector.Request{Selector: sel,
		Reason: this.reason, Freeze: t.Freeze})
	if broker.KindOf(err) == broker.NotFound {
		return s, nil // its subject has nothing here, so sending it again would change nothing
	}
	if err != nil {
		r.forget(this)
		return s, err
	}
	s.Revocation = rv.ID
	return s, nil
}

// authenticate returns the transmitter that signed the token for us.
func (r *Receiver) authenticate(o opened) (Transmitter, error) {
	c := o.claims
	t, known := r.transmitters[c.Issuer]
	if !known {
		return t, &Refusal{"invalid_issuer", "the issuer is not a known transmitter"}
	}
	key, known := r.keys[c.Issuer][o.Kid]
	if !known {
		return t, &Refusal{"invalid_key", "the key is not one of the issuer's"}
	}
	if !o.SignedBy(key) {
		return t, &Refusal{"invalid_key", "the signature does not match the key and its algorithm"}
	}
	if len(c.Audience) != 1 || c.Audience[0] != t.Audience {
		return t, &Refusal{"invalid_audience", "the token is not for this audience alone"}
	}
	if !printable(c.ID) {
		return t, &Refusal{"invalid_request", "the token has no jti of 1 to 256 visible characters"}
	}
	return t, nil
}

func printable(id string) bool {
	for _, b := range []byte(id) {
		if b <= ' ' || b >= 0x7f {
			return false
		}
	}
	return id != "" && len(id) <= maxID
}

// reason is the reason for the audit log, which holds broker.MaxTask bytes. It names the token by its jti, or by the
// digest of a jti that is too long.
func reason(event, id string) string {
	s := "security event: " + event + ", jti "
	if len(s)+len(id) > broker.MaxTask {
		return fmt.Sprintf("%sof SHA-256 %x", s, sha256.Sum256([]byte(id)))
	}
	return s + id
}

// selectorOf returns the selector for a subject.
func (r *Receiver) selectorOf(t Transmitter, s subject) (selector.Selector, error) {
	if session := s.session(); session != "" && t.ChainLabel != "" {
		if !plain(session) {
			return selector.Selector{}, errors.New("the session's name is not a label value")
		}
		return selector.Parse("label." + t.ChainLabel + ":" + session)
	}
	name, err := s.name(t.Issuer)
	if err != nil {
		return selector.Selector{}, err
	}
	if sel, listed := t.Subjects[name]; listed {
		return sel, nil
	}
	id, err := spiffeid.FromString(name)
	if err != nil || id.Path() == "" || !r.domains[id.TrustDomain().Name()] {
		return selector.Selector{}, errors.New("the subject is not known here")
	}
	return selector.Parse("spiffe:" + id.String())
}

// plain reports whether a selector can contain a name as it is.
func plain(name string) bool {
	for _, b := range []byte(name) {
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '-' || b == '_') {
			return false
		}
	}
	return len(name) <= 64
}

// checkReplay refuses a repeated token. It forgets tokens that are too old to be accepted anyway.
func (r *Receiver) checkReplay(id seenID, until, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, again := r.seen[id]; again {
		return &Refusal{"invalid_request", "the token was received before"}
	}
	if len(r.seen) >= r.cfg.Remember {
		for old, end := range r.seen {
			if now.After(end) {
				delete(r.seen, old)
			}
		}
	}
	if len(r.seen) >= r.cfg.Remember {
		return broker.Errorf(broker.Unavailable, "signal", "too many tokens within %s", MaxAge).After(time.Minute)
	}
	r.seen[id] = until
	return nil
}

// forget lets a token without effect be sent again.
func (r *Receiver) forget(id seenID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.seen, id)
}

// ServeHTTP is the push endpoint of RFC 8935. It answers 202 to an accepted token, 400 with err and description to a
// refused one, and 503 to one that should be sent again.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if types := req.Header.Values("Content-Type"); len(types) != 1 || types[0] != "application/"+tokenType {
		r.answer(w, req, signal{}, &Refusal{"invalid_request", "the Content-Type must be application/" + tokenType})
		return
	}
	token, err := io.ReadAll(io.LimitReader(req.Body, MaxToken+1))
	if err != nil {
		r.answer(w, req, signal{}, &Refusal{"invalid_request", "the token could not be read"})
		return
	}
	s, err := r.receive(req.Context(), token)
	r.answer(w, req, s, err)
}

func (r *Receiver) answer(w http.ResponseWriter, req *http.Request, s signal, err error) {
	attrs := []slog.Attr{slog.String("issuer", s.Issuer), slog.String("jti", s.ID), slog.String("event", s.Event),
		slog.String("selector", s.Selector), slog.String("revocation", string(s.Revocation))}
	var refused *Refusal
	switch {
	case err == nil:
		r.cfg.Log.LogAttrs(req.Context(), slog.LevelInfo, "security event accepted", attrs...)
		w.WriteHeader(http.StatusAccepted)
	case errors.As(err, &refused):
		r.cfg.Log.LogAttrs(req.Context(), slog.LevelWarn, "security event refused", append(attrs, slog.String("error", err.Error()))...)
		body, err := json.Marshal(refused)
		if err != nil {
			panic("signals: a refusal always encodes")
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Language", "en")
		w.WriteHeader(http.StatusBadRequest)
		_, _ = w.Write(body) // the transmitter has disconnected; the log has the rest
	default:
		r.cfg.Log.LogAttrs(req.Context(), slog.LevelError, "security event failed", append(attrs, slog.String("error", err.Error()))...)
		w.Header().Set("Retry-After", "5")
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}
