package policy

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/yaml"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Result is the outcome of one row.
type Result struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Name string `json:"name"`
	Fail string `json:"fail,omitempty"` // the mismatch; empty when the row passed
}

// String formats a row as "file:line: name: outcome", where outcome is "ok" or the mismatch.
func (r Result) String() string {
	outcome := r.Fail
	if outcome == "" {
		outcome = "ok"
	}
	return fmt.Sprintf("%s:%d: %s: %s", r.File, r.Line, r.Name, outcome)
}

type testYAML struct {
	Name      string              `yaml:"name"`
	Caller    string              `yaml:"caller"`
	Action    string              `yaml:"action"`
	Tool      string              `yaml:"tool"`
	Args      map[string]any      `yaml:"args"`
	Receiver  string              `yaml:"receiver"`
	Violation string              `yaml:"violation"`
	Proof     string              `yaml:"proof"`
	At        string              `yaml:"at"`
	Chain     chainYAML           `yaml:"chain"`
	Open      *openYAML           `yaml:"open"`
	History   map[string]pastYAML `yaml:"history"`
	Elsewhere map[string]pastYAML `yaml:"caller_history"`

	Expect      string   `yaml:"expect"`
	Consequence string   `yaml:"consequence"`
	Approval    string   `yaml:"approval"`
	Failed      bool     `yaml:"failed"`
	TTL         string   `yaml:"ttl"`
	Narrowing   string   `yaml:"narrowing"`
	Caps        string   `yaml:"caps"`
	Policies    []string `yaml:"policies"`
}

// openYAML is a request to open.
type openYAML struct {
	Steps     int    `yaml:"steps"`
	Live      int    `yaml:"live"`
	PerMinute int    `yaml:"per_minute"`
	Depth     int    `yaml:"depth"`
	TTL       string `yaml:"ttl"`
	Heartbeat string `yaml:"heartbeat"`
}

// request returns the request with the chain's task and labels.
func (y openYAML) request(c broker.Chain) (r broker.OpenRequest, err error) {
	r = broker.OpenRequest{Task: c.Task, Labels: c.Labels, Depth: y.Depth,
		Budget: broker.Budget{Steps: y.Steps, Live: y.Live, PerMinute: y.PerMinute}}
	for _, d := range []struct {
		name, text string
		into       *time.Duration
	}{{"ttl", y.TTL, &r.TTL}, {"heartbeat", y.Heartbeat, &r.Heartbeat}} {
		if d.text == "" {
			continue
		}
		if *d.into, err = time.ParseDuration(d.text); err != nil || *d.into < 0 {
			return r, fmt.Errorf("open.%s: %.40q is not a duration like 10m", d.name, d.text)
		}
	}
	return r, nil
}

type chainYAML struct {
	Task   string            `yaml:"task"`
	Opener string            `yaml:"opener"` // the caller when absent
	Labels map[string]string `yaml:"labels"`
	Age    string            `yaml:"age"`
	Depth  int               `yaml:"depth"`

	Envelope *envelopeYAML `yaml:"envelope"`
}

// envelopeYAML is the content of the envelope that a chain was opened with.
type envelopeYAML struct {
	Issuer string            `yaml:"issuer"`
	Task   string            `yaml:"task"`
	Labels map[string]string `yaml:"labels"`
	Behalf string            `yaml:"on_behalf_of"`
}

type pastYAML struct {
	Count int    `yaml:"count"`
	First string `yaml:"first"` // same as last when absent
	Last  string `yaml:"last"`  // now when absent
}

// Test builds an author's directory and runs its policy test files, *.test.yaml. A directory without any is an error.
func Test(dir fs.FS) (*Policy, []Result, error) {
	s, err := Build(dir)
	if err != nil {
		return nil, nil, err
	}
	p, err := Load(s.Unsigned())
	if err != nil {
		return nil, nil, err
	}
	files, err := fs.Glob(dir, "*.test.yaml")
	if err == nil && len(files) == 0 {
		err = fmt.Errorf("no *.test.yaml: %w", fs.ErrNotExist)
	}
	var results []Result
	for _, file := range files {
		raw, err := readFile(dir, file)
		if err != nil {
			return nil, nil, err
		}
		some, err := runTests(p, file, raw)
		if err != nil {
			return nil, nil, err
		}
		results = append(results, some...)
	}
	return p, results, err
}

