package signals

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/selector"
)

// ours is where the types of our own events begin; [Kinds] names what follows.
const ours = "https://pawl.dev/secevent/event-type/"

// The kinds of events that subscribers are told of.
const (
	KindSessionRevoked = "session-revoked" // CAEP's: a fence, for whoever knows nothing of Pawl
	KindFenced         = "chain-fenced"    // the same fence, in our words
	KindClosure        = "closure"         // a revocation's closure changed
	KindFreeze         = "freeze"
	KindUnfreeze       = "unfreeze"
)

// Kinds lists them.
func Kinds() []string {
	return []string{KindSessionRevoked, KindFenced, KindClosure, KindFreeze, KindUnfreeze}
}

// kindsOf gives the events that an entry of the audit log makes, in the order of telling.
func kindsOf(e broker.Event) []string {
	switch e.Entry.Op {
	case broker.OpFence:
		return []string{KindSessionRevoked, KindFenced}
	case broker.OpClosure:
		return []string{KindClosure}
	case broker.OpFreeze:
		return []string{KindFreeze}
	}
	return []string{KindUnfreeze}
}

// told is a token as we send it.
type told struct {
	Issuer   string          `json:"iss"`
	Audience string          `json:"aud"`
	ID       string          `json:"jti"`
	Issued   int64           `json:"iat"`
	Happened int64           `json:"toe"`
	Subject  about           `json:"sub_id"`
	Events   map[string]fact `json:"events"`
}

// about is a subject identifier of RFC 9493, or the complex one of the Shared Signals Framework.
type about struct {
	Format  string `json:"format"`
	ID      string `json:"id,omitempty"`
	URI     string `json:"uri,omitempty"`
	Session *about `json:"session,omitempty"`
	User    *about `json:"user,omitempty"`
}

// fact is what an event says. CAEP's has the time and the reason alone.
type fact struct {
	At         int64             `json:"event_timestamp"`
	Reason     map[string]string `json:"reason_admin,omitempty"`
	Revocation string            `json:"revocation,omitempty"`
	Revision   uint64            `json:"revision,omitempty"`
	Selector   string            `json:"selector,omitempty"`
	Chain      string            `json:"chain,omitempty"`
	By         string            `json:"by,omitempty"`
	Closure    string            `json:"closure,omitempty"`
	Counts     *counts           `json:"counts,omitempty"`
}

type counts struct {
	Grants  int `json:"grants"`
	Dead    int `json:"dead"`
	Alive   int `json:"alive"`
	Unknown int `json:"unknown"`
}

// subjectOf names what a revocation is about: a chain, a subtree or a grant as a session of the chain's
// opener, a rule about one SPIFFE ID as that, and any other rule as its selector.
func subjectOf(e broker.Event) about {
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
		return about{Format: "complex", Session: &about{Format: "opaque", ID: session}, User: &about{Format: "uri", URI: e.Opener.String()}}
	}
	if s, err := selector.Parse(rv.Selector); err == nil {
		if id, ok := s.Holder(); ok {
			return about{Format: "uri", URI: id.String()}
		}
	}
	return about{Format: "opaque", ID: rv.Selector}
}

// tokenOf makes the claims of one event, of a kind that kindsOf gave. Its jti is the same whenever it is
// made, so that a receiver can tell that a token came again.
func (s *Sender) tokenOf(to Subscriber, e broker.Event, kind string) ([]byte, error) {
	rv, at := e.Revocation, e.Entry.At.Unix()
	uri, f := ours+kind, fact{At: at, Revocation: string(rv.ID), Revision: uint64(e.Entry.Revision), Selector: rv.Selector, Chain: string(rv.Chain), By: e.Entry.Actor}
	switch kind {
	case KindSessionRevoked:
		uri, f = sessionRevoked, fact{At: at}
		fallthrough
	case KindFenced, KindFreeze:
		f.Reason = map[string]string{"en": rv.Reason}
	case KindClosure:
		f.Closure, f.Counts = string(e.Tally.Closure), &counts{e.Tally.Grants, e.Tally.Dead, e.Tally.Alive, e.Tally.Unknown}
	}
	return json.Marshal(told{Issuer: s.cfg.Issuer, Audience: to.Audience, ID: fmt.Sprintf("%s.%d.%s", rv.ID, e.Entry.Revision, kind),
		Issued: s.cfg.Now().Unix(), Happened: at, Subject: subjectOf(e), Events: map[string]fact{uri: f}})
}

// wants reports whether the subscriber asked for events of the kind.
func (s Subscriber) wants(kind string) bool {
	return len(s.Kinds) == 0 || slices.Contains(s.Kinds, kind)
}

// since is how long ago t is; zero for no time at all.
func since(now, t time.Time) time.Duration {
	if t.IsZero() {
		return 0
	}
	return max(now.Sub(t), 0)
}
