package signals

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// eventTypes is the prefix of the types of our own events; one of [Kinds] follows it.
const eventTypes = "https://pawl.dev/secevent/event-type/"

// The kinds of events that subscribers receive.
const (
	KindSessionRevoked = "session-revoked" // CAEP's: a fence, for receivers that do not know Pawl
	KindFenced         = "chain-fenced"    // the same fence, as an event of our own
	KindClosure        = "closure"         // a revocation's closure changed
	KindFreeze         = "freeze"
	KindUnfreeze       = "unfreeze"
	KindCanary         = "canary" // a canary tool or value was touched
)

// Kinds lists every kind.
func Kinds() []string {
	return []string{KindSessionRevoked, KindFenced, KindClosure, KindFreeze, KindUnfreeze, KindCanary}
}

// kindsOf returns the kinds of events for an entry of the audit log, in the order of delivery.
func kindsOf(e broker.Event) []string {
	switch e.Entry.Op {
	case broker.OpFence:
		return []string{KindSessionRevoked, KindFenced}
	case broker.OpClosure:
		return []string{KindClosure}
	case broker.OpFreeze:
		return []string{KindFreeze}
	case broker.OpViolation:
		return []string{KindCanary}
	}
	return []string{KindUnfreeze}
}

// outgoing has the claims of a token that we send.
type outgoing struct {
	Issuer   string             `json:"iss"`
	Audience string             `json:"aud"`
	ID       string             `json:"jti"`
	Issued   int64              `json:"iat"`
	Happened int64              `json:"toe"`
	Subject  subjectID          `json:"sub_id"`
	Events   map[string]details `json:"events"`
}

// subjectID is a subject identifier of RFC 9493, or the complex one of the Shared Signals Framework.
type subjectID struct {
	Format  string     `json:"format"`
	ID      string     `json:"id,omitempty"`
	URI     string     `json:"uri,omitempty"`
	Session *subjectID `json:"session,omitempty"`
	User    *subjectID `json:"user,omitempty"`
}

// details is the content of an event. CAEP's has the time and the reason alone.
type details struct {
	At         int64             `json:"event_timestamp"`
	Reason     map[string]string `json:"reason_admin,omitempty"`
	Revocation string            `json:"revocation,omitempty"`
	Revision   uint64            `json:"revision,omitempty"`
	Selector   string            `json:"selector,omitempty"`
	Chain      string            `json:"chain,omitempty"`
	By         string            `json:"by,omitempty"`
	Tool       string            `json:"tool,omitempty"`
	Closure    string            `json:"closure,omitempty"`
	Counts     *counts           `json:"counts,omitempty"`
}

type counts struct {
	Grants  int `json:"grants"`
	Dead    int `json:"dead"`
	Alive   int `json:"alive"`
	Unknown int `json:"unknown"`
}

// canarySubject returns the subject of a touched canary: the chain in which it was touched, or planted. Without a chain it is
// the caller that asked for the tool, or the note of a value that belongs to no chain.
func canarySubject(e broker.Event) subjectID {
	switch {
	case e.Entry.Chain != "":
		return subjectID{Format: "complex", Session: &subjectID{Format: "opaque", ID: string(e.Entry.Chain)},
			User: &subjectID{Format: "uri", URI: e.Opener.String()}}
	case e.Entry.Tool != "":
		return subjectID{Format: "uri", URI: e.Entry.Actor}
	}
	return subjectID{Format: "opaque", ID: e.Entry.Detail}
}

// subjectOf returns the subject of a revocation. A chain, a subtree or a grant is a session of the chain's opener. A
// rule about one SPIFFE ID has that ID as its subject, and any other rule its selector.
func subjectOf(e broker.Event) subjectID {
	if e.Entry.Op == broker.OpViolation {
		return canarySubject(e)
	}
	rv := e.Revocation
	session := ""
	switch {
	case rv.Grant != "":
		session = string(rv.Grant)
	case strings.HasPrefix(rv.Selector, "chain:"):
		session = string(rv.Chain)
	case rv.Node != "":
		session = string(rv.Node)
	}
	if session != "" {
		return subjectID{Format: "complex", Session: &subjectID{Format: "opaque", ID: session}, User: &subjectID{Format: "uri", URI: e.Opener.String()}}
	}
	if s, err := selector.ParseRecorded(rv.Selector); err == nil {
		if id, ok := s.Holder(); ok {
			return subjectID{Format: "uri", URI: id.String()}
		}
	}
	return subjectID{Format: "opaque", ID: rv.Selector}
}

// tokenOf encodes the claims of one event, of a kind that kindsOf returned. The jti is the same every time, so that a
// receiver recognises a repeated token.
func (s *Sender) tokenOf(to Subscriber, e broker.Event, kind string) ([]byte, error) {
	rv, at := e.Revocation, e.Entry.At.Unix()
	uri, f := eventTypes+kind, details{At: at, Revocation: string(rv.ID), Revision: uint64(e.Entry.Revision), Selector: rv.Selector, Chain: string(rv.Chain), By: e.Entry.Actor}
	switch kind {
	case KindSessionRevoked:
		uri, f = sessionRevoked, details{At: at}
		fallthrough
	case KindFenced, KindFreeze:
		f.Reason = map[string]string{"en": rv.Reason}
	case KindCanary:
		f.Chain, f.Tool = string(e.Entry.Chain), string(e.Entry.Tool)
	case KindClosure:
		f.Closure, f.Counts = string(e.Tally.Closure), &counts{e.Tally.Grants, e.Tally.Dead, e.Tally.Alive, e.Tally.Unknown}
	}
	return json.Marshal(outgoing{Issuer: s.cfg.Issuer, Audience: to.Audience, ID: fmt.Sprintf("%s.%d.%s", cmp.Or(string(rv.ID), "no-revocation"), e.Entry.Revision, kind),
		Issued: s.cfg.Now().Unix(), Happened: at, Subject: subjectOf(e), Events: map[string]details{uri: f}})
}

// wants reports whether the subscriber receives events of the kind.
func (s Subscriber) wants(kind string) bool {
	return len(s.Kinds) == 0 || slices.Contains(s.Kinds, kind)
}

// since returns the time from t to now, or zero for a zero t.
func since(now, t time.Time) time.Duration {
	if t.IsZero() {
		return 0
	}
	return max(now.Sub(t), 0)
}
