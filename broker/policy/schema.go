package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	scope "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/eval"
	schema "github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// vocabulary has the words of a policy, each with its type. It is the one table of them: the schema against which conditions are
// checked, the warnings and the members that a question builds follow it. A new word is a row here and a case in member.

// word is one member of the context.
type word struct {
	name    string
	of      any             // its type: see typeOf
	actions []broker.Action // of the questions that have it; nil: all
}

var vocabulary = []word{
	{"args", arguments{}, nil},
	{"chain", members{"opener": agent, "depth": number, "age_seconds": number}, nil},
	{"claimed", members{"task": text, "labels": labels{}}, nil},
	{"task", text, nil},
	{"labels", labels{}, nil},
	{"on_behalf_of", text, nil},
	{"issuer", text, nil},
	{"history", history{}, nil},
	{"used", schema.SetType{Element: text}, nil},
	{"proof", text, nil},
	{"now", members{"hour": number, "weekday": number, "time": schema.ExtensionType("datetime")}, nil},
	{"caller", members{"history": history{}, "used": schema.SetType{Element: text}}, []broker.Action{broker.ActionUse}},
	{"open", members{"steps": number, "live": number, "per_minute": number, "depth": number, "ttl_seconds": number,
		"heartbeat_seconds": number}, []broker.Action{broker.ActionOpen}},
	{"receiver", agent, []broker.Action{broker.ActionDelegate}},
	{"violation", text, []broker.Action{broker.ActionReport}},
}

// entities has the attributes of the entities of a question, and the types that they can be in.
var entities = map[cedar.EntityType]struct {
	shape members
	in    []cedar.EntityType
}{
	typeAgent:       {members{"id": text}, []cedar.EntityType{typeAgentGroup, typeTrustDomain}},
	typeAgentGroup:  {},
	typeTrustDomain: {},
	typeTool:        {members{"name": text, "backend": text, "narrowing": text}, []cedar.EntityType{typeToolGroup}},
	typeToolGroup:   {},
}

var (
	text   = schema.StringType{}
	number = schema.LongType{}
	agent  = schema.EntityType(typeAgent)
	past   = members{"count": number, "since_first_seconds": number, "since_last_seconds": number}
)

// kinds has the types of arguments by kind.
var kinds = map[string]schema.IsType{
	"string": text, "integer": number, "boolean": schema.BoolType{}, "list": schema.SetType{Element: text},
}

// The forms of records: with fixed members, with texts of any name, with the arguments of the tool (of a step alone), and
// with past uses of the bundle's tools.
type (
	members   map[string]any
	labels    struct{}
	arguments struct{}
	history   struct{}
)

// question is the subject of a check: an action on a tool.
type question struct {
	action broker.Action
	tool   *tool
	all    map[broker.ToolName]*tool
	named  map[string]names // the members that the condition names, by the path of their record
}

// typeOf returns the type of a word. A member that a question may lack has its type all the same: a condition that names
// it without "has" fails in some questions, and not in all.
func (q question) typeOf(of any, path string) schema.IsType {
	r := schema.RecordType{}
	put := func(name string, of any) {
		r[cedar.String(name)] = schema.Attribute{Type: q.typeOf(of, path+"."+name)}
	}
	switch of := of.(type) {
	case schema.IsType:
		return of
	case members:
		for name, member := range of {
			put(name, member)
		}
	case labels:
		for name := range q.named[path] {
			put(name, text)
		}
	case arguments:
		if q.action == broker.ActionUse {
			for name, p := range q.tool.Arguments {
				put(name, kinds[p.Kind])
			}
		}
	case history:
		for name := range q.named[path] {
			if q.all[broker.ToolName(name)] != nil {
				put(name, past)
			}
		}
	}
	return r
}

