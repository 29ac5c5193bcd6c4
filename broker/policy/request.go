package policy

import (
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	scope "github.com/cedar-policy/cedar-go/x/exp/ast"
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

// reads says which costly parts of the context a policy looks at.
type reads struct{ args, history, used, now bool }

func (r *reads) add(o reads) {
	r.args, r.history, r.used, r.now = r.args || o.args, r.history || o.history, r.used || o.used, r.now || o.now
}

// readsOf finds them. A context that is not followed by a member's name is read whole.
func readsOf(p *scope.Policy) (r reads) {
	direct, bare := 0, 0
	visit := func(n scope.IsNode) bool {
		switch n := n.(type) {
		case scope.NodeTypeVariable:
			if n.Name == "context" {
				bare++
			}
		case scope.NodeTypeAccess:
			direct += r.member(n.StrOpNode)
		case scope.NodeTypeHas:
			direct += r.member(n.StrOpNode)
		}
		return true
	}
	for _, c := range p.Conditions {
		scope.Inspect(scope.NewNode(c.Body), visit)
	}
	if bare > direct {
		r = reads{true, true, true, true}
	}
	return r
}

// member counts 1 when the operator's left side is the context itself.
func (r *reads) member(n scope.StrOpNode) int {
	if v, ok := n.Arg.(scope.NodeTypeVariable); !ok || v.Name != "context" {
		return 0
	}
	switch n.Value {
	case "args":
		r.args = true
	case "history":
		r.history = true
	case "used":
		r.used = true
	case "now":
		r.now = true
	}
	return 1
}

// contextOf makes the context, without the costly parts that nobody reads.
func contextOf(q *broker.Question, r reads) cedar.Record {
	labels := make(cedar.RecordMap, len(q.Chain.Labels))
	for name, value := range q.Chain.Labels {
		labels[cedar.String(name)] = cedar.String(value)
	}
	chain := cedar.RecordMap{
		"task":        cedar.String(q.Chain.Task),
		"labels":      cedar.NewRecord(labels),
		"depth":       cedar.Long(q.Depth),
		"age_seconds": seconds(q.Chain.Opened, q.Now),
	}
	if !q.Chain.Opener.IsZero() {
		chain["opener"] = uid(typeAgent, q.Chain.Opener.String())
	}
	c := cedar.RecordMap{"chain": cedar.NewRecord(chain), "proof": cedar.String(q.Caller.Proof)}
	if r.args {
		c["args"] = argsOf(q.Args)
	}
	if r.history {
		c["history"] = historyOf(q.History, q.Now)
	}
	if r.used {
		c["used"] = usedOf(q.History)
	}
	if r.now {
		now := q.Now.UTC()
		c["now"] = cedar.NewRecord(cedar.RecordMap{
			"hour":    cedar.Long(now.Hour()),
			"weekday": cedar.Long((int(now.Weekday())+6)%7 + 1),
			"time":    cedar.NewDatetime(now),
		})
	}
	if q.Action == broker.ActionDelegate {
		c["receiver"] = uid(typeAgent, q.Receiver.String())
	}
	if q.Action == broker.ActionReport {
		c["violation"] = cedar.String(q.Violation)
	}
	return cedar.NewRecord(c)
}

func argsOf(args broker.Args) cedar.Record {
	m := make(cedar.RecordMap, len(args.Names()))
	for _, name := range args.Names() {
		v, _ := args.Get(name)
		m[cedar.String(name)] = valueOf(v)
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

func historyOf(history map[broker.ToolName]broker.Past, now time.Time) cedar.Record {
	m := make(cedar.RecordMap, len(history))
	for name, past := range history {
		if past.Count > 0 {
			m[cedar.String(name)] = cedar.NewRecord(cedar.RecordMap{
				"count":               cedar.Long(past.Count),
				"since_first_seconds": seconds(past.First, now),
				"since_last_seconds":  seconds(past.Last, now),
			})
		}
	}
	return cedar.NewRecord(m)
}

func usedOf(history map[broker.ToolName]broker.Past) cedar.Set {
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
