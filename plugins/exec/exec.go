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

// Program is one executable file and how it is started.
type Program struct {
	Path   string   // required: absolute; one file that needs no other beside it
	SHA256 string   // required: its checksum, 64 lower-case hexadecimal digits
	Args   []string // after the program's name; zero: none
	Env    []string // "NAME=value"; zero: the environment is empty
	Dir    string   // working directory, absolute; zero: "/"
}

// Config says which plugin, and what it may take.
type Config struct {
	Name    string   // required: begins the plugin's errors and evidence; lower-case letters, digits and hyphens
	Program Program  // required
	Probe   *Program // proves and finds instead of Program, so that what cuts is not what says it is cut; nil: Program does

	Timeout   time.Duration // of one start to its end; zero: 10 seconds
	MaxOutput int           // bytes of its answer, and of its standard error; zero: 1 MiB
	Processes int           // loads and prepares at once; zero: 8. Severing and proving never wait for them

	Now func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend], [broker.Severer], [broker.Prover] and [broker.Finder] by
// asking the plugin. Safe for concurrent use.
type Backend struct {
	cfg   Config
	probe Program
	slots chan struct{} // one for each load or prepare that runs
}

// New checks the configuration and the programs' checksums. It runs nothing.
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

// maxBatch is how many grants one start is asked about: the answer then fits into MaxOutput.
const maxBatch = 500

// Load implements [broker.Backend]. The tool's Path is the Vault path of the mint. Of its Settings
// the broker reads those below; the others are the plugin's, which is asked what it thinks of the
// tool.
//
//	pawl.mint   "read" (default) or "write": how Vault is asked
//	pawl.lease  "required" (default) or "none": whether an answer without a lease is refused
//	pawl.ref    the member of Vault's answer that names the secret at the target, and is no
//	            secret itself: the ledger keeps it. Empty: none
func (b *Backend) Load(t broker.Tool) error {
	if _, err := load(t); err != nil {
		return fmt.Errorf("tool %q: %w", t.Name, err)
	}
	var a head
	if err := b.waiting(context.Background(), request{Op: "load", Tool: wireTool(t)}, &a); err != nil {
		return fmt.Errorf("tool %q: %w", t.Name, err)
	}
	return nil
}

// Access gives the Vault path of the tool's mint and how it is used there.
func (b *Backend) Access(t broker.Tool) (path []string, write, leased bool) {
	return t.Path, t.Settings["pawl.mint"] == "write", t.Settings["pawl.lease"] != "none"
}

// Prepare implements [broker.Backend]. A refusal by the plugin is Malformed or Denied, its words
// the cause; any other failure has no kind.
func (b *Backend) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	ref, err := load(t)
	if err != nil {
		return broker.Mint{}, "", fmt.Errorf("tool %q: %w", t.Name, err)
	}
	var a prepared
	if err := b.waiting(ctx, request{Op: "prepare", Tool: wireTool(t), Grant: wireGrant(g)}, &a); err != nil {
		return broker.Mint{}, "", refusal(err)
	}
	path, write, leased := b.Access(t)
	if err := a.check(path, write); err != nil {
		return broker.Mint{}, "", fmt.Errorf("exec: %s: %w", b.cfg.Name, err)
	}
	m := broker.Mint{Path: slices.Clone(path), Leased: leased, TTL: g.Expires.Sub(b.cfg.Now()),
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			return finish(answer, a.Secret, ref)
		}}
	if len(a.Path) > 0 {
		m.Path = a.Path
	}
	if write {
		m.Data = make(map[string]any, len(a.Data))
		for name, value := range a.Data {
			m.Data[name] = json.RawMessage(value)
		}
	}
	return m, string(g.ID), nil
}

// refusal gives a plugin's no its kind. What it said stays inside.
func refusal(err error) error {
	var f *failure
	if !errors.As(err, &f) {
		return err
	}
	switch f.Kind {
	case "malformed":
		return broker.Errorf(broker.Malformed, "issue", "the tool's plugin takes no such arguments").With(broker.CodeArgumentOutside).Because(err)
	case "denied":
		return broker.Errorf(broker.Denied, "issue", "the tool's plugin refuses these arguments").With(broker.CodeArgumentOutside).Because(err)
	}
	return err
}

