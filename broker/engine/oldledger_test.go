package engine_test

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/selector"
	"github.com/pawlsec/pawl/store/bolt"
)

// TestOldLedger opens each ledger that an earlier build left when its process died. The engine must give the answers
// that are stored with it, and verify its audit log. After Resume it must end every grant that must end, and close the
// revocations that were under way. It must refuse fenced steps, and issue under open chains.
func TestOldLedger(t *testing.T) {
	kept, err := filepath.Glob("testdata/ledger-*.json")
	if err != nil || len(kept) == 0 {
		t.Fatalf("there is no old ledger in testdata (%v)", err)
	}
	for _, name := range kept {
		t.Run(filepath.Base(name), func(t *testing.T) {
			d, path := unpack(t, name)
			synctest.Test(t, func(t *testing.T) { checkOldLedger(t, d, path) })
			synctest.Test(t, func(t *testing.T) {
				for _, difference := range differences(d.After.Silent, revive(t, d, path).silent(d)) {
					t.Errorf("missed heartbeats: %s", difference)
				}
			})
		})
	}
}

// unpack reads the answers and writes their ledger to a temporary file.
func unpack(t *testing.T, name string) (*oldData, string) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var d oldData
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	packed, err := os.ReadFile(strings.TrimSuffix(name, ".json") + ".db.gz")
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(z)
	path := filepath.Join(t.TempDir(), "old.db")
	if err := errors.Join(err, os.WriteFile(path, raw, 0o600)); err != nil {
		t.Fatal(err)
	}
	return &d, path
}

func checkOldLedger(t *testing.T, d *oldData, path string) {
	w := revive(t, d, path)
	w.must(w.ledger.Verify(ctx))
	w.checkLog(d)
	for _, difference := range differences(d.Answers, w.answers(d.Answers)) {
		t.Error(difference)
	}
	if t.Failed() {
		t.FailNow()
	}
	w.must(w.Resume(ctx))
	pass(reconciled)
	after := w.after(d)
	after.Silent = d.After.Silent
	d.giveBack()
	for _, difference := range differences(d.After, after) {
		t.Errorf("after Resume, %s", difference)
	}
	w.checkEndings(d)
	w.checkOpen(d)
	w.checkKeys(d)
	w.checkFreezes(d)
	w.checkRules(d)
	w.checkAcknowledgements(d)
	w.checkBundle()
	w.checkCanary(d)
	w.checkSweep(d)
	pass(time.Hour)
	w.checkReopened(d)
}

// giveBack takes the steps for which nothing was made off the history after Resume. The build that wrote the ledger
// counted them for good.
func (d *oldData) giveBack() {
	for _, c := range d.Answers.Chains {
		for _, g := range c.Grants {
			if p, ok := d.After.History[c.ID][g.Tool]; ok && g.State == string(broker.StateIntent) {
				p.Count--
				d.After.History[c.ID][g.Tool] = p
			}
		}
	}
}

// checkLog verifies the audit log with the checkpoint that was signed when the process died, as pawl audit verify does.
// More entries may follow.
func (w *oldWorld) checkLog(d *oldData) {
	w.t.Helper()
	entries := w.entries(0)
	if len(entries) < int(d.Log.Head) {
		w.t.Fatalf("the log has %d entries, want the %d of the old process", len(entries), d.Log.Head)
	}
	entries = entries[:d.Log.Head]
	ops := map[string]int{}
	for _, e := range entries {
		ops[string(e.Op)]++
	}
	root := rootOf(w.t, entries)
	for _, difference := range differences(d.Log.Ops, ops) {
		w.t.Errorf("entries of op %s", difference)
	}
	verifier, err := note.NewVerifier(d.Log.Verifier)
	w.must(err)
	signed, err := note.Open([]byte(d.Log.Checkpoint), note.VerifierList(verifier))
	w.must(err)
	want := fmt.Sprintf("%s\n%d\n%s\n", verifier.Name(), d.Log.Head, root)
	if signed.Text != want || root.String() != d.Log.Root {
		w.t.Errorf("the first %d entries of the log have the root %s, want that of the checkpoint:\n%s",
			d.Log.Head, root, signed.Text)
	}
}

// grant reads a grant of the old ledger.
func (w *oldWorld) grant(d *oldData, id string) broker.Grant {
	w.t.Helper()
	for _, c := range d.Answers.Chains {
		for _, g := range c.Grants {
			if g.ID != id {
				continue
			}
			v, err := w.Chain(ctx, broker.ChainID(c.ID))
			w.must(err)
			i := slices.IndexFunc(v.Grants, func(g broker.Grant) bool { return string(g.ID) == id })
			return v.Grants[i]
		}
	}
	w.t.Fatalf("there is no grant %s", id)
	return broker.Grant{}
}

