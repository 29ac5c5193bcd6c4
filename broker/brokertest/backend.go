package brokertest

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// Rig is a backend with what the suite needs to judge it from outside: Vault's part of a secret's
// life, and a probe of the target that does not go through the backend.
type Rig struct {
	Backend broker.Backend // required; revoke and proof are part of it: see Backend
	Tool    broker.Tool    // required: one that Load takes
	Wrong   []broker.Tool  // required: tools that Load refuses, besides those that the suite makes of Tool
	Args    args.Args      // of a step with Tool
	Outside []args.Args    // arguments that Prepare refuses; empty when it takes whatever the engine lets through

	// Mint does what the engine and Vault do from step 3 to step 6: make the step's token, carry
	// out m, once, and write token and lease into g. Required; safe for concurrent use.
	Mint func(ctx context.Context, g *broker.Grant, m broker.Mint, displayName string) (broker.Secret, error)
	// End does what Vault does when the step's token is killed, and returns when it is done. Nil:
	// Vault can end nothing here, and the backend must sever.
	End func(ctx context.Context, g broker.Grant) error
	// Works tries a secret at the target, as an agent would. Required.
	Works func(ctx context.Context, g broker.Grant, s broker.Secret) (bool, error)
	// Credentials counts what exists at the target that somebody could use. Required.
	Credentials func(context.Context) (int, error)
}

// Backend is the suite that every backend must pass. A backend that cannot prove fails it, and so
// does one that nothing can revoke, or one that calls dead what Rig.Works still opens.
func Backend(t *testing.T, r Rig) {
	for _, c := range backendChecks {
		t.Run(c.name, func(t *testing.T) {
			for _, fault := range r.check(t.Context(), c.run) {
				t.Error(fault)
			}
		})
	}
}

// CheckBackend is [Backend] outside a test: nil for a backend that passes, otherwise an error
// that names every check it fails and how.
func CheckBackend(ctx context.Context, r Rig) error {
	var failed []error
	for _, c := range backendChecks {
		for _, fault := range r.check(ctx, c.run) {
			failed = append(failed, fmt.Errorf("%s: %w", c.name, fault))
		}
	}
	return errors.Join(failed...)
}

var backendChecks = []struct {
	name string
	run  func(*trial) error
}{
	{"loads its tool and refuses nonsense", (*trial).load},
	{"prepares and makes nothing", (*trial).prepare},
	{"takes only answers that hold a secret", (*trial).finish},
	{"a secret's life", (*trial).life},
	{"cuts one and leaves the other", (*trial).neighbour},
	{"an answer that was lost", (*trial).lost},
	{"grants that came to nothing", (*trial).unknown},
	{"finds what is alive", (*trial).find},
	{"many at once", (*trial).crowd},
	{"asked too late", (*trial).cancelled},
}

// trial is one check of a rig. It collects faults; an error ends it.
type trial struct {
	Rig
	ctx    context.Context
	faults []error
}

