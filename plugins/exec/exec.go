package exec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Program is one executable file and the way to start it.
type Program struct {
	Path   string   // required: absolute; the file must not need other files beside it
	SHA256 string   // required: its checksum, 64 lower-case hexadecimal digits
	Args   []string // after the program's name; zero: none
	Env    []string // "NAME=value"; zero: the environment is empty
	Dir    string   // working directory, absolute; zero: "/"
}

// Config configures a plugin and its limits.
type Config struct {
	Name    string   // required: the prefix of the plugin's errors and evidence; lower-case letters, digits and hyphens
	Program Program  // required
	Probe   *Program // proves and finds, so that Program does not confirm its own severing; nil: Program does both

	Timeout   time.Duration // from start to exit; zero: 10 seconds
	MaxOutput int           // bytes of standard output, and of standard error; zero: 1 MiB
	Processes int           // concurrent loads and prepares; zero: 8. Sever, Prove and Find never wait for them

	Now func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend], [broker.Severer], [broker.Prover] and [broker.Finder] by
// asking the plugin. Safe for concurrent use.
type Backend struct {
	cfg   Config
	probe Program
	slots chan struct{} // one element for each running load or prepare
}

// New checks the configuration and the programs' checksums. It starts no program.
func New(cfg Config) (*Backend, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	b := &Backend{cfg: cfg, probe: cfg.Program, slots: make(chan struct{}, cfg.Processes)}
	if cfg.Probe != nil {
		b.probe = *cfg.Probe
	}
	for _, p := range []Program{cfg.Program, b.probe} {
		image, err := p.verify()
		if err != nil {
			return nil, fmt.Errorf("exec: %s: %w", cfg.Name, err)
		}
		image.close()
	}
	return b, nil
}

// maxBatch is the limit of grants in one request. It keeps the response within MaxOutput.
const maxBatch = 500

// Load implements [broker.Backend]. The tool's Path is the Vault path of the mint. The broker reads the Settings below.
// The others belong to the plugin, which checks the tool too.
//
//	pawl.mint   "read" (default) or "write": the kind of request to Vault
//	pawl.lease  "required" (default) or "none": whether a response without a lease is refused
//	pawl.ref    the member of Vault's response that names the secret at the target, and is not
//	            secret itself: the ledger keeps it. Empty: none
func (b *Backend) Load(t broker.Tool) error {
	if _, err := load(t); err != nil {
		return fmt.Errorf("tool %q: %w", t.Name, err)
	}
	var r head
	if err := b.callLimited(context.Background(), request{Op: "load", Tool: wireTool(t)}, &r); err != nil {
		return fmt.Errorf("tool %q: %w", t.Name, err)
	}
	return nil
}

// Access returns the Vault path of the tool's mint, whether the mint is a write, and whether it yields a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return t.Path, t.Settings["pawl.mint"] == "write", t.Settings["pawl.lease"] != "none"
}

// Prepare implements [broker.Backend]. A refusal by the plugin is Malformed or Denied, with the plugin's message as the
// cause. Any other failure has no kind.
func (b *Backend) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	ref, err := load(t)
	if err != nil {
		return broker.Mint{}, "", fmt.Errorf("tool %q: %w", t.Name, err)
	}
	var r prepared
	if err := b.callLimited(ctx, request{Op: "prepare", Tool: wireTool(t), Grant: wireGrant(g)}, &r); err != nil {
		return broker.Mint{}, "", refusal(err)
	}
	path, write, leased := b.Access(t)
	if path, err = r.mintPath(path); err == nil {
		err = r.check(write)
	}
	if err != nil {
		return broker.Mint{}, "", fmt.Errorf("exec: %s: %w", b.cfg.Name, err)
	}
	m := broker.Mint{Path: path, Leased: leased, TTL: g.Expires.Sub(b.cfg.Now()), Named: ref != "",
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			return finish(answer, r.Secret, ref)
		}}
	if write {
		m.Data = make(map[string]any, len(r.Data))
		for name, value := range r.Data {
			m.Data[name] = json.RawMessage(value)
		}
	}
	return m, string(g.ID), nil
}

// refusal converts a plugin's error to a broker error of the same kind. The plugin's message stays internal.
func refusal(err error) error {
	var f *pluginError
	if !errors.As(err, &f) {
		return err
	}
	switch f.Kind {
	case "malformed":
		return broker.Errorf(broker.Malformed, "issue", "the tool's plugin does not accept these arguments").
			With(broker.CodeArgumentOutside).Because(err)
	case "denied":
		return broker.Errorf(broker.Denied, "issue", "the tool's plugin refuses these arguments").
			With(broker.CodeArgumentOutside).Because(err)
	}
	return err
}