// checkEndings holds that every grant that the old process was issuing or ending is CLOSED and dead. Every revocation
// that had not settled is CLOSED. A secret that was handed out, and is neither fenced nor expired, stays alive.
func (w *oldWorld) checkEndings(d *oldData) {
	w.t.Helper()
	abandoned, kept, reconciled := 0, 0, 0
	for _, c := range d.Answers.Chains {
		for _, old := range c.Grants {
			if old.State == string(broker.StateClosed) {
				continue
			}
			g := w.grant(d, old.ID)
			alive := slices.Contains(w.target.Alive(), g.ID)
			if old.Active {
				kept++
				if g.State != broker.StateIssued || !alive && g.Backend != "signer" {
					w.t.Errorf("grant %s, which was active, is %s (%s), at the target: %v; want it ISSUED and alive",
						g.ID, g.State, g.Ending, alive)
				}
				continue
			}
			abandoned++
			if g.State != broker.StateClosed || g.Outcome != broker.OutcomeDead || g.Ending == "" || alive {
				w.t.Errorf("grant %s, which was %s (%s), is %s (%s, %q), at the target: %v; want it closed and dead",
					g.ID, old.State, old.Ending, g.State, g.Ending, g.Outcome, alive)
			}
		}
	}
	for _, old := range d.Answers.Revocations {
		if old.Freeze || !old.Settled.IsZero() {
			continue
		}
		reconciled++
		rv, err := w.Revocation(ctx, broker.RevocationID(old.ID))
		w.must(err)
		if rv.Closure != broker.ClosureClosed || rv.Settled.IsZero() || rv.Dead != rv.Grants || rv.Dead == 0 {
			w.t.Errorf("revocation %s (%s) = %+v, want CLOSED", old.ID, old.Reason, rv)
		}
	}
	if abandoned < 8 || kept < 8 || reconciled < 5 {
		w.t.Errorf("the ledger has %d abandoned and %d active grants and %d revocations under way; want 8, 8 and 5",
			abandoned, kept, reconciled)
	}
}

// checkOpen issues, delegates and closes under the open chain.
func (w *oldWorld) checkOpen(d *oldData) {
	w.t.Helper()
	root := w.delegation(d, d.Cases["open"])
	got, err := w.Issue(ctx, holderOf(root), step(root, "db.read"))
	if w.must(err); !w.target.Login(got.Secret.Reveal()) {
		w.t.Error("the secret of a new step does not work")
	}
	child, err := w.Delegate(ctx, holderOf(root), broker.DelegateRequest{From: root.ID, To: agent("new"),
		Rights: use("db.read")})
	w.must(err)
	_, err = w.Issue(ctx, holderOf(child), step(child, "db.read"))
	w.must(err)
	closed, err := w.Close(ctx, holderOf(root), got.Grant.ID)
	if w.must(err); closed.State != broker.StateClosed || w.target.Login(got.Secret.Reveal()) {
		w.t.Errorf("Close = %+v, want CLOSED and a secret that is dead", closed)
	}
	spent := w.delegation(d, d.Cases["spent"])
	r := step(spent, "db.read")
	r.Args = table("orders")
	_, err = w.Issue(ctx, holderOf(spent), r)
	refused(w.t, "Issue over the budget", err, broker.Denied, broker.CodeBudgetExhausted)
	r.Args = table("users")
	_, err = w.Issue(ctx, holderOf(spent), r)
	refused(w.t, "Issue outside the constraint", err, broker.Denied, broker.CodeArgumentOutside)
	_, _, err = w.Collect(ctx, named(agent("driver")), broker.GrantID(d.Cases["uncollected"]))
	refused(w.t, "Collect of a secret that was in memory only", err, broker.Expired, broker.CodeDeliveryLost)
	_, _, err = w.Collect(ctx, named(agent("courier")), broker.GrantID(d.Cases["collected"]))
	refused(w.t, "Collect again", err, broker.Conflict, broker.CodeAlreadyCollected)
}

// checkKeys holds that Issue with a used idempotency key returns the key's grant, live or closed.
func (w *oldWorld) checkKeys(d *oldData) {
	w.t.Helper()
	for _, row := range []struct {
		key, delegation, grant string
		tool                   broker.ToolName
	}{{usedKey, "open", "used key", "db.read"}, {closedKey, "writer", "closed key", "db.write"}} {
		holder := w.delegation(d, d.Cases[row.delegation])
		r := broker.StepRequest{Delegation: holder.ID, Tool: row.tool, Args: table("orders"), Key: row.key}
		got, err := w.Issue(ctx, holderOf(holder), r)
		if w.must(err); !got.Repeated || string(got.Grant.ID) != d.Cases[row.grant] || !got.Secret.Empty() {
			w.t.Errorf("Issue with key %q = %+v, want grant %s, repeated and without a secret", row.key, got,
				d.Cases[row.grant])
		}
		r.Args = args.Args{}
		_, err = w.Issue(ctx, holderOf(holder), r)
		refused(w.t, "Issue with a used key and other arguments", err, broker.Conflict, broker.CodeKeyOtherArguments)
	}
}

