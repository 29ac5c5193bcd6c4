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
	"github.com/pawlsec/pawl/broker/selector"
)

// Transmitter is somebody whose events are believed.
type Transmitter struct {
	Issuer   string            // the iss of its tokens, exactly; required
	Audience string            // the aud of tokens for us, exactly; required
	Keys     []jose.JSONWebKey // of ParseKeys; required
	Freeze   bool              // freeze what its events are about; false: revoke it, for good

	// Subjects says what the transmitter's names for its subjects mean here: name → selector. A name
	// that is not listed must be a SPIFFE ID, and then means whoever holds delegations as that.
	Subjects map[string]selector.Selector

	// ChainLabel is the label under which chains here carry the name of the transmitter's chain, or session,
	// that they go on from: an event about that is about them. Empty: there is none, and such events
	// are refused.
	ChainLabel string
}

// Config is what a [Receiver] is made of.
type Config struct {
	Transmitters []Transmitter // required, each issuer once
	// Revoke is the engine's. Required.
	Revoke func(context.Context, broker.Operator, selector.Request) (broker.Revocation, error)
	// Domains are the trust domains of which an event may name SPIFFE IDs. Required.
	Domains []string
	Now     func() time.Time // required
	// Remember is how many tokens of the last minutes are remembered; more are told to come again later.
	// Only what a transmitter signed is. Zero: 16,384.
	Remember int
	// Before is what was revoked and frozen until now. A token that one of these followed from is not taken
	// again, so that a restart forgets none that was acted on.
	Before []broker.Revocation
	Log    *slog.Logger // one event for each token, never the token; nil: none
}

// Receiver takes tokens and has the engine act. It is the http.Handler of the push endpoint. Make one
// with [New]; it is safe for concurrent use.
type Receiver struct {
	cfg  Config
	by   map[string]Transmitter
	keys map[string]map[string]jose.JSONWebKey // issuer → kid
	in   map[string]bool                       // Domains

	mu   sync.Mutex // guards seen
	seen map[seenID]time.Time
}

// seenID names a token that came, by who was told to have acted and why, which is what the ledger keeps of
// it. seen says until when its coming again must be refused.
type seenID struct{ by, reason string }

// by is the name under which a transmitter acts here.
func by(issuer string) string { return "set:" + issuer }