// runTests runs a policy test file. A malformed file is an error, which begins with "file:line: ". A failing row is a
// result.
func runTests(p *Policy, file string, raw []byte) ([]Result, error) {
	rows, err := readTests(file, raw)
	if err != nil {
		return nil, err
	}
	results := make([]Result, 0, len(rows))
	for _, r := range rows {
		q, err := r.Value.question()
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, r.Line, err)
		}
		want, err := r.Value.want()
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, r.Line, err)
		}
		results = append(results, Result{file, r.Line, r.Value.Name, want.mismatch(p, q)})
	}
	return results, nil
}

// Questions returns the questions of a policy test file, as input for [Diff].
func Questions(file string, raw []byte) ([]broker.Question, error) {
	rows, err := readTests(file, raw)
	if err != nil {
		return nil, err
	}
	questions := make([]broker.Question, 0, len(rows))
	for _, r := range rows {
		q, err := r.Value.question()
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, r.Line, err)
		}
		questions = append(questions, q)
	}
	return questions, nil
}

func readTests(file string, raw []byte) ([]yaml.Row[testYAML], error) {
	var doc struct {
		Tests []yaml.Row[testYAML] `yaml:"tests"`
	}
	if err := yaml.Read(file, raw, &doc); err != nil {
		return nil, err
	}
	if len(doc.Tests) == 0 {
		return nil, fmt.Errorf("%s: has no tests", file)
	}
	return doc.Tests, nil
}

func (y testYAML) question() (q broker.Question, err error) {
	q = broker.Question{
		Action:    cmp.Or(broker.Action(y.Action), broker.ActionUse),
		Tool:      broker.Tool{Name: broker.ToolName(y.Tool)},
		Violation: broker.ViolationCode(y.Violation),
		Caller:    broker.Caller{Proof: cmp.Or(broker.Proof(y.Proof), broker.ProofX509)},
		Now:       time.Date(2026, 3, 2, 10, 0, 0, 0, time.UTC),
	}
	if !slices.Contains(actions(), q.Action) {
		return q, fmt.Errorf("action %.40q is not open, use, delegate or report", y.Action)
	}
	if q.Caller.Proof != broker.ProofX509 && q.Caller.Proof != broker.ProofJWT {
		return q, fmt.Errorf("proof %.40q is not x509-svid or jwt-svid", y.Proof)
	}
	if (y.Receiver != "") != (q.Action == broker.ActionDelegate) || (y.Violation != "") != (q.Action == broker.ActionReport) {
		return q, errors.New("delegate requires a receiver and report a violation; no other action takes one")
	}
	if q.Caller.ID, err = spiffeid.FromString(y.Caller); err != nil {
		return q, fmt.Errorf("caller: %w", err)
	}
	if y.Open != nil && q.Action != broker.ActionOpen {
		return q, errors.New("only the action open takes open")
	}
	if y.Receiver != "" {
		if q.Receiver, err = spiffeid.FromString(y.Receiver); err != nil {
			return q, fmt.Errorf("receiver: %w", err)
		}
	}
	if y.At != "" {
		if q.Now, err = time.Parse(time.RFC3339, y.At); err != nil {
			return q, fmt.Errorf("at: %.40q is not like 2026-03-02T10:00:00Z", y.At)
		}
	}
	if err := y.past(&q); err != nil {
		return q, err
	}
	if q.Action == broker.ActionOpen {
		var open openYAML // of a row without: it asks for nothing
		if y.Open != nil {
			open = *y.Open
		}
		r, err := open.request(q.Chain)
		if q.Open = &r; err != nil {
			return q, err
		}
	}
	if y.Args == nil {
		return q, nil
	}
	text, err := yaml.AsJSON(y.Args)
	if err != nil {
		return q, fmt.Errorf("args %w", err)
	}
	q.Args, err = args.Parse(text)
	return q, err
}

// past fills in the chain and its history before the question.
func (y testYAML) past(q *broker.Question) (err error) {
	q.Chain = broker.Chain{Task: y.Chain.Task, Labels: y.Chain.Labels, Opener: q.Caller.ID}
	if e := y.Chain.Envelope; e != nil {
		q.Chain.Envelope = &broker.Envelope{Issuer: e.Issuer, Task: e.Task, Labels: e.Labels, Behalf: e.Behalf}
	}
	q.Depth = y.Chain.Depth
	if y.Chain.Opener != "" {
		if q.Chain.Opener, err = spiffeid.FromString(y.Chain.Opener); err != nil {
			return fmt.Errorf("chain.opener: %w", err)
		}
	}
	if q.Chain.Opened, err = ago(q.Now, y.Chain.Age); err != nil {
		return fmt.Errorf("chain.age: %w", err)
	}
	if q.History, err = pastOf(y.History, q.Now); err != nil {
		return err
	}
	elsewhere, err := pastOf(y.Elsewhere, q.Now)
	q.CallerHistory = InWindows(elsewhere, q.Now)
	return err
}