// checkFreezes holds that each freeze is in force until a second person lifts it. For one freeze the first person asked
// before the process died.
func (w *oldWorld) checkFreezes(d *oldData) {
	w.t.Helper()
	for _, row := range []struct {
		delegation, freeze string
		asked              bool // by the first person, before
	}{{"frozen", "freeze", true}, {"visitor", "freeze by rule", false}} {
		holder, id := w.delegation(d, d.Cases[row.delegation]), broker.RevocationID(d.Cases[row.freeze])
		tool := holder.Scope[0].Tool
		_, err := w.Issue(ctx, holderOf(holder), step(holder, tool))
		refused(w.t, "Issue while frozen", err, broker.Revoked, broker.CodeFrozen)
		if !row.asked {
			_, err = w.Unfreeze(ctx, responder, id)
			refused(w.t, "Unfreeze by the first person", err, broker.Denied, broker.CodeSecondPerson)
		}
		rv, err := w.Unfreeze(ctx, second, id)
		if w.must(err); !rv.Lifted || rv.Unfreezer != responder.Name {
			w.t.Errorf("Unfreeze = %+v, want it lifted, and first asked for by %s", rv, responder.Name)
		}
		_, err = w.Issue(ctx, holderOf(holder), step(holder, tool))
		w.must(err)
	}
	frozen := w.delegation(d, d.Cases["frozen"])
	_, err := w.Issue(ctx, holderOf(frozen), step(frozen, "db.read"))
	refused(w.t, "Issue of a third live step", err, broker.Denied, broker.CodeBudgetExhausted)
	for _, name := range []string{"unborn", "thief"} {
		_, err := w.Open(ctx, named(agent(name)), broker.OpenRequest{Task: "a freeze that covers later chains",
			Rights: use("db.read")})
		if got, want := codeOf(err), "revoked frozen "+d.ruleOf("spiffe:spiffe://example.org/"+name); got != want {
			w.t.Errorf("Open by %s = %q, want %q", name, got, want)
		}
	}
}

// checkRules holds that a final rule over a tool fences that tool under the chains that were open. Other tools and
// later chains are not fenced.
func (w *oldWorld) checkRules(d *oldData) {
	w.t.Helper()
	root := w.delegation(d, d.Cases["ruled"])
	for _, tool := range []broker.ToolName{"deploy", "db.write"} {
		_, err := w.Issue(ctx, holderOf(root), step(root, tool))
		want := "revoked fenced " + d.ruleOf("tool:"+string(tool)+" and label.env:test")
		if got := codeOf(err); got != want {
			w.t.Errorf("Issue with %s = %q, want %q", tool, got, want)
		}
	}
	_, err := w.Issue(ctx, holderOf(root), step(root, "db.read"))
	w.must(err)
	later, err := w.Open(ctx, holderOf(root), broker.OpenRequest{Task: "a later chain", Rights: use("deploy"),
		Labels: map[string]string{"env": "test"}})
	w.must(err)
	_, err = w.Issue(ctx, holderOf(root), step(later, "deploy"))
	w.must(err)
}

// ruleOf returns the id of the revocation with a selector.
func (d *oldData) ruleOf(selector string) string {
	for _, rv := range d.Answers.Revocations {
		if rv.Selector == selector {
			return rv.ID
		}
	}
	return "none"
}

// checkAcknowledgements holds that a holder can still acknowledge a settled revocation. Earlier acknowledgements keep
// their time.
func (w *oldWorld) checkAcknowledgements(d *oldData) {
	w.t.Helper()
	id := broker.RevocationID(d.Cases["settled"])
	for _, name := range []string{"acknowledged", "unacknowledged"} {
		holder := w.delegation(d, d.Cases[name])
		w.must(w.Acknowledge(ctx, holderOf(holder), holder.ID, id))
	}
	list, err := w.Acknowledgements(ctx, id)
	w.must(err)
	for _, a := range list {
		old := string(a.Delegation) == d.Cases["acknowledged"]
		now := string(a.Delegation) == d.Cases["unacknowledged"]
		if a.At.IsZero() == (old || now) || old && !a.At.Before(d.Died) || now && a.At.Before(d.Died) {
			w.t.Errorf("acknowledgement = %+v; want one from before the old process died, and one from now", a)
		}
	}
	fenced := w.delegation(d, d.Cases["revoked"])
	_, err = w.Issue(ctx, holderOf(fenced), step(fenced, "db.read"))
	refused(w.t, "Issue under a fence", err, broker.Revoked, broker.CodeFenced)
	again := selector.Request{Selector: selecting(w.t, "subtree:%s", fenced.ID), Reason: "again"}
	rv, err := w.Revoke(ctx, responder, again)
	if w.must(err); rv.ID != id || !rv.Repeated {
		w.t.Errorf("the repeated Revoke = %+v, want the existing %s", rv, id)
	}
}

