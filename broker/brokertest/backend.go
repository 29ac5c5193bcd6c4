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

// Rig is a backend with the means to test it from outside: Vault's part in the lifetime of a secret, and a probe of
// the target that bypasses the backend.
type Rig struct {
	Backend broker.Backend // required; it must revoke and prove, see Backend
	Tool    broker.Tool    // required: one that Load accepts
	Wrong   []broker.Tool  // required: tools that Load refuses, besides the suite's own variants of Tool
	Args    args.Args      // of a step with Tool
	Outside []args.Args    // arguments that Prepare refuses; empty if it accepts all that the engine lets through

	// Mint does the work of the engine and Vault in steps 3 to 6 of issuing (docs/architecture.md). It creates the
	// step's token, executes m once, and writes token and lease into g. Required; safe for concurrent use.
	Mint func(ctx context.Context, g *broker.Grant, m broker.Mint, displayName string) (broker.Secret, error)
	// End does the work of Vault when the step's token is killed, and returns when that is done. Nil: Vault can end
	// nothing here, and the backend must sever.
	End func(ctx context.Context, g broker.Grant) error
	// Works tries a secret at the target, as an agent would. Required.
	Works func(ctx context.Context, g broker.Grant, s broker.Secret) (bool, error)
	// Credentials counts the usable credentials at the target. Required.
	Credentials func(context.Context) (int, error)
}

// Backend is the suite that every backend must pass. It fails a backend that cannot prove, and one that nothing can
// revoke. It also fails one that reports a secret as dead while Rig.Works succeeds with it.
func Backend(t *testing.T, r Rig) {
	for _, c := range backendChecks {
		t.Run(c.name, func(t *testing.T) {
			for _, fault := range r.check(t.Context(), c.run) {
				t.Error(fault)
			}
		})
	}
}

// CheckBackend is [Backend] outside a test. It returns nil for a backend that passes, otherwise an error that names
// every failed check and its faults.
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
	{"loads its tool and refuses invalid ones", (*trial).load},
	{"prepares without creating anything", (*trial).prepare},
	{"accepts only answers with a secret", (*trial).finish},
	{"a secret's lifetime", (*trial).life},
	{"severs one and leaves the other", (*trial).neighbour},
	{"a lost answer", (*trial).lost},
	{"grants without a secret", (*trial).unknown},
	{"finds live grants", (*trial).find},
	{"many at once", (*trial).crowd},
	{"a cancelled context", (*trial).cancelled},
}

// trial is one check of a rig. It collects faults. An error ends the check.
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

// live is a grant with a minted secret.
type live struct {
	broker.Grant
	secret broker.Secret
}

var backendIDs = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// grant returns a new grant, valid for five minutes, for which nothing has happened yet.
func (t *trial) grant() broker.Grant {
	var raw [15]byte
	_, _ = rand.Read(raw[:]) // never fails
	now := time.Now()
	return broker.Grant{
		ID: broker.GrantID("gr" + backendIDs.EncodeToString(raw[:])), Chain: "ch000000000000000000000000",
		Delegation: "dl000000000000000000000000", Caller: spiffeid.RequireFromString("spiffe://example.org/kit"),
		Tool: t.Tool.Name, Backend: t.Tool.Backend, Narrowing: t.Tool.Narrowing, Args: t.Args, Path: t.Tool.Path,
		State: broker.StateIntent, Created: now, Expires: now.Add(5 * time.Minute).Truncate(time.Second),
	}
}

// mint mints a secret for a new grant and checks that it works.
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
		return fmt.Errorf("the target accepts the secret: %v, want %v", got, want)
	}
	return nil
}

// revoke does the work of a revocation. It severs if the backend can, which must be enough. Otherwise it lets Vault
// end the secret.
func (t *trial) revoke(grants ...broker.Grant) error {
	if s, ok := t.Backend.(broker.Severer); ok {
		if err := s.Sever(t.ctx, grants); err != nil {
			return fmt.Errorf("Sever = %w", err)
		}
		return nil
	}
	if t.End == nil {
		return errors.New("there is no way to revoke: the backend does not sever, and Vault ends nothing")
	}
	for _, g := range grants {
		if err := t.End(t.ctx, g); err != nil {
			return fmt.Errorf("the rig's End = %w", err)
		}
	}
	return nil
}

// end removes everything from the target that the check created.
func (t *trial) end(list ...live) {
	var grants []broker.Grant
	for _, l := range list {
		grants = append(grants, l.Grant)
	}
	err := t.revoke(grants...)
	for _, g := range grants {
		if t.End != nil {
			err = errors.Join(err, t.End(t.ctx, g))
		}
	}
	if err != nil {
		t.errorf("cleaning up after the check: %v", err)
	}
}

// prove calls the backend and checks the form of its answers: one evidence for each grant, with texts and without a
// secret.
func (t *trial) prove(ctx context.Context, list ...live) ([]broker.Evidence, error) {
	p, ok := t.Backend.(broker.Prover)
	if !ok {
		return nil, errors.New("the backend cannot prove, so no grant could ever be proven dead")
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
		return nil, fmt.Errorf("Prove returned %d answers for %d grants", len(found), len(list))
	}
	for i, e := range found {
		if e.Check == "" || e.Answer == "" {
			t.errorf("Prove returned an empty Check or Answer: %q, %q", e.Check, e.Answer)
		}
		if e.Final && e.Outcome != broker.OutcomeDead {
			t.errorf("Prove returned a final %q: only a dead secret stays what it is", e.Outcome)
		}
		if leaks(list[i], e.Check+" "+e.Answer+" "+list[i].Lease.Ref) {
			t.errorf("the texts of Prove, or the lease's Ref, contain a part of the secret")
		}
	}
	return found, nil
}

// proven requires an outcome from the backend and checks it at the target. A backend that reports a working secret as
// dead lies, whatever the wanted outcome.
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
				return fmt.Errorf("the backend lies: it reports %q (%s), but the target accepts the secret", e.Outcome, e.Answer)
			}
		}
		if e.Outcome != want {
			t.errorf("Prove reports %q (%s), want %q", e.Outcome, e.Answer, want)
		}
	}
	return nil
}
