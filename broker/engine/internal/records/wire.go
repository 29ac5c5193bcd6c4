package records

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// The wire types are the records in the ledger, in CBOR with integer keys. A key never changes its meaning. A new field
// gets a new key, and decodes as zero from a record without it.

// stamp is a time in nanoseconds since 1970; zero is the zero time.
type stamp int64

func stampOf(t time.Time) stamp {
	if t.IsZero() {
		return 0
	}
	return stamp(t.UnixNano())
}

func (s stamp) time() time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(s)).UTC()
}

func idText(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

func idOf(text string) (spiffeid.ID, error) {
	if text == "" {
		return spiffeid.ID{}, nil
	}
	return spiffeid.FromString(text)
}

type wireFence struct {
	Generation broker.Revision     `cbor:"1,keyasint"`
	At         stamp               `cbor:"2,keyasint"`
	Revocation broker.RevocationID `cbor:"3,keyasint"`
	Frozen     bool                `cbor:"4,keyasint,omitempty"`
}

func fenceWire(f *broker.Fence) *wireFence {
	if f == nil {
		return nil
	}
	return &wireFence{f.Generation, stampOf(f.At), f.Revocation, f.Frozen}
}

func (w *wireFence) fence() *broker.Fence {
	if w == nil {
		return nil
	}
	return &broker.Fence{Generation: w.Generation, At: w.At.time(), Revocation: w.Revocation, Frozen: w.Frozen}
}

type wireHandle struct {
	Accessor string `cbor:"1,keyasint"`
	Expires  stamp  `cbor:"2,keyasint,omitempty"`
}

func handleWire(h broker.Handle) wireHandle { return wireHandle{h.Accessor, stampOf(h.Expires)} }

func (w wireHandle) handle() broker.Handle {
	return broker.Handle{Accessor: w.Accessor, Expires: w.Expires.time()}
}

type wireChain struct {
	ID     broker.ChainID      `cbor:"1,keyasint"`
	Task   string              `cbor:"2,keyasint"`
	Opener string              `cbor:"3,keyasint"`
	Opened stamp               `cbor:"4,keyasint"`
	Labels map[string]string   `cbor:"5,keyasint,omitempty"`
	Root   broker.DelegationID `cbor:"6,keyasint"`

	Envelope *wireEnvelope `cbor:"7,keyasint,omitempty"`
}

type wireEnvelope struct {
	Issuer  string            `cbor:"1,keyasint"`
	ID      string            `cbor:"2,keyasint"`
	Digest  string            `cbor:"3,keyasint"`
	Task    string            `cbor:"4,keyasint,omitempty"`
	Labels  map[string]string `cbor:"5,keyasint,omitempty"`
	Behalf  string            `cbor:"6,keyasint,omitempty"`
	Issued  stamp             `cbor:"7,keyasint"`
	Expires stamp             `cbor:"8,keyasint"`
}

func envelopeWire(e *broker.Envelope) *wireEnvelope {
	if e == nil {
		return nil
	}
	return &wireEnvelope{e.Issuer, e.ID, e.Digest, e.Task, e.Labels, e.Behalf, stampOf(e.Issued), stampOf(e.Expires)}
}

func (w *wireEnvelope) envelope() *broker.Envelope {
	if w == nil {
		return nil
	}
	return &broker.Envelope{Issuer: w.Issuer, ID: w.ID, Digest: w.Digest, Task: w.Task, Labels: w.Labels,
		Behalf: w.Behalf, Issued: w.Issued.time(), Expires: w.Expires.time()}
}

func chainWire(c broker.Chain) wireChain {
	return wireChain{c.ID, c.Task, idText(c.Opener), stampOf(c.Opened), c.Labels, c.Root,
		envelopeWire(c.Envelope)}
}

func (w wireChain) chain() (broker.Chain, error) {
	opener, err := idOf(w.Opener)
	return broker.Chain{ID: w.ID, Task: w.Task, Opener: opener, Opened: w.Opened.time(), Labels: w.Labels,
		Root: w.Root, Envelope: w.Envelope.envelope()}, err
}

type wireRight struct {
	Tool     broker.ToolName   `cbor:"1,keyasint"`
	Use      bool              `cbor:"2,keyasint,omitempty"`
	Delegate bool              `cbor:"3,keyasint,omitempty"`
	Args     map[string][]byte `cbor:"4,keyasint,omitempty"` // constraints in their canonical JSON
}

type wireBudget struct {
	Steps     int                     `cbor:"1,keyasint,omitempty"`
	Live      int                     `cbor:"2,keyasint,omitempty"`
	PerMinute int                     `cbor:"3,keyasint,omitempty"`
	Tools     map[broker.ToolName]int `cbor:"4,keyasint,omitempty"`
}

type wireDelegation struct {
	ID        broker.DelegationID `cbor:"1,keyasint"`
	Chain     broker.ChainID      `cbor:"2,keyasint"`
	Parent    broker.DelegationID `cbor:"3,keyasint,omitempty"`
	Holder    string              `cbor:"4,keyasint"`
	Scope     []wireRight         `cbor:"5,keyasint"`
	Budget    wireBudget          `cbor:"6,keyasint"`
	Depth     int                 `cbor:"7,keyasint,omitempty"`
	Created   stamp               `cbor:"8,keyasint"`
	Expires   stamp               `cbor:"9,keyasint"`
	Tokens    []wireHandle        `cbor:"10,keyasint,omitempty"`
	Fence     *wireFence          `cbor:"11,keyasint,omitempty"`
	Heartbeat time.Duration       `cbor:"12,keyasint,omitempty"`
}

func delegationWire(d broker.Delegation) (wireDelegation, error) {
	w := wireDelegation{ID: d.ID, Chain: d.Chain, Parent: d.Parent, Holder: idText(d.Holder),
		Budget: wireBudget(d.Budget), Depth: d.Depth, Created: stampOf(d.Created), Expires: stampOf(d.Expires),
		Fence: fenceWire(d.Fence), Heartbeat: d.Heartbeat}
	for _, r := range d.Scope {
		wr := wireRight{Tool: r.Tool, Use: r.Use, Delegate: r.Delegate}
		for name, c := range r.Args {
			raw, err := json.Marshal(c)
			if err != nil {
				return w, err
			}
			if wr.Args == nil {
				wr.Args = map[string][]byte{}
			}
			wr.Args[name] = raw
		}
		w.Scope = append(w.Scope, wr)
	}
	for _, t := range d.Tokens {
		w.Tokens = append(w.Tokens, handleWire(t))
	}
	return w, nil
}

func (w wireDelegation) delegation() (d broker.Delegation, err error) {
	d = broker.Delegation{ID: w.ID, Chain: w.Chain, Parent: w.Parent, Budget: broker.Budget(w.Budget), Depth: w.Depth,
		Created: w.Created.time(), Expires: w.Expires.time(), Fence: w.Fence.fence(), Heartbeat: w.Heartbeat}
	if d.Holder, err = idOf(w.Holder); err != nil {
		return d, err
	}
	for _, r := range w.Scope {
		right := broker.Right{Tool: r.Tool, Use: r.Use, Delegate: r.Delegate}
		for name, raw := range r.Args {
			if right.Args == nil {
				right.Args = map[string]args.Constraint{}
			}
			if right.Args[name], err = args.ParseConstraint(raw); err != nil {
				return d, err
			}
		}
		d.Scope = append(d.Scope, right)
	}
	for _, t := range w.Tokens {
		d.Tokens = append(d.Tokens, t.handle())
	}
	return d, nil
}

type wirePast struct {
	Count int   `cbor:"1,keyasint"`
	First stamp `cbor:"2,keyasint"`
	Last  stamp `cbor:"3,keyasint"`
}

type wireUsage struct {
	Steps  int                          `cbor:"1,keyasint"`
	Live   int                          `cbor:"2,keyasint"`
	Minute int64                        `cbor:"3,keyasint"`
	InIt   int                          `cbor:"4,keyasint"`
	Tools  map[broker.ToolName]wirePast `cbor:"5,keyasint,omitempty"`
}

func usageWire(u Usage) wireUsage {
	w := wireUsage{Steps: u.Steps, Live: u.Live, Minute: u.Minute, InIt: u.InIt}
	if len(u.Tools) > 0 {
		w.Tools = make(map[broker.ToolName]wirePast, len(u.Tools))
	}
	for tool, p := range u.Tools {
		w.Tools[tool] = wirePast{p.Count, stampOf(p.First), stampOf(p.Last)}
	}
	return w
}

func (w wireUsage) usage() Usage {
	u := Usage{Steps: w.Steps, Live: w.Live, Minute: w.Minute, InIt: w.InIt}
	if len(w.Tools) > 0 {
		u.Tools = make(map[broker.ToolName]broker.Past, len(w.Tools))
	}
	for tool, p := range w.Tools {
		u.Tools[tool] = broker.Past{Count: p.Count, First: p.First.time(), Last: p.Last.time()}
	}
	return u
}

type wireLease struct {
	ID       string               `cbor:"1,keyasint,omitempty"`
	Ref      string               `cbor:"2,keyasint,omitempty"`
	Expires  stamp                `cbor:"3,keyasint,omitempty"`
	Outlives stamp                `cbor:"4,keyasint,omitempty"`
	Digests  []broker.ValueDigest `cbor:"5,keyasint,omitempty"`
	Request  string               `cbor:"6,keyasint,omitempty"`
}

type wireEvidence struct {
	At      stamp          `cbor:"1,keyasint"`
	Check   string         `cbor:"2,keyasint"`
	Outcome broker.Outcome `cbor:"3,keyasint,omitempty"`
	Answer  string         `cbor:"4,keyasint"`
	Listed  bool           `cbor:"5,keyasint,omitempty"`
	Final   bool           `cbor:"6,keyasint,omitempty"`
}

type wireScheduled struct {
	Backend   string `cbor:"1,keyasint"`
	Expires   stamp  `cbor:"2,keyasint"`
	Abandoned bool   `cbor:"3,keyasint,omitempty"`
	Held      bool   `cbor:"4,keyasint,omitempty"`
}

type wireGrant struct {
	ID        broker.GrantID    `cbor:"1,keyasint"`
	Backend   string            `cbor:"2,keyasint"`
	State     broker.GrantState `cbor:"3,keyasint"`
	Expires   stamp             `cbor:"4,keyasint"`
	Ending    broker.Ending     `cbor:"5,keyasint,omitempty"`
	Outcome   broker.Outcome    `cbor:"6,keyasint,omitempty"`
	Sealed    string            `cbor:"7,keyasint,omitempty"`
	Collected stamp             `cbor:"8,keyasint,omitempty"`
	Held      bool              `cbor:"9,keyasint,omitempty"`

	Chain      broker.ChainID      `cbor:"10,keyasint"`
	Delegation broker.DelegationID `cbor:"11,keyasint"`
	Caller     string              `cbor:"12,keyasint"`
	Tool       broker.ToolName     `cbor:"13,keyasint"`
	Narrowing  broker.Narrowing    `cbor:"14,keyasint,omitempty"`
	Args       []byte              `cbor:"15,keyasint,omitempty"` // canonical JSON; none: {}
	Purpose    string              `cbor:"16,keyasint,omitempty"`
	Path       string              `cbor:"17,keyasint,omitempty"`
	Created    stamp               `cbor:"18,keyasint"`
	Bundle     string              `cbor:"19,keyasint"`
	Policies   []string            `cbor:"20,keyasint,omitempty"`
	Token      wireHandle          `cbor:"21,keyasint,omitzero"`
	Deadline   stamp               `cbor:"22,keyasint,omitempty"`
	Lease      *wireLease          `cbor:"23,keyasint,omitempty"`
	Fence      *wireFence          `cbor:"24,keyasint,omitempty"`
	Ended      stamp               `cbor:"25,keyasint,omitempty"`
	Evidence   []wireEvidence      `cbor:"26,keyasint,omitempty"`
	ArgsDigest string              `cbor:"27,keyasint,omitempty"`
	Longest    time.Duration       `cbor:"28,keyasint,omitempty"`
	Collector  string              `cbor:"29,keyasint,omitempty"`
	Nothing    bool                `cbor:"30,keyasint,omitempty"`
	Counted    []string            `cbor:"31,keyasint,omitempty"`
	Shared     wireHandle          `cbor:"32,keyasint,omitzero"`
}

func grantWire(g broker.Grant) wireGrant {
	w := wireGrant{
		ID: g.ID, Backend: g.Backend, State: g.State, Expires: stampOf(g.Expires), Ending: g.Ending, Outcome: g.Outcome,
		Sealed: g.Sealed, Collected: stampOf(g.Collected), Held: g.Held,
		Chain: g.Chain, Delegation: g.Delegation, Caller: idText(g.Caller), Tool: g.Tool, Narrowing: g.Narrowing,
		Purpose: g.Purpose, Path: g.Path.String(), Created: stampOf(g.Created), Bundle: g.Bundle, Policies: g.Policies,
		Token: handleWire(g.Token), Deadline: stampOf(g.MintDeadline), Fence: fenceWire(g.Fence), Ended: stampOf(g.Ended),
		ArgsDigest: g.ArgsDigest, Longest: g.Longest, Collector: idText(g.Collector),
		Nothing: g.NothingMade,
		Counted: g.Counted,
		Shared:  handleWire(g.DelegationToken),
	}
	if canon := g.Args.Canonical(); len(canon) > len("{}") {
		w.Args = canon
	}
	if l := g.Lease; l.ID != "" || l.Ref != "" || !l.Expires.IsZero() || !l.Outlives.IsZero() || len(l.Digests) > 0 ||
		l.Request != "" {
		w.Lease = &wireLease{l.ID, l.Ref, stampOf(l.Expires), stampOf(l.Outlives), l.Digests, l.Request}
	}
	for _, e := range g.Evidence {
		w.Evidence = append(w.Evidence, wireEvidence{stampOf(e.At), e.Check, e.Outcome, e.Answer, e.Listed, e.Final})
	}
	return w
}

func (w *wireGrant) grant() (g broker.Grant, err error) {
	g = broker.Grant{ID: w.ID, Chain: w.Chain, Delegation: w.Delegation, Tool: w.Tool, Backend: w.Backend,
		Narrowing: w.Narrowing, Purpose: w.Purpose, State: w.State, Created: w.Created.time(),
		Expires: w.Expires.time(), Bundle: w.Bundle, Policies: w.Policies, Token: w.Token.handle(),
		MintDeadline: w.Deadline.time(), Fence: w.Fence.fence(), Ending: w.Ending, Ended: w.Ended.time(), Outcome: w.Outcome,
		ArgsDigest: w.ArgsDigest, Longest: w.Longest, Sealed: w.Sealed, Collected: w.Collected.time(), Held: w.Held,
		NothingMade: w.Nothing, Counted: w.Counted, DelegationToken: w.Shared.handle()}
	if w.Path != "" {
		if g.Path, err = broker.ParseVaultPath(w.Path); err != nil {
			return g, err
		}
	}
	if g.Caller, err = idOf(w.Caller); err != nil {
		return g, err
	}
	if g.Collector, err = idOf(w.Collector); err != nil {
		return g, err
	}
	if g.Narrowing > broker.NarrowNative {
		return g, fmt.Errorf("narrowing %d is not known", g.Narrowing)
	}
	if w.Args != nil {
		g.Args = args.Trusted(w.Args)
		if digest := g.Args.Digest(); g.ArgsDigest != "" && g.ArgsDigest != hex.EncodeToString(digest[:]) {
			return g, errors.New("the arguments are not those of their digest")
		}
	}
	if l := w.Lease; l != nil {
		g.Lease = broker.Lease{ID: l.ID, Ref: l.Ref, Expires: l.Expires.time(), Outlives: l.Outlives.time(),
			Digests: l.Digests, Request: l.Request}
	}
	for _, e := range w.Evidence {
		g.Evidence = append(g.Evidence, broker.Evidence{At: e.At.time(), Check: e.Check, Outcome: e.Outcome,
			Answer: e.Answer, Listed: e.Listed, Final: e.Final})
	}
	return g, nil
}

type wireRevocation struct {
	ID        broker.RevocationID `cbor:"1,keyasint"`
	Selector  string              `cbor:"2,keyasint"`
	Reason    string              `cbor:"3,keyasint"`
	By        string              `cbor:"4,keyasint"`
	Freeze    bool                `cbor:"5,keyasint,omitempty"`
	Lifted    bool                `cbor:"6,keyasint,omitempty"`
	Unfreezer string              `cbor:"7,keyasint,omitempty"`
	Chain     broker.ChainID      `cbor:"8,keyasint,omitempty"`
	Node      broker.DelegationID `cbor:"9,keyasint,omitempty"`
	Grant     broker.GrantID      `cbor:"10,keyasint,omitempty"`
	Asked     stamp               `cbor:"11,keyasint"`
	Fenced    stamp               `cbor:"12,keyasint"`
	Revision  broker.Revision     `cbor:"13,keyasint"`
	Settled   stamp               `cbor:"14,keyasint,omitempty"`
	Closure   broker.Closure      `cbor:"15,keyasint"`
	Nothing   bool                `cbor:"16,keyasint,omitempty"`
	Grants    int                 `cbor:"17,keyasint"`
	Dead      int                 `cbor:"18,keyasint,omitempty"`
	Alive     int                 `cbor:"19,keyasint,omitempty"`
	Unknown   int                 `cbor:"20,keyasint,omitempty"`
	Static    int                 `cbor:"21,keyasint,omitempty"`
	Tokens    int                 `cbor:"22,keyasint,omitempty"`
	Unswept   bool                `cbor:"23,keyasint,omitempty"`
	LatestEnd stamp               `cbor:"24,keyasint,omitempty"`
	Alone     string              `cbor:"25,keyasint,omitempty"`
	Uncounted bool                `cbor:"26,keyasint,omitempty"`
	Leases    int                 `cbor:"27,keyasint,omitempty"`
}

// counted reads the number of grants. Older builds wrote -1 before the first count.
func counted(grants int, uncounted bool) (int, bool) { return max(grants, 0), uncounted || grants < 0 }

func revocationWire(rv broker.Revocation) wireRevocation {
	return wireRevocation{rv.ID, rv.Selector, rv.Reason, rv.By, rv.Freeze, rv.Lifted, rv.Unfreezer, rv.Chain, rv.Node,
		rv.Grant, stampOf(rv.Asked), stampOf(rv.Fenced), rv.Revision, stampOf(rv.Settled), rv.Closure, rv.Nothing,
		rv.Grants, rv.Dead, rv.Alive, rv.Unknown, rv.Static, rv.Tokens, rv.Unswept, stampOf(rv.LatestEnd), rv.LiftedAlone, rv.Uncounted,
		rv.Leases}
}

func (w wireRevocation) revocation() broker.Revocation {
	grants, uncounted := counted(w.Grants, w.Uncounted)
	return broker.Revocation{ID: w.ID, Selector: w.Selector, Reason: w.Reason, By: w.By, Freeze: w.Freeze,
		Lifted: w.Lifted, Unfreezer: w.Unfreezer, Chain: w.Chain, Node: w.Node, Grant: w.Grant, Asked: w.Asked.time(),
		Fenced: w.Fenced.time(), Revision: w.Revision, Settled: w.Settled.time(), Closure: w.Closure,
		Nothing: w.Nothing, Grants: grants, Uncounted: uncounted, LiftedAlone: w.Alone, Dead: w.Dead, Alive: w.Alive, Unknown: w.Unknown, Static: w.Static,
		Tokens: w.Tokens, Unswept: w.Unswept, LatestEnd: w.LatestEnd.time(), Leases: w.Leases}
}

type wireTally struct {
	Tool    broker.ToolName `cbor:"1,keyasint,omitempty"`
	Buckets []wireBucket    `cbor:"2,keyasint,omitempty"`
	Last    stamp           `cbor:"3,keyasint"`
}

type wireBucket struct {
	_       struct{} `cbor:",toarray"`
	First   stamp
	Minutes int
	Count   int
}

func tallyWire(t Tally) wireTally {
	w := wireTally{Tool: t.Tool, Last: stampOf(t.Last)}
	for _, b := range t.Buckets {
		w.Buckets = append(w.Buckets, wireBucket{First: stampOf(b.First), Minutes: b.Minutes, Count: b.Count})
	}
	return w
}

func (w *wireTally) tally() Tally {
	t := Tally{Tool: w.Tool, Last: w.Last.time()}
	for _, b := range w.Buckets {
		t.Buckets = append(t.Buckets, Bucket{First: b.First.time(), Minutes: b.Minutes, Count: b.Count})
	}
	return t
}

type wireRule struct {
	Fence    wireFence `cbor:"1,keyasint"`
	Selector string    `cbor:"2,keyasint"`
}

type wireCanary struct {
	ID      broker.CanaryID `cbor:"1,keyasint"`
	Chain   broker.ChainID  `cbor:"2,keyasint,omitempty"`
	Note    string          `cbor:"3,keyasint,omitempty"`
	By      string          `cbor:"4,keyasint"`
	Planted stamp           `cbor:"5,keyasint"`
	Touched stamp           `cbor:"6,keyasint,omitempty"`
	Touches int             `cbor:"7,keyasint,omitempty"`
}

type wireBundle struct {
	Name    string `cbor:"1,keyasint"`
	Version int64  `cbor:"2,keyasint"`
	Digest  string `cbor:"3,keyasint"`
	Since   stamp  `cbor:"4,keyasint"`
	By      string `cbor:"5,keyasint"`
}

type wireAcknowledged struct {
	At stamp `cbor:"1,keyasint"`
}

type wireCursor struct {
	Revision broker.Revision `cbor:"1,keyasint"`
}