// finish makes the secret of the named members of Vault's answer.
func finish(answer map[string]any, names []string, ref string) (broker.Finished, error) {
	secret := make(map[string]any, len(names))
	for _, name := range names {
		if answer[name] == nil {
			return broker.Finished{}, fmt.Errorf("exec: vault's answer has no member %q", name)
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
		return broker.Finished{}, fmt.Errorf("exec: vault's answer has no name in %q", ref)
	}
	return f, nil
}

// Sever implements [broker.Severer]. That the plugin says it is done proves nothing.
func (b *Backend) Sever(ctx context.Context, grants []broker.Grant) error {
	var failed []error
	for batch := range slices.Chunk(grants, maxBatch) {
		var a head
		failed = append(failed, b.call(ctx, b.cfg.Program, request{Op: "sever", Grants: wireGrants(batch)}, &a))
	}
	return errors.Join(failed...)
}

// Prove implements [broker.Prover].
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	found := make([]broker.Evidence, 0, len(grants))
	for batch := range slices.Chunk(grants, maxBatch) {
		var a proven
		if err := b.call(ctx, b.probe, request{Op: "prove", Grants: wireGrants(batch)}, &a); err != nil {
			return nil, err
		}
		some, err := b.proven(a, batch)
		if err != nil {
			return nil, err
		}
		found = append(found, some...)
	}
	return found, nil
}

// proven takes an answer about grants, in their order.
func (b *Backend) proven(a proven, grants []broker.Grant) ([]broker.Evidence, error) {
	if len(a.Evidence) != len(grants) {
		return nil, fmt.Errorf("exec: %s: %d answers for %d grants", b.cfg.Name, len(a.Evidence), len(grants))
	}
	found := make([]broker.Evidence, len(grants))
	for i, e := range a.Evidence {
		var err error
		if found[i], err = b.evidence(grants[i], e); err != nil {
			return nil, fmt.Errorf("exec: %s: answer %d: %w", b.cfg.Name, i+1, err)
		}
	}
	return found, nil
}

// evidence takes one answer for what it is worth: it must be about the grant in that place, and
// only a secret labelled none is static, which ends the pursuit.
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
		return broker.Evidence{}, errors.New("its outcome is not alive, dead or unknown, nor static of a tool labelled none")
	}
	check, answer := b.probe.words(e.Check, 100), b.probe.words(e.Answer, 200)
	if check == "" || answer == "" {
		return broker.Evidence{}, errors.New("it does not say what was checked and what was answered")
	}
	return broker.Evidence{At: b.cfg.Now().UTC(), Check: b.cfg.Name + ": " + check, Outcome: outcome, Answer: answer}, nil
}

// Find implements [broker.Finder].
func (b *Backend) Find(ctx context.Context) ([]broker.GrantID, error) {
	var a foundGrants
	if err := b.call(ctx, b.probe, request{Op: "find"}, &a); err != nil {
		return nil, err
	}
	return b.found(a)
}

func (b *Backend) found(a foundGrants) ([]broker.GrantID, error) {
	ids := make([]broker.GrantID, len(a.Grants))
	for i, s := range a.Grants {
		id, err := broker.ParseGrantID(s)
		if err != nil {
			return nil, fmt.Errorf("exec: %s: it found what is not a grant: %w", b.cfg.Name, err)
		}
		ids[i] = id
	}
	return ids, nil
}

// waiting is call for what agents set off: it takes one of a limited number of places.
func (b *Backend) waiting(ctx context.Context, r request, into answer) error {
	select {
	case b.slots <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("exec: %s: waiting for a place: %w", b.cfg.Name, ctx.Err())
	}
	defer func() { <-b.slots }()
	return b.call(ctx, b.cfg.Program, r, into)
}

// call is one start of a program: request in, answer out.
func (b *Backend) call(ctx context.Context, p Program, r request, into answer) error {
	r.Version = Version
	in, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("exec: %s: encoding the request: %w", b.cfg.Name, err)
	}
	out, err := p.run(ctx, limits{b.cfg.Timeout, b.cfg.MaxOutput}, in)
	if err == nil {
		err = decode(out, into)
	}
	if err == nil {
		err = into.refused(p)
	}
	if err != nil {
		return fmt.Errorf("exec: %s: %s: %w", b.cfg.Name, r.Op, err)
	}
	return nil
}
