package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/plain"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/bench/report"
)

// target is one kind of secret: the step through Pawl, and the same call to Vault.
type target struct {
	name   string
	tool   string
	args   agent.Args
	direct func(context.Context, *plain.Vault) error
	ours   string // path of our leases in Vault; empty: the engine gives none
	theirs string
}

func targets(w *world) []target {
	list := []target{
		{name: "kv", tool: "notes.read", direct: readNote},
		{name: "jwt", tool: "api.call", args: agent.Args{"audience": "https://orders.pawl.dev"}, direct: signToken},
		{name: "pki", tool: "tls.call", args: agent.Args{"name": "a.agents.pawl.dev"}, direct: issueCertificate,
			ours: "pki/issue/pawl-client", theirs: "pki/issue/plain"},
		{name: "ssh", tool: "host.uptime", direct: signKey},
	}
	if w.env.Postgres != nil {
		list = append(list, target{name: "postgres", tool: "db.read", args: agent.Args{"tables": []string{"orders"}}, direct: func(ctx context.Context, c *plain.Vault) error {
			_, err := c.Ask(ctx, "GET", "plain/creds/best", nil)
			return err
		}, ours: oursPath, theirs: "plain/creds/best"})
	}
	return list
}

func readNote(ctx context.Context, c *plain.Vault) error {
	_, err := c.Ask(ctx, "GET", "secret/data/notes", nil)
	return err
}

func signToken(ctx context.Context, c *plain.Vault) error {
	claims := fmt.Sprintf(`{"iss":"https://pawl.dev","sub":"spiffe://pawl.dev/agent/bench","aud":"https://orders.pawl.dev","exp":%d,"iat":%d,"jti":"%s","scope":"read"}`,
		time.Now().Add(secretTTL).Unix(), time.Now().Unix(), rand.Text())
	input := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256","kid":"pawl-tokens:1","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	_, err := c.Ask(ctx, "POST", "transit/sign/pawl-tokens/sha2-256", map[string]any{
		"input": base64.StdEncoding.EncodeToString([]byte(input)), "marshaling_algorithm": "jws"})
	return err
}

func issueCertificate(ctx context.Context, c *plain.Vault) error {
	_, err := c.Ask(ctx, "POST", "pki/issue/plain", map[string]any{"common_name": "a.agents.pawl.dev", "exclude_cn_from_sans": true, "ttl": "14m"})
	return err
}

func signKey(ctx context.Context, c *plain.Vault) error {
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		return err
	}
	_, err = c.Ask(ctx, "POST", "ssh/sign/pawl-uptime", map[string]any{"public_key": string(ssh.MarshalAuthorizedKey(key)), "cert_type": "user",
		"valid_principals": "pawl", "ttl": "14m", "critical_options": map[string]string{"force-command": "uptime"}})
	return err
}

// turn is one side's part of a round.
type turn struct {
	loop
	broker, vault time.Duration // CPU time of the two processes
}

// perIssue gives CPU time per issue, in milliseconds.
func (t turn) perIssue(cpu time.Duration) float64 { return ms(cpu) / float64(len(t.latencies)) }

// measureIssue runs a closed loop of clients against the broker and against Vault, in turns.
func measureIssue(ctx context.Context, b *bench) error {
	for _, clients := range []int{1, 16, 64} {
		for _, t := range targets(b.world) {
			if !b.wants(fmt.Sprintf("issue.%s.c%d.", t.name, clients)) {
				continue
			}
			err := errLate
			if !b.late(5 * time.Second) {
				err = b.issue(ctx, t, clients)
			}
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				b.report.LeaveOut(fmt.Sprintf("issue.%s.c%d", t.name, clients), err)
			}
		}
	}
	return nil
}

// issue measures one target with the given number of clients.
func (b *bench) issue(ctx context.Context, t target, clients int) error {
	w := b.world
	agents, err := w.agents(clients)
	if err != nil {
		return err
	}
	defer closeAgents(agents)
	var ours, theirs []turn
	var commits report.Samples // p50 of each round
	for round := range pick(b, 5, 2) {
		mine := func() error { u, err := w.through(ctx, b, t, agents); ours = append(ours, u); return err }
		direct := func() error { u, err := w.around(ctx, b, t, clients); theirs = append(theirs, u); return err }
		if round%2 == 1 {
			mine, direct = direct, mine
		}
		if err := mine(); err != nil {
			return err
		}
		if err := direct(); err != nil {
			return err
		}
		if clients == 1 {
			took, err := commit(filepath.Join(b.dir, "commit.db"), pick(b, 100, 50))
			if err != nil {
				return err
			}
			commits = append(commits, took.Median())
		}
	}
	b.reportIssue(t, clients, ours, theirs, commits)
	return nil
}

// span gives the duration of one turn, and its largest number of calls.
func (b *bench) span() (time.Duration, int) {
	return pick(b, 2500*time.Millisecond, 400*time.Millisecond), pick(b, 2000, 250)
}

func (w *world) agents(n int) (list []*agent.Client, err error) {
	for i := range n {
		c, err := w.agent(fmt.Sprintf("bench-%d", i))
		if err != nil {
			return list, err
		}
		list = append(list, c)
	}
	return list, nil
}

func closeAgents(list []*agent.Client) {
	for _, c := range list {
		_ = c.Close() // it always succeeds
	}
}

