package engine_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	jsonv2 "github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
)

// oldData is the JSON beside an old ledger. The types below spell out every member, and copy the engine's
// answers field by field: the file must stay readable when the engine's own types and tags change.
type oldData struct {
	Build   string            `json:"build"`   // the commit that wrote the ledger
	Died    time.Time         `json:"died"`    // by the broker's clock, when its process died
	Records map[string]int    `json:"records"` // how many of each family of keys; informational
	Cases   map[string]string `json:"cases"`   // ids by the role that they have in the test
	Canary  string            `json:"canary"`  // a planted value, in hex: secret scanners would report the value itself
	Outside oldOutside        `json:"outside"`
	Log     oldLog            `json:"log"`
	Answers oldAnswers        `json:"answers"`
	After   oldAfter          `json:"after"`
}

// oldOutside is the state outside the ledger when the process died.
type oldOutside struct {
	Leases map[string]string `json:"leases"` // in Vault, by id: the grant that it was minted for; empty: none
	Logins []string          `json:"logins"` // at the target, by grant
	Signed []string          `json:"signed"` // tokens that the signer accepts, by grant
}

// oldLog identifies the audit log.
type oldLog struct {
	Head       uint64         `json:"head"`
	Root       string         `json:"root"`       // of the Merkle tree of its entries (RFC 6962)
	Checkpoint string         `json:"checkpoint"` // signed, as pawl audit verify --save keeps it
	Verifier   string         `json:"verifier"`   // its key
	Ops        map[string]int `json:"ops"`        // how many entries of each op
}

// oldAnswers are the engine's answers before Resume. None of these queries writes to the ledger.
type oldAnswers struct {
	Chains      []oldChain        `json:"chains"`
	Revocations []oldRevocation   `json:"revocations"`
	Canaries    []oldCanary       `json:"canaries"`
	Cursors     map[string]uint64 `json:"cursors"`
	Plans       []oldPlan         `json:"plans"`
}

// oldAfter is the state after Resume by the build that wrote the ledger, once it had reconciled everything. It has no
// times: retries are spread at random.
type oldAfter struct {
	Grants      map[string]string `json:"grants"`      // state, ending, outcome
	Revocations map[string]string `json:"revocations"` // closure and counts
	Steps       map[string]string `json:"steps"`       // by delegation: the answers to a step; below the root, to two
	Silent      []string          `json:"silent"`      // delegations with a missed heartbeat after two hours

	// History is by chain and tool: the steps that policy sees with the first question after Resume.
	History map[string]map[string]oldPast `json:"history"`
}

