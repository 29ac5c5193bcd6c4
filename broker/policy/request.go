package policy

import (
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/pawlsec/pawl/broker"
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

// newTool makes a tool's entity, in one group for each dotted prefix of its name.
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

// world knows a request's entities: its tool, and every agent, whose groups are in its name.
// It is used by one evaluation.
type world struct {
	tool   *tool
	agents map[cedar.String]cedar.Entity // made when asked for
}

func (w *world) Get(id cedar.EntityUID) (cedar.Entity, bool) {
	switch {
	case id == w.tool.uid:
		return w.tool.entity, true
	case id.Type != typeAgent:
		return cedar.Entity{}, false
	}
	if e, known := w.agents[id.ID]; known {
		return e, true
	}
	spiffe, err := spiffeid.FromString(string(id.ID))
	if err != nil {
		return cedar.Entity{}, false
	}
	e := cedar.Entity{
		UID:        id,
		Parents:    cedar.NewEntityUIDSet(groups(spiffe)...),
		Attributes: cedar.NewRecord(cedar.RecordMap{"id": id.ID}),
	}
	if w.agents == nil {
		w.agents = map[cedar.String]cedar.Entity{}
	}
	w.agents[id.ID] = e
	return e, true
}

// groups are the trust domain of an agent and every directory above it: spiffe://td/a/b is in
// TrustDomain td and in AgentGroup spiffe://td/a, but not in the group of its own name.
func groups(id spiffeid.ID) []cedar.EntityUID {
	all := []cedar.EntityUID{uid(typeTrustDomain, id.TrustDomain().Name())}
	text, start := id.String(), len("spiffe://")+len(id.TrustDomain().Name())+1
	for i := start; i < len(text); i++ {
		if text[i] == '/' {
			all = append(all, uid(typeAgentGroup, text[:i]))
		}
	}
	return all
}

// contextOf makes the part of the context that is read. Cedar hashes every record it is given,
// so that building all of it would cost more than deciding.
func contextOf(q *broker.Question, r reads) cedar.Record {
	c := make(cedar.RecordMap, len(r))
	add := func(member string, value func(names) cedar.Value) {
		if n, read := r[member]; read {
			c[cedar.String(member)] = value(n)
		}
	}
	add("args", func(n names) cedar.Value { return argsOf(q.Args, n) })
	add("chain", func(n names) cedar.Value { return chainOf(q, n) })
	add("history", func(n names) cedar.Value { return historyOf(q.History, n, q.Now) })
	add("used", func(names) cedar.Value { return usedOf(q.History) })
	add("proof", func(names) cedar.Value { return cedar.String(q.Caller.Proof) })
	add("now", func(names) cedar.Value { return nowOf(q.Now.UTC()) })
	switch q.Action {
	case broker.ActionDelegate:
		add("receiver", func(names) cedar.Value { return uid(typeAgent, q.Receiver.String()) })
	case broker.ActionReport:
		add("violation", func(names) cedar.Value { return cedar.String(q.Violation) })
	}
	return cedar.NewRecord(c)
}

func chainOf(q *broker.Question, n names) cedar.Value {
	m := cedar.RecordMap{}
	if n.has("task") {
		m["task"] = cedar.String(q.Chain.Task)
	}
	if n.has("opener") && !q.Chain.Opener.IsZero() {
		m["opener"] = uid(typeAgent, q.Chain.Opener.String())
	}
	if n.has("labels") {
		labels := make(cedar.RecordMap, len(q.Chain.Labels))
		for name, value := range q.Chain.Labels {
			labels[cedar.String(name)] = cedar.String(value)
		}
		m["labels"] = cedar.NewRecord(labels)
	}
	if n.has("depth") {
		m["depth"] = cedar.Long(q.Depth)
	}
	if n.has("age_seconds") {
		m["age_seconds"] = seconds(q.Chain.Opened, q.Now)
	}
	return cedar.NewRecord(m)
}

func nowOf(now time.Time) cedar.Value {
	return cedar.NewRecord(cedar.RecordMap{
		"hour":    cedar.Long(now.Hour()),
		"weekday": cedar.Long((int(now.Weekday())+6)%7 + 1),
		"time":    cedar.NewDatetime(now),
	})
}

func argsOf(args broker.Args, n names) cedar.Value {
	m := cedar.RecordMap{}
	for _, name := range args.Names() {
		if n.has(name) {
			v, _ := args.Get(name)
			m[cedar.String(name)] = valueOf(v)
		}
	}
	return cedar.NewRecord(m)
}

func valueOf(v broker.Value) cedar.Value {
	if n, ok := v.Int64(); ok {
		return cedar.Long(n)
	}
	if b, ok := v.Truth(); ok {
		return cedar.Boolean(b)
	}
	if list, ok := v.Strings(); ok {
		set := make([]cedar.Value, len(list))
		for i, s := range list {
			set[i] = cedar.String(s)
		}
		return cedar.NewSet(set...)
	}
	s, _ := v.Text()
	return cedar.String(s)
}

func historyOf(history map[broker.ToolName]broker.Past, n names, now time.Time) cedar.Value {
	m := cedar.RecordMap{}
	for name, past := range history {
		if past.Count > 0 && n.has(string(name)) {
			m[cedar.String(name)] = cedar.NewRecord(cedar.RecordMap{
				"count":               cedar.Long(past.Count),
				"since_first_seconds": seconds(past.First, now),
				"since_last_seconds":  seconds(past.Last, now),
			})
		}
	}
	return cedar.NewRecord(m)
}

func usedOf(history map[broker.ToolName]broker.Past) cedar.Value {
	var names []cedar.Value
	for name, past := range history {
		if past.Count > 0 {
			names = append(names, cedar.String(name))
		}
	}
	return cedar.NewSet(names...)
}

// seconds between two instants, never negative: a clock that went back makes nothing older.
func seconds(from, to time.Time) cedar.Long {
	if from.IsZero() || to.Before(from) {
		return 0
	}
	return cedar.Long(to.Sub(from) / time.Second)
}

// prefixed reports whether an id can be a group's: a SPIFFE ID with a path.
func prefixed(id string) bool {
	s, err := spiffeid.FromString(id)
	return err == nil && s.Path() != "" && !strings.HasSuffix(id, "/")
}
