package brokertest

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// leaks reports whether text contains a member of the secret. The backend's name for the secret may be one: the name
// of a login is not secret.
func leaks(l live, text string) bool {
	var members map[string]any
	if json.Unmarshal(l.secret.Reveal(), &members) != nil {
		return false
	}
	for _, v := range members {
		s, ok := v.(string)
		if ok && len(s) >= 8 && s != l.Lease.Ref && s != string(l.ID) && strings.Contains(text, s) {
			return true
		}
	}
	return false
}

// invalidTools derives tools from a good one that no backend may accept: no path, and a setting without effect.
func invalidTools(good broker.Tool) (tools []broker.Tool) {
	t := good
	t.Path = broker.VaultPath{}
	tools = append(tools, t)
	t = good
	t.Settings = maps.Clone(good.Settings)
	if t.Settings == nil {
		t.Settings = map[string]string{}
	}
	t.Settings["no-such-setting"] = "x"
	return append(tools, t)
}

func (t *trial) load() error {
	if err := t.Backend.Load(t.Tool); err != nil {
		return fmt.Errorf("Load of the rig's tool = %w", err)
	}
	for _, bad := range slices.Concat(invalidTools(t.Tool), t.Wrong) {
		if t.Backend.Load(bad) == nil {
			t.errorf("Load accepted a tool with path %q, settings %q and label %s", bad.Path, bad.Settings, bad.Narrowing)
		}
	}
	return nil
}

func (t *trial) prepare() error {
	before, err := t.Credentials(t.ctx)
	if err != nil {
		return fmt.Errorf("the rig's Credentials = %w", err)
	}
	g := t.grant()
	for range 2 { // Prepare may be repeated
		m, name, err := t.Backend.Prepare(t.ctx, t.Tool, g)
		if err != nil {
			return fmt.Errorf("Prepare = %w", err)
		}
		t.checkPrepared(g, m, name)
	}
	for _, args := range t.Outside {
		g := t.grant()
		g.Args = args
		if _, _, err := t.Backend.Prepare(t.ctx, t.Tool, g); err == nil {
			t.errorf("Prepare accepted the arguments %s", args.Canonical())
		}
	}
	after, err := t.Credentials(t.ctx)
	if err != nil {
		return fmt.Errorf("the rig's Credentials = %w", err)
	}
	if after != before {
		t.errorf("Prepare created %d credentials: only Vault creates one, after the ledger has recorded the step's token", after-before)
	}
	return nil
}

// checkPrepared checks the results of Prepare.
func (t *trial) checkPrepared(g broker.Grant, m broker.Mint, name string) {
	if m.Path.IsZero() {
		t.errorf("Prepare returned no path")
	}
	if m.Finish == nil {
		t.errorf("Prepare returned no Finish")
	}
	if left := time.Until(g.Expires); m.TTL <= 0 || m.TTL > left+2*time.Second {
		t.errorf("Prepare allows a secret that lives %v, want at most the %v that the grant has left", m.TTL, left)
	}
	plain := strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") == ""
	if !strings.HasPrefix(name, string(g.ID)) || len(name) > 100 || !plain {
		t.errorf("Prepare returned the display name %q, want one that begins with the grant's id: at most 100 letters, digits and hyphens", name)
	}
}

func (t *trial) finish() error {
	g := t.grant()
	m, _, err := t.Backend.Prepare(t.ctx, t.Tool, g)
	if err != nil || m.Finish == nil {
		return fmt.Errorf("Prepare = %w", err)
	}
	for _, answer := range []map[string]any{nil, {}, {"no-such-field": "x"}} {
		if f, err := m.Finish(answer, time.Time{}); err == nil && !f.Secret.Empty() {
			t.errorf("Finish made a secret from %v", answer)
		}
	}
	return nil
}

func (t *trial) life() error {
	l, err := t.mint()
	if err != nil {
		return err
	}
	if err := t.proven(broker.OutcomeAlive, l); err != nil {
		return err
	}
	for range 2 { // revoking may be repeated
		if err := t.revoke(l.Grant); err != nil {
			return err
		}
		if err := t.proven(broker.OutcomeDead, l); err != nil {
			return err
		}
		if err := t.works(l.Grant, l.secret, false); err != nil {
			return err
		}
	}
	t.end(l)
	return t.proven(broker.OutcomeDead, l)
}