// InWindows returns the history of a caller as a policy sees it in each window that a rule can have. The steps with one
// tool leave a window together, with the last of them.
func InWindows(history map[broker.ToolName]broker.Past, now time.Time) map[time.Duration]map[broker.ToolName]broker.Past {
	windows := map[time.Duration]map[broker.ToolName]broker.Past{}
	for w := time.Minute; w <= broker.MaxWindow; w += time.Minute {
		if w > time.Hour && w%time.Hour > 0 {
			continue
		}
		windows[w] = map[broker.ToolName]broker.Past{}
		for name, past := range history {
			if !past.Last.Before(now.Add(-w)) { // the oldest minute counts whole
				windows[w][name] = past
			}
		}
	}
	return windows
}

func pastOf(given map[string]pastYAML, now time.Time) (map[broker.ToolName]broker.Past, error) {
	history := make(map[broker.ToolName]broker.Past, len(given))
	for name, h := range given {
		past := broker.Past{Count: h.Count}
		var err error
		if past.Last, err = ago(now, h.Last); err != nil {
			return nil, fmt.Errorf("history of %q: last: %w", name, err)
		}
		if past.First = past.Last; h.First != "" {
			if past.First, err = ago(now, h.First); err != nil {
				return nil, fmt.Errorf("history of %q: first: %w", name, err)
			}
		}
		history[broker.ToolName(name)] = past
	}
	return history, nil
}

// ago returns the instant that lies the duration s before now. Empty text means now.
func ago(now time.Time, s string) (time.Time, error) {
	if s == "" {
		return now, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return now, fmt.Errorf("%.40q is not a duration like 10m", s)
	}
	return now.Add(-d), nil
}

// expectation is the decision that a row expects. Fields that the row does not state are not compared.
type expectation struct {
	broker.Decision
	ttl, narrowing, policies bool    // whether the row states them
	caps                     *string // nil: not stated
}

func (y testYAML) want() (w expectation, err error) {
	w.Allow, w.Approval, w.Failed, w.Policies = y.Expect == "allow", y.Approval, y.Failed, slices.Sorted(slices.Values(y.Policies))
	w.ttl, w.narrowing, w.policies = y.TTL != "", y.Narrowing != "", y.Policies != nil
	if y.Caps != "" {
		w.caps = &y.Caps
	}
	if y.Expect != "allow" && y.Expect != "deny" {
		return w, errors.New("expect must be allow or deny")
	}
	if y.Consequence != "" {
		var ok bool
		if w.Consequence, ok = broker.ParseConsequence(y.Consequence); !ok {
			return w, fmt.Errorf("consequence %.40q is unknown", y.Consequence)
		}
	}
	if w.ttl {
		if w.TTL, err = parseTTL(y.TTL); err != nil {
			return w, err
		}
	}
	if w.narrowing {
		w.Narrowing, err = broker.ParseNarrowing(y.Narrowing)
	}
	return w, err
}

// mismatch lists the differences from the expected decision. It is empty when there are none.
func (w expectation) mismatch(p *Policy, q broker.Question) string {
	e := p.Explain(q)
	got := e.Decision
	var why []string
	note := func(what string, got, want any) {
		if !reflect.DeepEqual(got, want) {
			why = append(why, fmt.Sprintf("%s is %v, want %v", what, got, want))
		}
	}
	answer := func(allow bool) string {
		if allow {
			return "allow"
		}
		return "deny"
	}
	got.Allow = got.Allow && all(e.Missing, func(m string) bool { return strings.HasPrefix(m, "approval:") })
	if got.Allow != w.Allow {
		why = append(why, fmt.Sprintf("answer is %s, want %s: %s", answer(got.Allow), answer(w.Allow), e.Why))
	}
	note("consequence", got.Consequence, w.Consequence)
	note("approval", got.Approval, w.Approval)
	note("failed", got.Failed, w.Failed)
	if w.ttl {
		note("ttl", got.TTL, w.TTL)
	}
	if w.narrowing {
		note("narrowing", got.Narrowing, w.Narrowing)
	}
	if w.caps != nil && describeCaps(got.Caps) != *w.caps {
		why = append(why, fmt.Sprintf("caps are %q, want %q", describeCaps(got.Caps), *w.caps))
	}
	if w.policies && !slices.Equal(got.Policies, w.Policies) {
		note("policies", got.Policies, w.Policies)
	}
	return strings.Join(why, "; ")
}