type oldPast struct {
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

type oldChain struct {
	ID          string            `json:"id"`
	Task        string            `json:"task"`
	Opener      string            `json:"opener"`
	Opened      time.Time         `json:"opened"`
	Labels      map[string]string `json:"labels,omitempty"`
	Root        string            `json:"root"`
	Live        int               `json:"live"`
	Steps       int               `json:"steps"`
	Fence       *oldFence         `json:"fence,omitempty"`
	Delegations []oldDelegation   `json:"delegations"`
	Grants      []oldGrant        `json:"grants,omitempty"`
	Entries     []uint64          `json:"entries"` // revisions
}

type oldDelegation struct {
	ID        string      `json:"id"`
	Chain     string      `json:"chain"`
	Parent    string      `json:"parent,omitempty"`
	Holder    string      `json:"holder"`
	Scope     []oldRight  `json:"scope"`
	Budget    oldBudget   `json:"budget,omitzero"`
	Depth     int         `json:"depth"`
	Created   time.Time   `json:"created"`
	Expires   time.Time   `json:"expires"`
	Tokens    []oldHandle `json:"tokens,omitempty"`
	Fence     *oldFence   `json:"fence,omitempty"`
	Heartbeat string      `json:"heartbeat"`

	Covered *oldFence `json:"covered,omitempty"` // the fence over it, its own or another
	Ended   []string  `json:"ended,omitempty"`   // the grants that its holder must stop
}

type oldRight struct {
	Tool     string            `json:"tool"`
	Use      bool              `json:"use,omitempty"`
	Delegate bool              `json:"delegate,omitempty"`
	Args     map[string]string `json:"args,omitempty"` // each constraint in its wire form
}

type oldBudget struct {
	Steps     int            `json:"steps,omitempty"`
	Live      int            `json:"live,omitempty"`
	PerMinute int            `json:"per_minute,omitempty"`
	Tools     map[string]int `json:"tools,omitempty"`
}

type oldHandle struct {
	Accessor string    `json:"accessor"`
	Expires  time.Time `json:"expires,omitzero"`
}

type oldFence struct {
	Generation uint64    `json:"generation"`
	At         time.Time `json:"at"`
	Revocation string    `json:"revocation"`
	Frozen     bool      `json:"frozen,omitempty"`
}

type oldGrant struct {
	ID         string        `json:"id"`
	Chain      string        `json:"chain"`
	Delegation string        `json:"delegation"`
	Caller     string        `json:"caller"`
	Tool       string        `json:"tool"`
	Backend    string        `json:"backend"`
	Narrowing  string        `json:"narrowing"`
	Args       string        `json:"args"` // canonical JSON
	Purpose    string        `json:"purpose,omitempty"`
	Path       string        `json:"path,omitempty"`
	State      string        `json:"state"`
	Created    time.Time     `json:"created"`
	Expires    time.Time     `json:"expires"`
	Bundle     string        `json:"bundle"`
	Policies   []string      `json:"policies,omitempty"`
	Token      oldHandle     `json:"token,omitzero"`
	Settles    time.Time     `json:"settles,omitzero"`
	Lease      oldLease      `json:"lease,omitzero"`
	Fence      *oldFence     `json:"fence,omitempty"`
	Ending     string        `json:"ending,omitempty"`
	Ended      time.Time     `json:"ended,omitzero"`
	Outcome    string        `json:"outcome,omitempty"`
	Evidence   []oldEvidence `json:"evidence,omitempty"`
	ArgsDigest string        `json:"args_digest,omitempty"`
	Longest    string        `json:"longest,omitempty"`
	Sealed     string        `json:"sealed,omitempty"`
	Collector  string        `json:"collector,omitempty"`
	Collected  time.Time     `json:"collected,omitzero"`

	LatestEnd time.Time `json:"latest_end"`
	Active    bool      `json:"active,omitempty"`
}

type oldLease struct {
	ID       string    `json:"id,omitempty"`
	Ref      string    `json:"ref,omitempty"`
	Expires  time.Time `json:"expires,omitzero"`
	Outlives time.Time `json:"outlives,omitzero"`
	Digests  []string  `json:"digests,omitempty"`
}

type oldEvidence struct {
	At      time.Time `json:"at"`
	Check   string    `json:"check"`
	Outcome string    `json:"outcome,omitempty"`
	Answer  string    `json:"answer"`
	Listed  bool      `json:"listed,omitempty"`
}

type oldRevocation struct {
	ID        string    `json:"id"`
	Selector  string    `json:"selector"`
	Reason    string    `json:"reason"`
	By        string    `json:"by"`
	Freeze    bool      `json:"freeze,omitempty"`
	Lifted    bool      `json:"lifted,omitempty"`
	Unfreezer string    `json:"unfreezer,omitempty"`
	Chain     string    `json:"chain,omitempty"`
	Node      string    `json:"node,omitempty"`
	Grant     string    `json:"grant,omitempty"`
	Asked     time.Time `json:"asked"`
	Fenced    time.Time `json:"fenced"`
	Revision  uint64    `json:"revision"`
	Settled   time.Time `json:"settled,omitzero"`
	Closure   string    `json:"closure"`
	Nothing   bool      `json:"nothing,omitempty"`
	Repeated  bool      `json:"repeated,omitempty"`
	Grants    int       `json:"grants"`
	Dead      int       `json:"dead"`
	Alive     int       `json:"alive"`
	Unknown   int       `json:"unknown"`
	Static    int       `json:"static"`
	Tokens    int       `json:"tokens"`
	Unswept   bool      `json:"unswept,omitempty"`
	LatestEnd time.Time `json:"latest_end,omitzero"`

	Acknowledgements []oldAcknowledgement `json:"acknowledgements,omitempty"`
}

type oldAcknowledgement struct {
	Chain      string    `json:"chain"`
	Delegation string    `json:"delegation"`
	Holder     string    `json:"holder"`
	At         time.Time `json:"at,omitzero"`
}

type oldCanary struct {
	ID      string    `json:"id"`
	Chain   string    `json:"chain,omitempty"`
	Note    string    `json:"note,omitempty"`
	By      string    `json:"by"`
	Planted time.Time `json:"planted"`
	Touched time.Time `json:"touched,omitzero"`
	Touches int       `json:"touches,omitempty"`
}

// oldPlan is the plan of a selector, or its refusal.
type oldPlan struct {
	Selector  string         `json:"selector"`
	Refused   string         `json:"refused,omitempty"`
	Revision  uint64         `json:"revision,omitempty"`
	Chains    int            `json:"chains,omitempty"`
	Nodes     int            `json:"nodes,omitempty"`
	Later     int            `json:"later,omitempty"`
	Grants    int            `json:"grants,omitempty"`
	Issued    int            `json:"issued,omitempty"`
	Live      int            `json:"live,omitempty"`
	Static    int            `json:"static,omitempty"`
	ByTool    map[string]int `json:"by_tool,omitempty"`
	ByCaller  map[string]int `json:"by_caller,omitempty"`
	LatestEnd time.Time      `json:"latest_end,omitzero"`
}

// answers queries the engine for oldAnswers, with the subscribers and selectors of want.
func (w *oldWorld) answers(want oldAnswers) (a oldAnswers) {
	w.t.Helper()
	chains, err := w.Chains(ctx, true)
	w.must(err)
	for _, s := range chains {
		a.Chains = append(a.Chains, w.answerChain(s))
	}
	revocations, err := w.Revocations(ctx)
	w.must(err)
	for _, rv := range revocations {
		a.Revocations = append(a.Revocations, w.answerRevocation(rv))
	}
	canaries, err := w.Canaries(ctx)
	w.must(err)
	for _, c := range canaries {
		a.Canaries = append(a.Canaries, oldCanary{string(c.ID), string(c.Chain), c.Note, c.By, c.Planted.UTC(),
			c.Touched.UTC(), c.Touches})
	}
	a.Cursors = map[string]uint64{}
	for name := range want.Cursors {
		at, err := w.Subscribe(ctx, name)
		w.must(err)
		a.Cursors[name] = uint64(at)
	}
	for _, p := range want.Plans {
		a.Plans = append(a.Plans, w.answerPlan(p.Selector))
	}
	return a
}

func (w *oldWorld) answerChain(s broker.ChainSummary) oldChain {
	w.t.Helper()
	v, err := w.Chain(ctx, s.Chain.ID)
	w.must(err)
	if len(v.Delegations) != s.Delegations {
		w.t.Errorf("chain %s has %d delegations and counts %d", s.Chain.ID, len(v.Delegations), s.Delegations)
	}
	c := oldChain{ID: string(v.Chain.ID), Task: v.Chain.Task, Opener: v.Chain.Opener.String(),
		Opened: v.Chain.Opened.UTC(),
		Labels: v.Chain.Labels, Root: string(v.Chain.Root), Live: s.Live, Steps: s.Steps, Fence: answerFence(s.Fence)}
	for _, d := range v.Delegations {
		c.Delegations = append(c.Delegations, w.answerDelegation(d))
	}
	for _, g := range v.Grants {
		active, err := w.Active(ctx, g.ID)
		w.must(err)
		got := answerGrant(g)
		got.Active = active
		c.Grants = append(c.Grants, got)
	}
	entries, err := w.ChainEntries(ctx, s.Chain.ID, 0, 10000)
	w.must(err)
	for _, e := range entries {
		if e.Chain != s.Chain.ID {
			w.t.Errorf("ChainEntries of chain %s has entry %d of chain %q", s.Chain.ID, e.Revision, e.Chain)
		}
		c.Entries = append(c.Entries, uint64(e.Revision))
	}
	return c
}

func (w *oldWorld) answerDelegation(d broker.Delegation) oldDelegation {
	w.t.Helper()
	status, err := w.Peek(ctx, holderOf(d), d.ID)
	w.must(err)
	got := oldDelegation{ID: string(d.ID), Chain: string(d.Chain), Parent: string(d.Parent), Holder: d.Holder.String(),
		Budget: oldBudget{d.Budget.Steps, d.Budget.Live, d.Budget.PerMinute, byName(d.Budget.Tools)}, Depth: d.Depth,
		Created: d.Created.UTC(), Expires: d.Expires.UTC(), Fence: answerFence(d.Fence),
		Heartbeat: d.Heartbeat.String(),
		Covered:   answerFence(status.Fence)}
	for _, r := range d.Scope {
		right := oldRight{Tool: string(r.Tool), Use: r.Use, Delegate: r.Delegate}
		for name, c := range r.Args {
			wire, err := c.MarshalJSON()
			w.must(err)
			if right.Args == nil {
				right.Args = map[string]string{}
			}
			right.Args[name] = string(wire)
		}
		got.Scope = append(got.Scope, right)
	}
	for _, h := range d.Tokens {
		got.Tokens = append(got.Tokens, oldHandle{h.Accessor, h.Expires.UTC()})
	}
	for _, id := range status.Ended {
		got.Ended = append(got.Ended, string(id))
	}
	return got
}

func answerGrant(g broker.Grant) oldGrant {
	got := oldGrant{ID: string(g.ID), Chain: string(g.Chain), Delegation: string(g.Delegation),
		Caller: g.Caller.String(),
		Tool:   string(g.Tool), Backend: g.Backend, Narrowing: g.Narrowing.String(), Args: string(g.Args.Canonical()),
		Purpose: g.Purpose, Path: g.Path.String(), State: string(g.State), Created: g.Created.UTC(), Expires: g.Expires.UTC(),
		Bundle: g.Bundle, Policies: g.Policies, Token: oldHandle{g.Token.Accessor, g.Token.Expires.UTC()},
		Settles: g.MintDeadline.UTC(), Fence: answerFence(g.Fence), Ending: string(g.Ending), Ended: g.Ended.UTC(),
		Lease: oldLease{ID: g.Lease.ID, Ref: g.Lease.Ref, Expires: g.Lease.Expires.UTC(),
			Outlives: g.Lease.Outlives.UTC()},
		Outcome: string(g.Outcome), ArgsDigest: g.ArgsDigest, Longest: g.Longest.String(), Sealed: g.Sealed,
		Collector: g.Collector.String(), Collected: g.Collected.UTC(), LatestEnd: g.LatestEnd().UTC()}
	for _, d := range g.Lease.Digests {
		got.Lease.Digests = append(got.Lease.Digests, string(d))
	}
	for _, e := range g.Evidence {
		got.Evidence = append(got.Evidence, oldEvidence{e.At.UTC(), e.Check, string(e.Outcome), e.Answer, e.Listed})
	}
	return got
}

func (w *oldWorld) answerRevocation(listed broker.Revocation) oldRevocation {
	w.t.Helper()
	rv, err := w.Revocation(ctx, listed.ID)
	w.must(err)
	got := oldRevocation{ID: string(rv.ID), Selector: rv.Selector, Reason: rv.Reason, By: rv.By, Freeze: rv.Freeze,
		Lifted:    rv.Lifted,
		Unfreezer: rv.Unfreezer, Chain: string(rv.Chain), Node: string(rv.Node), Grant: string(rv.Grant),
		Asked:  rv.Asked.UTC(),
		Fenced: rv.Fenced.UTC(), Revision: uint64(rv.Revision), Settled: rv.Settled.UTC(), Closure: string(rv.Closure),
		Nothing: rv.Nothing, Repeated: rv.Repeated, Grants: rv.Grants, Dead: rv.Dead, Alive: rv.Alive,
		Unknown: rv.Unknown,
		Static:  rv.Static, Tokens: rv.Tokens, Unswept: rv.Unswept, LatestEnd: rv.LatestEnd.UTC()}
	list, err := w.Acknowledgements(ctx, rv.ID)
	w.must(err)
	for _, a := range list {
		got.Acknowledgements = append(got.Acknowledgements,
			oldAcknowledgement{string(a.Chain), string(a.Delegation), a.Holder.String(), a.At.UTC()})
	}
	return got
}

func (w *oldWorld) answerPlan(text string) oldPlan {
	w.t.Helper()
	p, err := w.Plan(ctx, responder, selecting(w.t, "%s", text))
	if err != nil {
		return oldPlan{Selector: text, Refused: codeOf(err)}
	}
	return oldPlan{Selector: p.Selector, Revision: uint64(p.Revision), Chains: p.Chains, Nodes: p.Nodes,
		Later: p.Later, Grants: p.Grants,
		Issued: p.Issued, Live: p.Live, Static: p.Static, ByTool: byName(p.ByTool), ByCaller: p.ByCaller,
		LatestEnd: p.LatestEnd.UTC()}
}

func answerFence(f *broker.Fence) *oldFence {
	if f == nil {
		return nil
	}
	return &oldFence{uint64(f.Generation), f.At.UTC(), string(f.Revocation), f.Frozen}
}

func byName[K ~string, V any](m map[K]V) map[string]V {
	if len(m) == 0 {
		return nil
	}
	named := map[string]V{}
	for k, v := range m {
		named[string(k)] = v
	}
	return named
}

// codeOf returns a refusal as the JSON has it: its kind, its code, and the revocation that it names.
func codeOf(err error) string {
	var e *broker.Error
	if !errors.As(err, &e) {
		return fmt.Sprint(err)
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s %s", e.Kind, e.Code, e.Revocation))
}

// oldEntry is an entry of the audit log with the members of the first version. Signed checkpoints cover exactly this
// text, so it must not follow changes of broker.Entry's tags.
type oldEntry struct {
	Revision   uint64    `json:"revision"`
	At         time.Time `json:"at"`
	Actor      string    `json:"actor"`
	Op         string    `json:"op"`
	Chain      string    `json:"chain,omitempty"`
	Delegation string    `json:"delegation,omitempty"`
	Grant      string    `json:"grant,omitempty"`
	Revocation string    `json:"revocation,omitempty"`
	Tool       string    `json:"tool,omitempty"`
	Code       string    `json:"code,omitempty"`
	Bundle     string    `json:"bundle,omitempty"`
	Policies   []string  `json:"policies,omitempty"`
	Detail     string    `json:"detail,omitempty"`
}

// rootOf returns the Merkle root of entries, from the first of the log on, as broker/audit computes it.
func rootOf(t *testing.T, entries []broker.Entry) tlog.Hash {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var hashes []tlog.Hash
	reader := tlog.HashReaderFunc(func(at []int64) (found []tlog.Hash, err error) {
		for _, i := range at {
			found = append(found, hashes[i])
		}
		return found, nil
	})
	for i, e := range entries {
		if e.Revision != broker.Revision(i+1) {
			t.Fatalf("entry %d of the log has revision %d", i+1, e.Revision)
		}
		text, err := jsonv2.Marshal(oldEntry{uint64(e.Revision), e.At.UTC().Round(0), e.Actor, string(e.Op),
			string(e.Chain), string(e.Delegation),
			string(e.Grant), string(e.Revocation), string(e.Tool), string(e.Code), e.Bundle, e.Policies, e.Detail},
			jsonv2.Deterministic(true))
		must(err)
		added, err := tlog.StoredHashes(int64(i), text, reader)
		must(err)
		hashes = append(hashes, added...)
	}
	root, err := tlog.TreeHash(int64(len(entries)), reader)
	must(err)
	return root
}

// differences lists where two values differ as JSON, each with its path.
func differences(want, got any) []string {
	return differ("", generic(want), generic(got))
}

func generic(v any) (g any) {
	text, err := json.Marshal(v)
	if err == nil {
		err = json.Unmarshal(text, &g)
	}
	if err != nil {
		return err.Error()
	}
	return g
}

func differ(path string, want, got any) (found []string) {
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			break
		}
		both := maps.Clone(w)
		maps.Copy(both, g)
		for _, name := range slices.Sorted(maps.Keys(both)) {
			found = append(found, differ(path+"."+name, w[name], g[name])...)
		}
		return found
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(w) {
			break
		}
		for i := range w {
			found = append(found, differ(fmt.Sprintf("%s[%d]", path, i), w[i], g[i])...)
		}
		return found
	default:
		if want == got {
			return nil
		}
	}
	return []string{fmt.Sprintf("%s = %v, want %v", path, got, want)}
}