// through takes steps through the broker. Each client has its own identity, connections and chain.
func (w *world) through(ctx context.Context, b *bench, t target, agents []*agent.Client) (turn, error) {
	held := make([]*agent.Delegation, len(agents))
	chains := make([]string, len(agents))
	take := func(i int) error { _, err := held[i].Begin(ctx, agent.Call{Tool: t.tool, Args: t.args}); return err }
	if err := each(16, len(agents), func(i int) (err error) {
		if held[i], err = agents[i].Open(ctx, agent.Chain{Task: "bench", Rights: []agent.Right{{Tool: t.tool, Use: true}}}); err != nil {
			return err
		}
		chains[i] = string(held[i].Info().Chain)
		return take(i) // the delegation's token is made with the first step
	}); err != nil {
		return turn{}, err
	}
	u := w.clocked(b, len(agents), take)
	for _, d := range held {
		d.Leave()
	}
	if err := w.revoke(ctx, chains); err != nil {
		return u, fmt.Errorf("ending a round: %w", err)
	}
	return u, u.outcome(w.direct.NoLeases(ctx, t.ours))
}

// around makes the same calls to Vault. Each client has a token and connections of its own.
func (w *world) around(ctx context.Context, b *bench, t target, n int) (turn, error) {
	clients, accessors := make([]*plain.Vault, n), make([]string, n)
	if err := each(16, n, func(i int) error {
		token, accessor, err := w.direct.Child(ctx)
		if err != nil {
			return err
		}
		clients[i], accessors[i] = w.direct.As(token), accessor
		return t.direct(ctx, clients[i])
	}); err != nil {
		return turn{}, err
	}
	u := w.clocked(b, n, func(i int) error { return t.direct(ctx, clients[i]) })
	for i, c := range clients {
		c.Close()
		if _, err := w.direct.Ask(ctx, "POST", "auth/token/revoke-accessor", map[string]any{"accessor": accessors[i]}); err != nil {
			return u, err
		}
	}
	return u, u.outcome(w.direct.NoLeases(ctx, t.theirs))
}

func (u turn) outcome(err error) error {
	if u.err != nil {
		return u.err
	}
	if err == nil && len(u.latencies) == 0 {
		err = fmt.Errorf("no call was made in the time")
	}
	return err
}

// clocked runs the loop and reads the CPU time of both processes before and after it.
func (w *world) clocked(b *bench, clients int, f func(int) error) turn {
	var u turn
	d, most := b.span()
	before := w.cpu()
	u.loop = closedLoop(clients, d, most, f)
	after := w.cpu()
	u.broker, u.vault = after[0]-before[0], after[1]-before[1]
	return u
}

// cpu gives the CPU time that broker and Vault have used; zero where it cannot be read.
func (w *world) cpu() (used [2]time.Duration) {
	used[0], _ = process.CPUTime(w.broker.PID())
	used[1], _ = process.CPUTime(w.vaultPID)
	return used
}

// minus subtracts round by round.
func minus(a, b report.Samples) (s report.Samples) {
	for i := range a {
		s = append(s, a[i]-b[i])
	}
	return s
}

func (b *bench) reportIssue(t target, clients int, ours, theirs []turn, commits report.Samples) {
	prefix := fmt.Sprintf("issue.%s.c%d.", t.name, clients)
	of := func(turns []turn, f func(turn) float64) (s report.Samples) {
		for _, u := range turns {
			s = append(s, f(u))
		}
		return s
	}
	n := 0
	for _, u := range ours {
		n += len(u.latencies)
	}
	p50 := func(u turn) float64 { return u.latencies.Median() }
	p99 := func(u turn) float64 { return u.latencies.Quantile(0.99) }
	add := func(name, unit string, f func(turn) float64) {
		b.report.Add(report.Row{Name: prefix + name, Unit: unit, N: n,
			Against: "the same call made directly to Vault"}, of(ours, f), of(theirs, f))
	}
	add("throughput", "per second", turn.perSecond)
	add("p50_ms", "ms", p50)
	add("p99_ms", "ms", p99)
	if clients == 1 {
		base := of(theirs, p50)
		added := minus(of(ours, p50), base)
		b.report.Add(report.Row{Name: prefix + "added_p50_ms", Unit: "ms", N: n,
			Against: "p50 of the direct call; ours is the added time"}, added, base)
		b.report.Add(report.Row{Name: prefix + "added_of_commit_ms", Unit: "ms", N: n,
			Against: "p50 of one synced commit of bbolt with a record of 800 bytes and an entry of 300, of the same turns; " +
				"ours is the added time"}, added, commits)
	}
	if clients == 16 {
		base := of(theirs, p99)
		b.report.Add(report.Row{Name: prefix + "added_p99_ms", Unit: "ms", N: n,
			Against: "p99 of the direct call; ours is the added time"}, minus(of(ours, p99), base), base)
	}
	if clients == 16 && b.world.vaultPID != 0 && theirs[0].vault > 0 {
		name := "issue." + t.name + "."
		direct := of(theirs, func(u turn) float64 { return u.perIssue(u.vault) })
		b.report.Add(report.Row{Name: name + "cpu_vs_vault", Unit: "ms of CPU per issue", N: n,
			Against: "Vault's own CPU time for the direct call, 16 clients"},
			of(ours, func(u turn) float64 { return u.perIssue(u.broker) }), direct)
		b.report.Add(report.Row{Name: name + "vault_cpu", Unit: "ms of CPU per issue", N: n,
			Against: "Vault's own CPU time for the direct call; ours is Vault's CPU time for a step through Pawl, including the step's token where it has one"},
			of(ours, func(u turn) float64 { return u.perIssue(u.vault) }), direct)
	}
}
