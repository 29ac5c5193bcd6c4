package brokertest_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
	"github.com/pawlsec/pawl/broker/brokertest"
)

// strict is a Target that checks its tool and limits a mint to the lifetime of its grant.
type strict struct{ *brokertest.Target }

func (s strict) Load(t broker.Tool) error {
	if t.Path != brokertest.Path("target/creds") || len(t.Settings) > 0 {
		return errors.New("not a tool of this target")
	}
	return nil
}

func (s strict) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	if v, _ := g.Args.Get("table"); v.Equal(args.String("salaries")) {
		return broker.Mint{}, "", errors.New("not that table")
	}
	m, name, err := s.Target.Prepare(ctx, t, g)
	finish := m.Finish
	m.TTL = time.Until(g.Expires)
	m.Finish = func(answer map[string]any, end time.Time) (broker.Finished, error) {
		if answer["password"] == nil {
			return broker.Finished{}, errors.New("no password")
		}
		return finish(answer, end)
	}
	return m, name, err
}

// rig returns a rig for a backend over the target, with brokertest's Vault and one delegation.
func rig(t *testing.T, target *brokertest.Target, b broker.Backend) brokertest.Rig {
	t.Helper()
	v := brokertest.NewVault(target)
	d := broker.Delegation{ID: "dl000000000000000000000000", Expires: time.Now().Add(time.Hour)}
	h, err := v.CreateDelegationToken(t.Context(), d, nil)
	if err != nil {
		t.Fatal(err)
	}
	v.Activate(d.ID, h)
	var mu sync.Mutex // guards tokens
	tokens := map[broker.GrantID]string{}
	given, _ := args.New(map[string]args.Value{"table": args.String("orders")})
	outside, _ := args.New(map[string]args.Value{"table": args.String("salaries")})
	tool := broker.Tool{Name: "db.read", Backend: "target", Path: brokertest.Path("target/creds")}
	wrong := tool
	wrong.Path = brokertest.Path("other/creds")
	return brokertest.Rig{
		Backend: b, Tool: tool, Wrong: []broker.Tool{wrong}, Args: given, Outside: []args.Args{outside},
		Mint: func(ctx context.Context, g *broker.Grant, m broker.Mint, name string) (s broker.Secret, err error) {
			if g.Token, err = v.CreateStepToken(ctx, *g, name, ""); err != nil {
				return s, err
			}
			mu.Lock()
			tokens[g.ID] = g.Token.Accessor
			mu.Unlock()
			g.Lease, s, err = v.Mint(ctx, g.Token, m)
			return s, err
		},
		End: func(ctx context.Context, g broker.Grant) error {
			mu.Lock()
			defer mu.Unlock()
			return v.Kill(ctx, tokens[g.ID])
		},
		Works: func(_ context.Context, _ broker.Grant, s broker.Secret) (bool, error) {
			return target.Login(s.Reveal()), nil
		},
		Credentials: func(context.Context) (int, error) { return len(target.Alive()), nil },
	}
}

func TestBackend(t *testing.T) {
	target := brokertest.NewTarget()
	brokertest.Backend(t, rig(t, target, strict{target}))
	if alive := target.Alive(); len(alive) > 0 {
		t.Errorf("the suite left %d logins alive, want none", len(alive))
	}
}

// backend is a broker.Backend with replaceable parts, so that a test can break each of them.
type backend struct {
	strict
	load    func(broker.Tool) error
	prepare func(*broker.Mint, *string)
	sever   func([]broker.Grant) error
	prove   func([]broker.Grant, []broker.Evidence) []broker.Evidence
	find    func() []broker.GrantID
}

func (b backend) Load(t broker.Tool) error {
	if b.load != nil {
		return b.load(t)
	}
	return b.strict.Load(t)
}

func (b backend) Prepare(ctx context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	m, name, err := b.strict.Prepare(ctx, t, g)
	if b.prepare != nil {
		b.prepare(&m, &name)
	}
	return m, name, err
}

func (b backend) Sever(ctx context.Context, grants []broker.Grant) error {
	if b.sever != nil {
		return b.sever(grants)
	}
	return b.strict.Sever(ctx, grants)
}

func (b backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	found, err := b.strict.Prove(ctx, grants)
	if b.prove != nil {
		return b.prove(grants, found), err
	}
	return found, err
}

func (b backend) Find(ctx context.Context) ([]broker.GrantID, error) {
	if b.find != nil {
		return b.find(), nil
	}
	return b.strict.Find(ctx)
}

// all returns the same outcome for every grant.
func all(o broker.Outcome) func([]broker.Grant, []broker.Evidence) []broker.Evidence {
	return func(grants []broker.Grant, _ []broker.Evidence) []broker.Evidence {
		found := make([]broker.Evidence, len(grants))
		for i := range found {
			found[i] = broker.Evidence{Check: "target: a check", Outcome: o, Answer: "trust me"}
		}
		return found
	}
}

