package policy

import (
	"cmp"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The entity types of a request.
const (
	typeAgent       = cedar.EntityType("Agent")
	typeAgentGroup  = cedar.EntityType("AgentGroup")
	typeTrustDomain = cedar.EntityType("TrustDomain")
	typeAction      = cedar.EntityType("Action")
	typeTool        = cedar.EntityType("Tool")
	typeToolGroup   = cedar.EntityType("ToolGroup")
)

func uid(t cedar.EntityType, id string) cedar.EntityUID {
	return cedar.NewEntityUID(t, cedar.String(id))
}

// newTool creates a tool's entity, in one group for each dotted prefix of its name.
func newTool(t broker.Tool) *tool {
	name := string(t.Name)
	var groups []cedar.EntityUID
	for i, c := range name {
		if c == '.' {
			groups = append(groups, uid(typeToolGroup, name[:i]))
		}
	}
	id := uid(typeTool, name)
	return &tool{Tool: t, uid: id, entity: cedar.Entity{
		UID:     id,
		Parents: cedar.NewEntityUIDSet(groups...),
		Attributes: cedar.NewRecord(cedar.RecordMap{
			"name":      cedar.String(name),
			"backend":   cedar.String(t.Backend),
			"narrowing": cedar.String(t.Narrowing.String()),
		}),
	}}
}

// world resolves the entities of a request: its tool, and any agent, because an agent's name determines its groups.
// It serves one evaluation.
type world struct {
	tool   *tool
	agents []cedar.Entity // created on demand: few, and mostly none
}

func (w *world) Get(id cedar.EntityUID) (cedar.Entity, bool) {
	switch {
	case id == w.tool.uid:
		return w.tool.entity, true
	case id.Type != typeAgent:
		return cedar.Entity{}, false
	}
	for _, e := range w.agents {
		if e.UID == id {
			return e, true
		}
	}
	spiffe, err := spiffeid.FromString(string(id.ID))
	if err != nil {
		return cedar.Entity{}, false
	}
	e := cedar.Entity{
		UID:        id,
		Parents:    cedar.NewEntityUIDSet(appendGroups(nil, spiffe)...),
		Attributes: cedar.NewRecord(cedar.RecordMap{"id": id.ID}),
	}
	w.agents = append(w.agents, e)
	return e, true
}

// appendGroups appends the groups of an agent: its trust domain and every directory above it. spiffe://td/a/b is in
// TrustDomain td and in AgentGroup spiffe://td/a, but not in the group of its own name.
func appendGroups(all []cedar.EntityUID, id spiffeid.ID) []cedar.EntityUID {
	all = append(all, uid(typeTrustDomain, id.TrustDomain().Name()))
	text, start := id.String(), len("spiffe://")+len(id.TrustDomain().Name())+1
	for i := start; i < len(text); i++ {
		if text[i] == '/' {
			all = append(all, uid(typeAgentGroup, text[:i]))
		}
	}
	return all
}

// contextOf builds the context members that are read, with the caller's history in the window. Cedar hashes every record it receives, so building all of them
// would cost more than the decision.
func contextOf(q *broker.Question, r reads, window time.Duration) cedar.Record {
	b := builders.Get().(*builder)
	c := b.open()
	for member, n := range r {
		if v := b.member(q, member, n); v != nil {
			c[cedar.String(member)] = v
		}
	}
	if n, read := r["caller"]; read && window > 0 {
		c["caller"] = b.caller(q, n, window)
	}
	made := b.close(c)
	builders.Put(b) // skipped by a panic, which may leave data in the builder
	return made
}

// builder builds records. Cedar copies the map that it builds a record from, so the maps are reused.
type builder struct {
	free  []cedar.RecordMap
	items []cedar.Value
}

var builders = sync.Pool{New: func() any { return new(builder) }}

// open returns an empty map, which close takes back.
func (b *builder) open() cedar.RecordMap {
	if len(b.free) == 0 {
		return cedar.RecordMap{}
	}
	m := b.free[len(b.free)-1]
	b.free = b.free[:len(b.free)-1]
	return m
}

// close builds the record. It drops a large map: a map that grew stays large, and so do its copies.
func (b *builder) close(m cedar.RecordMap) cedar.Record {
	r := cedar.NewRecord(m)
	if len(m) <= 8 {
		clear(m)
		b.free = append(b.free, m)
	}
	return r
}

// set builds a set from the collected items.
func (b *builder) set() cedar.Set {
	s := cedar.NewSet(b.items...)
	clear(b.items)
	b.items = b.items[:0]
	return s
}

// member builds one member of the context. It returns nil for a member that a question of this kind does not have.
func (b *builder) member(q *broker.Question, member string, n names) cedar.Value {
	switch {
	case member == "args":
		return b.args(q.Args, n)
	case member == "chain":
		return b.chain(q, n)
	case member == "claimed":
		return b.claimed(q.Chain, n)
	case q.Chain.Envelope != nil && slices.Contains(signed, member):
		return b.signed(q.Chain.Envelope, member, n)
	case member == "history":
		return b.history(q.History, n, q.Now)
	case member == "used":
		return b.used(q.History, n)
	case member == "proof":
		return cedar.String(q.Caller.Proof)
	case member == "now":
		return nowOf(q.Now.UTC())
	case member == "open" && q.Action == broker.ActionOpen && q.Open != nil:
		return b.asked(q.Open, n)
	case member == "receiver" && q.Action == broker.ActionDelegate:
		return uid(typeAgent, q.Receiver.String())
	case member == "violation" && q.Action == broker.ActionReport:
		return cedar.String(q.Violation)
	}
	return nil
}

func (b *builder) chain(q *broker.Question, n names) cedar.Value {
	m := b.open()
	if n.has("opener") && !q.Chain.Opener.IsZero() {
		m["opener"] = uid(typeAgent, q.Chain.Opener.String())
	}
	if n.has("depth") {
		m["depth"] = cedar.Long(q.Depth)
	}
	if n.has("age_seconds") {
		m["age_seconds"] = seconds(q.Chain.Opened, q.Now)
	}
	return b.close(m)
}

// claimed builds the member with the words of the chain's opener.
func (b *builder) claimed(c broker.Chain, n names) cedar.Value {
	m := b.open()
	if n.has("task") {
		m["task"] = cedar.String(c.Task)
	}
	if n.has("labels") {
		m["labels"] = b.labels(c.Labels, nil)
	}
	return b.close(m)
}

// signed are the members that come from an envelope alone.
var signed = []string{"task", "labels", "on_behalf_of", "issuer"}

// signed builds one of them. A text that the envelope does not state is absent. Labels are there, perhaps none.
func (b *builder) signed(e *broker.Envelope, member string, n names) cedar.Value {
	if member == "labels" {
		return b.labels(e.Labels, n)
	}
	if text := map[string]string{"task": e.Task, "on_behalf_of": e.Behalf, "issuer": e.Issuer}[member]; text != "" {
		return cedar.String(text)
	}
	return nil
}

func (b *builder) labels(labels map[string]string, n names) cedar.Value {
	m := b.open()
	for name, value := range labels {
		if n.has(name) {
			m[cedar.String(name)] = cedar.String(value)
		}
	}
	return b.close(m)
}

// asked builds the member with the limits of a request to open. A limit that it does not ask for is absent.
func (b *builder) asked(r *broker.OpenRequest, n names) cedar.Value {
	m := b.open()
	add := func(name string, number int64, present bool) {
		if present && n.has(name) {
			m[cedar.String(name)] = cedar.Long(number)
		}
	}
	add("steps", int64(r.Budget.Steps), r.Budget.Steps > 0)
	add("live", int64(r.Budget.Live), r.Budget.Live > 0)
	add("per_minute", int64(r.Budget.PerMinute), r.Budget.PerMinute > 0)
	add("depth", int64(r.Depth), true)
	add("ttl_seconds", int64(cmp.Or(r.TTL, broker.DefaultChainTTL)/time.Second), true)
	add("heartbeat_seconds", int64(r.Heartbeat/time.Second), r.Heartbeat > 0)
	return b.close(m)
}

func nowOf(now time.Time) cedar.Value {
	return cedar.NewRecord(cedar.RecordMap{
		"hour":    cedar.Long(now.Hour()),
		"weekday": cedar.Long((int(now.Weekday())+6)%7 + 1),
		"time":    cedar.NewDatetime(now),
	})
}

func (b *builder) args(args args.Args, n names) cedar.Value {
	m := b.open()
	for _, name := range args.Names() {
		if n.has(name) {
			v, _ := args.Get(name)
			m[cedar.String(name)] = b.value(v)
		}
	}
	return b.close(m)
}

func (b *builder) value(v args.Value) cedar.Value {
	if n, ok := v.Int64(); ok {
		return cedar.Long(n)
	}
	if t, ok := v.Truth(); ok {
		return cedar.Boolean(t)
	}
	if list, ok := v.Strings(); ok {
		for _, s := range list {
			b.items = append(b.items, cedar.String(s))
		}
		return b.set()
	}
	s, _ := v.Text()
	return cedar.String(s)
}

func (b *builder) history(history map[broker.ToolName]broker.Past, n names, now time.Time) cedar.Value {
	m := b.open()
	for name, past := range pastUses(history, n) {
		one := b.open()
		one["count"] = cedar.Long(past.Count)
		one["since_first_seconds"] = seconds(past.First, now)
		one["since_last_seconds"] = seconds(past.Last, now)
		m[cedar.String(name)] = b.close(one)
	}
	return b.close(m)
}

// caller builds the member with the steps of the caller in all chains, in one window.
func (b *builder) caller(q *broker.Question, n names, window time.Duration) cedar.Value {
	past := q.CallerHistory[window]
	m := b.open()
	if n.has("history") {
		m["history"] = b.history(past, nil, q.Now)
	}
	if n.has("used") {
		m["used"] = b.used(past, nil)
	}
	return b.close(m)
}

func (b *builder) used(history map[broker.ToolName]broker.Past, n names) cedar.Value {
	for name := range pastUses(history, n) {
		b.items = append(b.items, cedar.String(name))
	}
	return b.set()
}

// pastUses yields the tools with at least one use, limited to the names that are read.
func pastUses(history map[broker.ToolName]broker.Past, n names) iter.Seq2[broker.ToolName, broker.Past] {
	return func(yield func(broker.ToolName, broker.Past) bool) {
		for name, past := range history {
			if past.Count > 0 && n.has(string(name)) && !yield(name, past) {
				return
			}
		}
	}
}

// seconds returns the whole seconds between two instants. It is never negative, even after the clock was set back.
func seconds(from, to time.Time) cedar.Long {
	if from.IsZero() || to.Before(from) {
		return 0
	}
	return cedar.Long(to.Sub(from) / time.Second)
}

// isGroup reports whether an id can be a group's: a SPIFFE ID with a path.
func isGroup(id string) bool {
	s, err := spiffeid.FromString(id)
	return err == nil && s.Path() != "" && !strings.HasSuffix(id, "/")
}