func (r Rig) check(ctx context.Context, run func(*trial) error) []error {
	if r.Backend == nil || r.Mint == nil || r.Works == nil || r.Credentials == nil || len(r.Wrong) == 0 {
		return []error{errors.New("the rig lacks Backend, Mint, Works, Credentials or Wrong")}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	t := &trial{Rig: r, ctx: ctx}
	if err := run(t); err != nil {
		t.faults = append(t.faults, err)
	}
	return t.faults
}

func (t *trial) errorf(format string, args ...any) {
	t.faults = append(t.faults, fmt.Errorf(format, args...))
}

// live is a grant whose secret was minted.
type live struct {
	broker.Grant
	secret broker.Secret
}

var backendIDs = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// grant is a new one, good for five minutes, for which nothing has happened yet.
func (t *trial) grant() broker.Grant {
	var raw [15]byte
	_, _ = rand.Read(raw[:]) // never fails
	now := time.Now()
	return broker.Grant{
		ID: broker.GrantID("gr" + backendIDs.EncodeToString(raw[:])), Chain: "ch000000000000000000000000",
		Delegation: "dl000000000000000000000000", Caller: spiffeid.RequireFromString("spiffe://example.org/kit"),
		Tool: t.Tool.Name, Backend: t.Tool.Backend, Narrowing: t.Tool.Narrowing, Args: t.Args, Path: joined(t.Tool.Path),
		State: broker.StateIntent, Created: now, Expires: now.Add(5 * time.Minute).Truncate(time.Second),
	}
}

// mint makes a secret for a new grant and sees that it works.
func (t *trial) mint() (live, error) {
	g := t.grant()
	m, name, err := t.Backend.Prepare(t.ctx, t.Tool, g)
	if err != nil {
		return live{}, fmt.Errorf("Prepare = %w", err)
	}
	secret, err := t.Mint(t.ctx, &g, m, name)
	if err != nil {
		return live{}, fmt.Errorf("the rig's Mint = %w", err)
	}
	g.State = broker.StateIssued
	return live{g, secret}, t.works(g, secret, true)
}

func (t *trial) works(g broker.Grant, s broker.Secret, want bool) error {
	got, err := t.Works(t.ctx, g, s)
	if err != nil {
		return fmt.Errorf("the rig's Works = %w", err)
	}
	if got != want {
		return fmt.Errorf("the target takes the secret: %v, want %v", got, want)
	}
	return nil
}

// cut does what revoke does: sever where the backend can, which has to be enough, and otherwise
// let Vault end it.
func (t *trial) cut(grants ...broker.Grant) error {
	if s, ok := t.Backend.(broker.Severer); ok {
		if err := s.Sever(t.ctx, grants); err != nil {
			return fmt.Errorf("Sever = %w", err)
		}
		return nil
	}
	if t.End == nil {
		return errors.New("nothing revokes here: the backend does not sever, and Vault ends nothing")
	}
	for _, g := range grants {
		if err := t.End(t.ctx, g); err != nil {
			return fmt.Errorf("the rig's End = %w", err)
		}
	}
	return nil
}

// end leaves nothing behind at the target.
func (t *trial) end(list ...live) {
	var grants []broker.Grant
	for _, l := range list {
		grants = append(grants, l.Grant)
	}
	err := t.cut(grants...)
	for _, g := range grants {
		if t.End != nil {
			err = errors.Join(err, t.End(t.ctx, g))
		}
	}
	if err != nil {
		t.errorf("ending what the check made: %v", err)
	}
}

// prove asks the backend and checks what does not depend on the truth: one evidence for each,
// with words and without a secret.
func (t *trial) prove(ctx context.Context, list ...live) ([]broker.Evidence, error) {
	p, ok := t.Backend.(broker.Prover)
	if !ok {
		return nil, errors.New("the backend cannot prove: nothing would ever be known to be dead")
	}
	grants := make([]broker.Grant, len(list))
	for i, l := range list {
		grants[i] = l.Grant
	}
	found, err := p.Prove(ctx, grants)
	if err != nil {
		return nil, fmt.Errorf("Prove = %w", err)
	}
	if len(found) != len(list) {
		return nil, fmt.Errorf("Prove gave %d answers for %d grants", len(found), len(list))
	}
	for i, e := range found {
		if e.Check == "" || e.Answer == "" {
			t.errorf("Prove gave no words for what it checked and what was answered: %q, %q", e.Check, e.Answer)
		}
		if tells(list[i], e.Check+" "+e.Answer+" "+list[i].Lease.Ref) {
			t.errorf("Prove's words, or the lease's Ref, hold a part of the secret")
		}
	}
	return found, nil
}

// proven asks the backend for the truth, and the target too: a backend that calls dead what works
// lies, whatever it was asked.
func (t *trial) proven(want broker.Outcome, list ...live) error {
	found, err := t.prove(t.ctx, list...)
	if err != nil {
		return err
	}
	for i, e := range found {
		if e.Outcome == broker.OutcomeDead && !list[i].secret.Empty() {
			open, err := t.Works(t.ctx, list[i].Grant, list[i].secret)
			if err != nil {
				return fmt.Errorf("the rig's Works = %w", err)
			}
			if open {
				return fmt.Errorf("the backend lies: it says %q (%s), and the target takes the secret", e.Outcome, e.Answer)
			}
		}
		if e.Outcome != want {
			t.errorf("Prove says %q (%s), want %q", e.Outcome, e.Answer, want)
		}
	}
	return nil
}