// TestBackendFails checks that the suite detects each broken promise, and names it.
func TestBackendFails(t *testing.T) {
	idle := func([]broker.Grant) error { return nil }
	for _, row := range []struct {
		name string
		make func(*brokertest.Target) broker.Backend
		want string // in the error of CheckBackend
	}{
		{"pretends to revoke and to prove", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, sever: idle, prove: all(broker.OutcomeDead)}
		}, "the backend lies"},
		{"pretends to revoke", func(t *brokertest.Target) broker.Backend { return backend{strict: strict{t}, sever: idle} }, `want "dead"`},
		{"pretends to prove", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prove: all(broker.OutcomeDead)}
		}, "the backend lies"},
		{"never proves", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prove: all(broker.OutcomeAlive)}
		}, `want "dead"`},
		{"proves nothing", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prove: all(broker.OutcomeUnknown)}
		}, `want "alive"`},
		{"cannot prove", func(t *brokertest.Target) broker.Backend {
			return struct {
				broker.Backend
				broker.Severer
			}{strict{t}, t}
		}, "cannot prove"},
		{"severs everything", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, sever: func([]broker.Grant) error {
				for _, id := range t.Alive() {
					_ = t.Sever(context.Background(), []broker.Grant{{ID: id}})
				}
				return nil
			}}
		}, "leaves the other"},
		{"knows only grants with a lease", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prove: func(grants []broker.Grant, found []broker.Evidence) []broker.Evidence {
				for i, g := range grants {
					if g.Lease.Ref == "" {
						found[i].Outcome = broker.OutcomeDead
					}
				}
				return found
			}}
		}, "with a lost answer"},
		{"answers in another order", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prove: func(_ []broker.Grant, found []broker.Evidence) []broker.Evidence {
				for i := range len(found) / 2 {
					found[i], found[len(found)-1-i] = found[len(found)-1-i], found[i]
				}
				return found
			}}
		}, "Prove of two"},
		{"answers too few", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prove: func(_ []broker.Grant, found []broker.Evidence) []broker.Evidence {
				return found[:0]
			}}
		}, "0 answers for 1"},
		{"fails for secrets that were never minted", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, sever: func(grants []broker.Grant) error {
				for _, g := range grants {
					if g.State == broker.StateIntent {
						return errors.New("no such login")
					}
				}
				return t.Sever(context.Background(), grants)
			}}
		}, "grants without a secret"},
		{"discloses the secret", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prove: func(_ []broker.Grant, found []broker.Evidence) []broker.Evidence {
				for i := range found {
					for n := range 100 {
						found[i].Answer += fmt.Sprintf(" marker-%d", n)
					}
				}
				return found
			}}
		}, "part of the secret"},
		{"loads anything", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, load: func(broker.Tool) error { return nil }}
		}, "no-such-setting"},
		{"creates a login in Prepare", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prepare: func(_ *broker.Mint, name *string) { t.Plant(broker.GrantID(*name)) }}
		}, "credentials: only Vault creates one"},
		{"returns no path", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prepare: func(m *broker.Mint, _ *string) { m.Path = broker.VaultPath{} }}
		}, "no path"},
		{"accepts any lifetime", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prepare: func(m *broker.Mint, _ *string) { m.TTL = time.Hour }}
		}, "that the grant has left"},
		{"accepts an unlimited lifetime", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prepare: func(m *broker.Mint, _ *string) { m.TTL = 0 }}
		}, "that the grant has left"},
		{"drops the grant's id", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prepare: func(_ *broker.Mint, name *string) { *name = "step" }}
		}, "the display name"},
		{"accepts an empty answer", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, prepare: func(m *broker.Mint, _ *string) {
				m.Finish = func(map[string]any, time.Time) (broker.Finished, error) {
					return broker.Finished{Secret: broker.NewSecret([]byte("{}"))}, nil
				}
			}}
		}, "made a secret from"},
		{"finds nothing", func(t *brokertest.Target) broker.Backend {
			return backend{strict: strict{t}, find: func() []broker.GrantID { return nil }}
		}, "Find does not list"},
	} {
		target := brokertest.NewTarget()
		err := brokertest.CheckBackend(t.Context(), rig(t, target, row.make(target)))
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("CheckBackend(one that %s) = %v, want a fault with %q", row.name, err, row.want)
		}
	}
	target := brokertest.NewTarget()
	irrevocable := rig(t, target, struct {
		broker.Backend
		broker.Prover
	}{strict{target}, target})
	irrevocable.End = nil
	if err := brokertest.CheckBackend(t.Context(), irrevocable); err == nil || !strings.Contains(err.Error(), "there is no way to revoke") {
		t.Errorf("CheckBackend(one that cannot be revoked) = %v, want a fault", err)
	}
	if err := brokertest.CheckBackend(t.Context(), brokertest.Rig{}); err == nil {
		t.Error("CheckBackend(empty rig) = nil, want a fault")
	}
}