// schema returns the schema of the question.
func (q question) schema() *schema.Schema {
	context := schema.RecordType{}
	for _, w := range vocabulary {
		if w.actions == nil || slices.Contains(w.actions, q.action) {
			context[cedar.String(w.name)] = schema.Attribute{Type: q.typeOf(w.of, "context."+w.name)}
		}
	}
	s := &schema.Schema{Entities: map[cedar.EntityType]schema.Entity{}, Actions: map[cedar.EntityUID]schema.Action{}}
	for name, e := range entities {
		s.Entities[name] = schema.Entity{Name: name, ParentTypes: e.in, Shape: q.typeOf(e.shape, "").(schema.RecordType)}
	}
	for _, a := range actions() {
		action := schema.Action{Entity: cedar.Entity{UID: uid(typeAction, string(a))}}
		if a == q.action {
			action.AppliesTo = &schema.AppliesTo{Principals: []cedar.EntityType{typeAgent},
				Resources: []cedar.EntityType{typeTool}, Context: context}
		}
		s.Actions[action.Entity.UID] = action
	}
	return s
}

// checkTypes refuses a policy with a condition that fails in each question of one kind: an action on a tool of its scope.
// Such a condition denies all of these questions, whatever the other policies say. Checking also finds comparisons of
// types that are never equal.
func (p *Policy) checkTypes(r *rule, known validators) error {
	named := namedMembers(r.scope())
	conditions := (*scope.Policy)(r.when.AST())
	checked := map[string]bool{}
	for _, a := range r.actions() {
		if !slices.Contains(actions(), a) {
			continue // lint names it
		}
		for _, t := range p.toolsOf(r) {
			key := string(a) + typesOfArguments(t, named["context.args"])
			if checked[key] {
				continue
			}
			checked[key] = true
			q := question{action: a, tool: t, all: p.tools, named: named}
			if err := cmp.Or(q.check(conditions, known), q.try(conditions, r.reads)); err != nil {
				return fmt.Errorf("for Action::%q on Tool::%q the condition always fails or can never hold: %w", a, t.Name, err)
			}
		}
	}
	return nil
}

// openRecords has the paths of the records of which a schema has the members that a condition names.
var openRecords = func() (paths []string) {
	var visit func(of any, path string)
	visit = func(of any, path string) {
		switch of := of.(type) {
		case members:
			for name, member := range of {
				visit(member, path+"."+name)
			}
		case labels, history:
			paths = append(paths, path)
		}
	}
	for _, w := range vocabulary {
		visit(w.of, "context."+w.name)
	}
	slices.Sort(paths)
	return paths
}()

// validators has the validators of a bundle by what their schemas depend on.
type validators map[string]validator

type validator struct{ permissive, strict *validate.Validator }

func (all validators) of(q question) validator {
	key := fmt.Sprint(q.action, " ", q.tool.Name)
	for _, path := range openRecords {
		key += fmt.Sprintf(" %q", slices.Sorted(maps.Keys(q.named[path])))
	}
	v, ok := all[key]
	if !ok {
		s := q.schema()
		v = validator{validate.New(s, validate.WithPermissive()), validate.New(s)}
		all[key] = v
	}
	return v
}

// check checks conditions that apply to any principal, action and resource.
func (q question) check(conditions *scope.Policy, known validators) error {
	v := known.of(q)
	if err := v.permissive.Policy("", conditions); err != nil {
		return firstLine(err)
	}
	// The strict rules also forbid what is harmless here, such as an empty set and a set of different entities.
	// So is a comparison with a record, of which some members may be absent.
	err := v.strict.Policy("", conditions)
	if err == nil || !strings.HasPrefix(err.Error(), "the types ") || strings.Contains(err.Error(), "{") {
		return nil
	}
	for name := range entities {
		if strings.Contains(err.Error(), string(name)+" ") {
			return nil
		}
	}
	return firstLine(err)
}