// finish builds the secret from the named members of Vault's response.
func finish(answer map[string]any, names []string, ref string) (broker.Finished, error) {
	secret := make(map[string]any, len(names))
	for _, name := range names {
		if answer[name] == nil {
			return broker.Finished{}, fmt.Errorf("exec: vault's response has no member %q", name)
		}
		secret[name] = answer[name]
	}
	raw, err := json.Marshal(secret)
	if err != nil {
		return broker.Finished{}, errors.New("exec: encoding the secret")
	}
	f := broker.Finished{Secret: broker.NewSecret(raw)}
	if ref == "" {
		return f, nil
	}
	if f.Ref, _ = answer[ref].(string); !printable(f.Ref, 1, 256) {
		f.Secret.Wipe()
		return broker.Finished{}, fmt.Errorf("exec: vault's response has no name in %q", ref)
	}
	return f, nil
}

// Sever implements [broker.Severer]. A nil error is the plugin's claim, not a proof.
func (b *Backend) Sever(ctx context.Context, grants []broker.Grant) error {
	var failed []error
	for batch := range slices.Chunk(grants, maxBatch) {
		var r head
		failed = append(failed, b.call(ctx, b.cfg.Program, request{Op: "sever", Grants: wireGrants(batch)}, &r))
	}
	return errors.Join(failed...)
}

// Prove implements [broker.Prover].
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	found := make([]broker.Evidence, 0, len(grants))
	for batch := range slices.Chunk(grants, maxBatch) {
		var r proven
		if err := b.call(ctx, b.probe, request{Op: "prove", Grants: wireGrants(batch)}, &r); err != nil {
			return nil, err
		}
		some, err := b.proven(r, batch)
		if err != nil {
			return nil, err
		}
		found = append(found, some...)
	}
	return found, nil
}

// proven converts a response about grants. The order of the evidence must be that of the grants.
func (b *Backend) proven(r proven, grants []broker.Grant) ([]broker.Evidence, error) {
	if len(r.Evidence) != len(grants) {
		return nil, fmt.Errorf("exec: %s: %d elements of evidence for %d grants", b.cfg.Name, len(r.Evidence), len(grants))
	}
	found := make([]broker.Evidence, len(grants))
	for i, e := range r.Evidence {
		var err error
		if found[i], err = b.evidence(grants[i], e); err != nil {
			return nil, fmt.Errorf("exec: %s: evidence %d: %w", b.cfg.Name, i+1, err)
		}
	}
	return found, nil
}

// evidence checks one element of evidence. It must be about the grant at the same position. Only a secret labelled none
// may be static, because static ends the reconciliation of the grant.
func (b *Backend) evidence(g broker.Grant, e wireEvidence) (broker.Evidence, error) {
	if e.Grant != string(g.ID) {
		return broker.Evidence{}, errors.New("it is about another grant")
	}
	outcome := broker.Outcome(e.Outcome)
	switch {
	case e.Outcome == "unknown":
		outcome = broker.OutcomeUnknown
	case outcome == broker.OutcomeStatic && g.Narrowing == broker.NarrowNone:
	case outcome != broker.OutcomeAlive && outcome != broker.OutcomeDead:
		return broker.Evidence{}, errors.New("its outcome is not alive, dead or unknown, nor static for a tool labelled none")
	}
	check, answer := b.probe.clean(e.Check, 100), b.probe.clean(e.Answer, 200)
	if check == "" || answer == "" {
		return broker.Evidence{}, errors.New("its check or its answer is empty")
	}
	return broker.Evidence{At: b.cfg.Now().UTC(), Check: b.cfg.Name + ": " + check, Outcome: outcome, Answer: answer}, nil
}

// Find implements [broker.Finder].
func (b *Backend) Find(ctx context.Context) ([]broker.GrantID, error) {
	var r foundGrants
	if err := b.call(ctx, b.probe, request{Op: "find"}, &r); err != nil {
		return nil, err
	}
	return b.found(r)
}

func (b *Backend) found(r foundGrants) ([]broker.GrantID, error) {
	ids := make([]broker.GrantID, len(r.Grants))
	for i, s := range r.Grants {
		id, err := broker.ParseGrantID(s)
		if err != nil {
			return nil, fmt.Errorf("exec: %s: its list of grants has an element that is not a grant id: %w", b.cfg.Name, err)
		}
		ids[i] = id
	}
	return ids, nil
}

// callLimited is call for operations that agents trigger. It waits for one of a limited number of slots.
func (b *Backend) callLimited(ctx context.Context, r request, into response) error {
	select {
	case b.slots <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("exec: %s: waiting for a slot: %w", b.cfg.Name, ctx.Err())
	}
	defer func() { <-b.slots }()
	return b.call(ctx, b.cfg.Program, r, into)
}

// call starts a program once, with one request, and decodes its response.
func (b *Backend) call(ctx context.Context, p Program, r request, into response) error {
	r.Version = version
	in, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("exec: %s: encoding the request: %w", b.cfg.Name, err)
	}
	out, err := p.run(ctx, limits{b.cfg.Timeout, b.cfg.MaxOutput}, in)
	if err == nil {
		err = decode(out, into)
	}
	if err == nil {
		err = into.failure(p)
	}
	if err != nil {
		return fmt.Errorf("exec: %s: %s: %w", b.cfg.Name, r.Op, err)
	}
	return nil
}