// checkBundle holds that the ledger knows the bundle in force. Adopt refuses an older version, other content of the
// same version, and another bundle.
func (w *oldWorld) checkBundle() {
	w.t.Helper()
	last := w.entries(0)
	w.must(w.Adopt(ctx, broker.Adoption{Name: "shop", Version: 7, Digest: w.policy.Digest()}))
	if more := w.entries(uint64(len(last))); len(more) > 0 {
		w.t.Errorf("Adopt of the bundle in force appended %+v, want no entry", more)
	}
	for _, a := range []broker.Adoption{
		{Name: "shop", Version: 6, Digest: "sha256:06"},
		{Name: "shop", Version: 7, Digest: "sha256:07"},
		{Name: "mart", Version: 9, Digest: "sha256:09"},
	} {
		refused(w.t, fmt.Sprintf("Adopt(%+v)", a), w.Adopt(ctx, a), broker.Conflict, broker.CodePolicyOlder)
	}
	w.must(w.Adopt(ctx, broker.Adoption{Name: "shop", Version: 8, Digest: "sha256:08"}))
}

// checkCanary holds that the engine still recognises the canary's value, and records each touch.
func (w *oldWorld) checkCanary(d *oldData) {
	w.t.Helper()
	value, err := hex.DecodeString(d.Canary)
	w.must(err)
	leaked := selector.ForLeaked(string(value))
	_, err = w.Plan(ctx, responder, leaked)
	refused(w.t, "Plan of a canary's value", err, broker.NotFound, broker.CodeCanaryValue)
	_, err = w.Revoke(ctx, responder, selector.Request{Selector: leaked, Reason: "found in a paste"})
	refused(w.t, "Revoke of a canary's value", err, broker.NotFound, broker.CodeCanaryValue)
	w.Present(ctx, named(agent("thief")), string(value))
	synctest.Wait()
	list, err := w.Canaries(ctx)
	w.must(err)
	for _, c := range list {
		if string(c.ID) == d.Cases["canary"] && (c.Touches != 2 || c.Touched.Before(d.Died)) {
			w.t.Errorf("canary = %+v, want 2 touches, the last just now", c)
		}
	}
	c, err := w.Pull(ctx, responder, broker.CanaryID(d.Cases["canary"]))
	if w.must(err); string(c.Chain) != d.Cases["canary chain"] {
		w.t.Errorf("Pull = %+v, want the canary of chain %s", c, d.Cases["canary chain"])
	}
}

// checkSweep holds that a sweep ends the orphaned leases and logins, and no others.
func (w *oldWorld) checkSweep(d *oldData) {
	w.t.Helper()
	_, err := w.Sweep(ctx)
	w.must(err)
	left := w.vault.LeaseIDs()
	for id, grant := range d.Outside.Leases {
		want := false
		if grant != "" {
			want = w.grant(d, grant).State != broker.StateClosed
		}
		if got := slices.Contains(left, id); got != want {
			w.t.Errorf("after a sweep lease %s of grant %q is in Vault: %v, want %v", id, grant, got, want)
		}
	}
	if slices.Contains(w.target.Alive(), "gr111111111111111111111111") {
		w.t.Error("after a sweep the orphaned login is alive")
	}
}

// checkReopened holds that every secret has ended an hour later. The log still begins with the signed entries, and the
// file opens again.
func (w *oldWorld) checkReopened(d *oldData) {
	w.t.Helper()
	if left := w.vault.LeaseIDs(); len(left) > 0 {
		w.t.Errorf("Vault has the leases %v after every grant has expired, want none", left)
	}
	chains, err := w.Chains(ctx, true)
	w.must(err)
	for _, c := range chains {
		if c.Live > 0 {
			w.t.Errorf("chain %s counts %d live grants after all have expired, want none", c.Chain.ID, c.Live)
		}
	}
	w.must(w.ledger.Verify(ctx))
	w.checkLog(d)
	w.Stop()
	w.must(w.ledger.Close())
	again, err := bolt.Open(bolt.Config{Path: w.path, Reserve: -1})
	w.must(err)
	w.must(again.Close())
}