func (t *trial) neighbour() error {
	one, err := t.mint()
	if err != nil {
		return err
	}
	other, err := t.mint()
	if err != nil {
		return err
	}
	defer t.end(one, other)
	if err := t.revoke(one.Grant); err != nil {
		return err
	}
	if err := t.works(other.Grant, other.secret, true); err != nil {
		return err
	}
	for _, order := range [][]live{{one, other}, {other, one}} {
		found, err := t.prove(t.ctx, order...)
		if err != nil {
			return err
		}
		for i, e := range found {
			want := broker.OutcomeAlive
			if order[i].ID == one.ID {
				want = broker.OutcomeDead
			}
			if e.Outcome != want {
				t.errorf("Prove of two, answer %d = %q (%s), want %q", i+1, e.Outcome, e.Answer, want)
			}
		}
	}
	return nil
}

// lost is a mint with a lost answer: the ledger has the token, but no lease.
func (t *trial) lost() error {
	l, err := t.mint()
	if err != nil {
		return err
	}
	l.State, l.Lease = broker.StateHandle, broker.Lease{}
	defer t.end(l)
	found, err := t.prove(t.ctx, l)
	if err != nil {
		return err
	}
	if found[0].Outcome == broker.OutcomeDead {
		t.errorf("the backend lies: Prove reports %q (%s) for a secret with a lost answer, but the target accepts it", found[0].Outcome, found[0].Answer)
	}
	if err := t.revoke(l.Grant); err != nil {
		return err
	}
	if t.End != nil {
		if err := t.End(t.ctx, l.Grant); err != nil {
			return fmt.Errorf("the rig's End = %w", err)
		}
	}
	if err := t.works(l.Grant, l.secret, false); err != nil {
		return err
	}
	if found, err = t.prove(t.ctx, l); err != nil {
		return err
	}
	if found[0].Outcome == broker.OutcomeAlive {
		t.errorf("Prove reports %q (%s) for a revoked secret, want dead or unknown", found[0].Outcome, found[0].Answer)
	}
	return nil
}

func (t *trial) unknown() error {
	nothing := live{Grant: t.grant()}
	if err := t.revoke(nothing.Grant); err != nil {
		return err
	}
	found, err := t.prove(t.ctx, nothing)
	if err != nil {
		return err
	}
	if found[0].Outcome == broker.OutcomeAlive {
		t.errorf("Prove reports %q (%s) for a secret that was never minted", found[0].Outcome, found[0].Answer)
	}
	if err := t.revoke(); err != nil {
		return err
	}
	_, err = t.prove(t.ctx)
	return err
}

func (t *trial) find() error {
	f, ok := t.Backend.(broker.Finder)
	if !ok {
		return nil
	}
	l, err := t.mint()
	if err != nil {
		return err
	}
	defer t.end(l)
	ids, err := f.Find(t.ctx)
	if err != nil {
		return fmt.Errorf("Find = %w", err)
	}
	if !slices.Contains(ids, l.ID) {
		t.errorf("Find does not list a grant with a live secret")
	}
	return nil
}

// crowd revokes a dozen grants in two calls, while others are prepared and proven.
func (t *trial) crowd() error {
	list := make([]live, 12)
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i := range list {
		wg.Go(func() { list[i], errs[i] = t.mint() })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	grants := make([]broker.Grant, len(list))
	for i, l := range list {
		grants[i] = l.Grant
	}
	half := len(list) / 2
	p, ok := t.Backend.(broker.Prover)
	if !ok {
		return fmt.Errorf("the backend cannot prove")
	}
	wg.Go(func() { errs[0] = t.revoke(grants[:half]...) })
	wg.Go(func() { errs[1] = t.revoke(grants[half:]...) })
	wg.Go(func() { _, errs[2] = p.Prove(t.ctx, grants) })
	wg.Go(func() { _, _, errs[3] = t.Backend.Prepare(t.ctx, t.Tool, t.grant()) })
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	err := t.proven(broker.OutcomeDead, list...)
	t.end(list...)
	return err
}

// cancelled calls Prove with a cancelled context. An error is acceptable, a wrong answer is not.
func (t *trial) cancelled() error {
	l, err := t.mint()
	if err != nil {
		return err
	}
	defer t.end(l)
	ctx, cancel := context.WithCancel(t.ctx)
	cancel()
	if found, err := t.prove(ctx, l); err == nil && found[0].Outcome == broker.OutcomeDead {
		t.errorf("Prove with a cancelled context reports %q (%s) for a working secret", found[0].Outcome, found[0].Answer)
	}
	return nil
}