// New validates cfg.
func New(cfg Config) (*Receiver, error) {
	if len(cfg.Transmitters) == 0 || cfg.Revoke == nil || cfg.Now == nil || len(cfg.Domains) == 0 {
		return nil, errors.New("signals: Config.Transmitters, Revoke, Domains and Now are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Remember = cmp.Or(cfg.Remember, 16<<10)
	r := &Receiver{cfg: cfg, by: map[string]Transmitter{}, keys: map[string]map[string]jose.JSONWebKey{}, in: map[string]bool{},
		seen: map[seenID]time.Time{}}
	for _, d := range cfg.Domains {
		r.in[d] = true
	}
	for i, t := range cfg.Transmitters {
		if _, twice := r.by[t.Issuer]; twice || t.Issuer == "" || t.Audience == "" || len(t.Keys) == 0 {
			return nil, fmt.Errorf("signals: transmitter %d needs an issuer of its own, an audience and keys", i+1)
		}
		r.by[t.Issuer], r.keys[t.Issuer] = t, map[string]jose.JSONWebKey{}
		for _, k := range t.Keys {
			if alg, err := algorithm(k); err != nil || string(alg) != k.Algorithm {
				return nil, fmt.Errorf("signals: a key of transmitter %d is not of ParseKeys", i+1)
			}
			r.keys[t.Issuer][k.KeyID] = k
		}
	}
	for _, rv := range cfg.Before {
		if until := rv.Fenced.Add(MaxAge + MaxSkew); strings.HasPrefix(rv.By, by("")) && cfg.Now().Before(until) {
			r.seen[seenID{rv.By, rv.Reason}] = until
		}
	}
	return r, nil
}

// Refusal is why a token was not taken, in the words of RFC 8935 section 2.4.
type Refusal struct {
	Code        string `json:"err"` // invalid_request, invalid_key, invalid_issuer, invalid_audience
	Description string `json:"description"`
}

func (r *Refusal) Error() string { return r.Code + ": " + r.Description }

func refuse(code string, err error) *Refusal { return &Refusal{code, err.Error()} }

// Signal is a token that was believed.
type Signal struct {
	Issuer     string
	ID         string              // its jti
	Event      string              // "session-revoked", "credential-change revoke", …
	Selector   string              // what it means here; empty when nothing follows
	Revocation broker.RevocationID // what followed; empty when nothing does
}

// Receive takes one token, and returns once what it is about is fenced. A refusal is a *[Refusal];
// any other error is the engine's, and the same token may then come again.
func (r *Receiver) Receive(ctx context.Context, token []byte) (Signal, error) {
	now := r.cfg.Now()
	o, err := open(token)
	if err != nil {
		return Signal{}, refuse("invalid_request", err)
	}
	t, err := r.authentic(o)
	if err != nil {
		return Signal{}, err
	}
	s := Signal{Issuer: t.Issuer, ID: o.claims.ID}
	if err := o.claims.fresh(now); err != nil {
		return s, refuse("invalid_request", err)
	}
	event, follows, err := o.claims.happened()
	if err != nil {
		return s, refuse("invalid_request", err)
	}
	s.Event = event
	sel, err := r.about(t, o.claims.Subject)
	if err != nil {
		return s, refuse("invalid_request", err)
	}
	this := seenID{by(t.Issuer), reason(event, o.claims.ID)}
	if err := r.once(this, time.Unix(*o.claims.Issued, 0).Add(MaxAge), now); err != nil {
		return s, err
	}
	if !follows {
		return s, nil
	}
	s.Selector = sel.String()
	rv, err := r.cfg.Revoke(ctx, broker.Operator{Name: this.by}, selector.Request{Selector: sel,
		Reason: this.reason, Freeze: t.Freeze})
	if broker.KindOf(err) == broker.NotFound {
		return s, nil // whoever it is about has nothing here: sending it again would change nothing
	}
	if err != nil {
		r.forget(this)
		return s, err
	}
	s.Revocation = rv.ID
	return s, nil
}

// authentic says who signed the token for us.
func (r *Receiver) authentic(o opened) (Transmitter, error) {
	c := o.claims
	t, known := r.by[c.Issuer]
	if !known {
		return t, &Refusal{"invalid_issuer", "the issuer is no transmitter that is known here"}
	}
	key, known := r.keys[c.Issuer][o.header.Kid]
	if !known {
		return t, &Refusal{"invalid_key", "the key is none of the issuer's"}
	}
	if !o.signedBy(key) {
		return t, &Refusal{"invalid_key", "the signature is not the key's, or not of its algorithm"}
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

// reason is for the audit, which takes broker.MaxTask bytes, and names the token: by its jti, or by that's
// digest where it is too long.
func reason(event, id string) string {
	s := "security event: " + event + ", jti "
	if len(s)+len(id) > broker.MaxTask {
		return fmt.Sprintf("%sof SHA-256 %x", s, sha256.Sum256([]byte(id)))
	}
	return s + id
}

// about gives what the subject means here.
func (r *Receiver) about(t Transmitter, s subject) (selector.Selector, error) {
	if session := s.session(); session != "" && t.ChainLabel != "" {
		if !plain(session) {
			return selector.Selector{}, errors.New("the session's name is no label's value")
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
	if err != nil || id.Path() == "" || !r.in[id.TrustDomain().Name()] {
		return selector.Selector{}, errors.New("the subject is nobody that is known here")
	}
	return selector.Parse("spiffe:" + id.String())
}

// plain reports whether a name can stand in a selector as it is.
func plain(name string) bool {
	for _, b := range []byte(name) {
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '-' || b == '_') {
			return false
		}
	}
	return len(name) <= 64
}

// once refuses a token that came before. Tokens whose age alone would refuse them are forgotten.
func (r *Receiver) once(id seenID, until, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, again := r.seen[id]; again {
		return &Refusal{"invalid_request", "the token came before"}
	}
	if len(r.seen) >= r.cfg.Remember {
		for old, end := range r.seen {
			if now.After(end) {
				delete(r.seen, old)
			}
		}
	}
	if len(r.seen) >= r.cfg.Remember {
		return broker.Errorf(broker.Unavailable, "signal", "too many tokens came within %s", MaxAge).After(time.Minute)
	}
	r.seen[id] = until
	return nil
}

// forget lets a token come again that nothing followed from.
func (r *Receiver) forget(id seenID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.seen, id)
}

// ServeHTTP is the push endpoint of RFC 8935: 202 when the token was taken, 400 with err and
// description when it was refused, and 503 when it should come again.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if types := req.Header.Values("Content-Type"); len(types) != 1 || types[0] != "application/"+tokenType {
		r.answer(w, req, Signal{}, &Refusal{"invalid_request", "the Content-Type must be application/" + tokenType})
		return
	}
	token, err := io.ReadAll(io.LimitReader(req.Body, MaxToken+1))
	if err != nil {
		r.answer(w, req, Signal{}, &Refusal{"invalid_request", "the token did not arrive"})
		return
	}
	s, err := r.Receive(req.Context(), token)
	r.answer(w, req, s, err)
}

func (r *Receiver) answer(w http.ResponseWriter, req *http.Request, s Signal, err error) {
	attrs := []slog.Attr{slog.String("issuer", s.Issuer), slog.String("jti", s.ID), slog.String("event", s.Event),
		slog.String("selector", s.Selector), slog.String("revocation", string(s.Revocation))}
	var refused *Refusal
	switch {
	case err == nil:
		r.cfg.Log.LogAttrs(req.Context(), slog.LevelInfo, "security event taken", attrs...)
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
		_, _ = w.Write(body) // the transmitter is gone; the log has the rest
	default:
		r.cfg.Log.LogAttrs(req.Context(), slog.LevelError, "security event not acted on", append(attrs, slog.String("error", err.Error()))...)
		w.Header().Set("Retry-After", "5")
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}