// try evaluates the conditions for one question that has every argument and label. It finds what the validator of
// cedar-go 1.9 does not: it takes a comparison of a datetime with a number.
func (q question) try(conditions *scope.Policy, r reads) error {
	given := map[string]args.Value{}
	if q.action == broker.ActionUse {
		for name, p := range q.tool.Arguments {
			given[name] = map[string]args.Value{"string": args.String("a"), "integer": args.Int(1),
				"boolean": args.Bool(true), "list": args.List("a")}[p.Kind]
		}
	}
	all, err := args.New(given)
	if err != nil {
		return nil // too many to be given at once
	}
	sample := broker.Question{Action: q.action, Args: all, Now: time.Unix(0, 0), Receiver: sampleAgent,
		Caller:  broker.Caller{ID: sampleAgent, Proof: broker.ProofX509},
		Chain:   broker.Chain{Opener: sampleAgent, Opened: time.Unix(0, 0), Labels: map[string]string{}},
		History: map[broker.ToolName]broker.Past{}}
	if q.action == broker.ActionOpen {
		sample.Open = &broker.OpenRequest{Budget: broker.Budget{Steps: 1, Live: 1, PerMinute: 1}, Heartbeat: time.Second}
	}
	for name := range q.named["context.chain.labels"] {
		sample.Chain.Labels[name] = "a"
	}
	for name := range q.all {
		sample.History[name] = broker.Past{Count: 1}
	}
	env := eval.Env{Principal: uid(typeAgent, sampleAgent.String()), Action: uid(typeAction, string(q.action)),
		Resource: q.tool.uid, Context: contextOf(&sample, r, time.Hour), Entities: &world{tool: q.tool}}
	for _, c := range conditions.Conditions {
		if _, err := eval.Eval(c.Body, env); err != nil && strings.HasPrefix(err.Error(), "type error") {
			return firstLine(err)
		}
	}
	return nil
}

var sampleAgent = spiffeid.RequireFromString("spiffe://sample.example/a")

func firstLine(err error) error {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return errors.New(line)
}

// typesOfArguments tells apart the tools for which a condition that names these arguments has different types.
func typesOfArguments(t *tool, args names) (s string) {
	for _, name := range slices.Sorted(maps.Keys(args)) {
		s += " " + name + ":" + t.Arguments[name].Kind
	}
	return s
}

// toolsOf returns the tools in a rule's scope, in the order of their names.
func (p *Policy) toolsOf(r *rule) (list []*tool) {
	object := r.object()
	for _, name := range slices.Sorted(maps.Keys(p.tools)) {
		t := p.tools[name]
		if object.IsZero() || object == t.uid || t.entity.Parents.Contains(object) {
			list = append(list, t)
		}
	}
	return list
}

// namedMembers collects the members that a policy names, by the path of their record: context.chain.labels has env.
func namedMembers(p *scope.Policy) map[string]names {
	found := map[string]names{}
	visit := func(n scope.StrOpNode) {
		path, ok := pathOf(n.Arg, maxShape)
		if !ok {
			return
		}
		if found[path] == nil {
			found[path] = names{}
		}
		found[path][string(n.Value)] = true
	}
	for _, c := range p.Conditions {
		scope.Inspect(scope.NewNode(c.Body), func(n scope.IsNode) bool {
			switch n := n.(type) {
			case scope.NodeTypeAccess:
				visit(n.StrOpNode)
			case scope.NodeTypeHas:
				visit(n.StrOpNode)
			}
			return true
		})
	}
	return found
}

// pathOf returns the path of an expression like context.chain.labels.
func pathOf(n scope.IsNode, deep int) (path string, ok bool) {
	switch n := n.(type) {
	case scope.NodeTypeVariable:
		return string(n.Name), true
	case scope.NodeTypeAccess:
		if deep == 0 {
			return "", false
		}
		path, ok = pathOf(n.Arg, deep-1)
		return path + "." + string(n.Value), ok
	}
	return "", false
}

// shape returns the members that policies can read in this bundle.
func (p *Policy) shape() fields {
	context := fields{}
	for _, w := range vocabulary {
		context[w.name] = p.fieldsOf(w.of)
	}
	return fields{
		"principal": p.fieldsOf(entities[typeAgent].shape),
		"action":    {},
		"resource":  p.fieldsOf(entities[typeTool].shape),
		"context":   context,
	}
}

// fieldsOf returns the members of a type of a word; nil: it is no record, or its members can have any name.
func (p *Policy) fieldsOf(of any) fields {
	f := fields{}
	switch of := of.(type) {
	case members:
		for name, member := range of {
			f[name] = p.fieldsOf(member)
		}
	case arguments:
		for _, t := range p.tools {
			for name := range t.Arguments {
				f[name] = nil
			}
		}
	case history:
		for name := range p.tools {
			f[string(name)] = p.fieldsOf(past)
		}
	default:
		return nil
	}
	return f
}

// every covers the whole context.
func every() reads {
	r := reads{}
	for _, w := range vocabulary {
		r[w.name] = nil
	}
	return r
}
