// Package ssh makes a new key for each step, with a certificate from Vault's SSH engine for one principal and one
// command. It revokes certificates through a key revocation list that sshd reads at every login.
package ssh

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/pawlsec/pawl/broker"
	"golang.org/x/crypto/ssh"
)

// Config configures a [Backend].
type Config struct {
	// KRL is the path of the key revocation list, sshd's RevokedKeys, or of a link to it. Its directory must exist.
	// Other programs may have sections in it, but only one broker may write it. The platform distributes it to other
	// hosts. Empty: no list, and certificates work until they expire.
	KRL string
	// InPlace writes into the file instead of replacing it, for a file that a container of sshd mounts: the mount does
	// not follow a replacement. sshd refuses every key during a write. False: only where the system refuses to replace
	// the file.
	InPlace bool
	// InUse says that KRL itself is the file that every sshd reads which trusts the authority. A listed certificate then
	// counts as dead. False: only Hosts can show that.
	InUse bool
	// Hosts are all sshd that trust the authority. A listed certificate counts as dead once each of them was seen to
	// refuse one that it accepted before it was listed, and as alive while one of them accepts it. Their sshd may not
	// refuse the broker's address otherwise. Empty: InUse decides.
	Hosts []Host
	Now   func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend], [broker.Severer] and [broker.Prover]. Safe for
// concurrent use.
type Backend struct {
	list   *list // nil: there is none
	inUse  bool
	prober *prober // nil: there are no hosts to ask
	now    func() time.Time
}

// New returns a Backend. It reads the revocation list, so that revoked certificates stay revoked, and then writes it:
// sshd refuses every login while the file is missing.
func New(cfg Config) (*Backend, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	b := &Backend{now: cfg.Now, inUse: cfg.InUse}
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if cfg.KRL == "" {
		return b, nil
	}
	var err error
	if b.list, err = openList(cfg.KRL, cfg.InPlace, cfg.Now()); err != nil {
		return nil, fmt.Errorf("ssh: opening the revocation list %q: %w", cfg.KRL, err)
	}
	if hosts, _ := parseHosts(cfg.Hosts); len(hosts) > 0 { // Check has parsed them
		b.prober = newProber(hosts, b.list, cfg.Now)
	}
	return b, nil
}

// Check checks the configuration without opening the list.
func (cfg Config) Check() error {
	hosts, err := parseHosts(cfg.Hosts)
	switch {
	case err != nil:
		return fmt.Errorf("ssh: %w", err)
	case cfg.KRL == "" && (cfg.InPlace || cfg.InUse || len(hosts) > 0):
		return errors.New("ssh: krl_in_place, krl_in_use and hosts need krl")
	}
	return nil
}

// Access returns the Vault path of the tool's mint, whether the mint is a write, and whether it yields a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return t.Path.Insert(1, "sign"), true, false
}

// keyID returns the key id of a grant's certificate. It is known before the mint, unlike the serial number. So a
// certificate can be revoked even if the response of its mint was lost.
func keyID(id broker.GrantID) string { return keyIDPrefix + string(id) }

// Prepare implements [broker.Backend]. It generates the private key, which leaves memory only inside the secret.
func (b *Backend) Prepare(_ context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	s, err := load(t)
	if err != nil {
		return broker.Mint{}, "", err
	}
	want, err := s.spec(g.Args)
	if err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Malformed, "issue", "%s", err).With(broker.CodeArgumentOutside)
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return broker.Mint{}, "", fmt.Errorf("ssh: making a key: %w", err)
	}
	if want.key, err = ssh.NewPublicKey(public); err != nil {
		return broker.Mint{}, "", fmt.Errorf("ssh: making a key: %w", err)
	}
	want.keyID = keyID(g.ID)
	want.life = (g.Expires.Sub(b.now()) + time.Second - 1).Truncate(time.Second)
	path, _, _ := b.Access(t)
	return broker.Mint{
		Path: path, TTL: want.life, Absolute: true, NoLease: true,
		Data: map[string]any{
			"public_key": string(ssh.MarshalAuthorizedKey(want.key)), "cert_type": "user", "key_id": want.keyID, "valid_principals": want.principal,
			"ttl": strconv.FormatInt(int64(want.life/time.Second), 10) + "s", "critical_options": want.options, "extensions": want.extensions,
		},
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			f, err := b.finish(answer, want, private)
			if err == nil && s.outlives > 0 {
				f.Outlives = f.Expires.Add(s.outlives)
			}
			return f, err
		},
	}, string(g.ID), nil
}

// spec is the certificate requested from Vault.
type spec struct {
	key        ssh.PublicKey
	keyID      string
	principal  string
	options    map[string]string
	extensions map[string]string
	life       time.Duration
}

// finish rejects a certificate that differs from the request. A role may add extensions, principals or lifetime.
func (b *Backend) finish(answer map[string]any, want spec, private ed25519.PrivateKey) (broker.Finished, error) {
	text, _ := answer["signed_key"].(string)
	key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(text))
	cert, ok := key.(*ssh.Certificate)
	if err != nil || !ok || len(rest) > 0 {
		return broker.Finished{}, errors.New("ssh: the response is not a certificate")
	}
	end, err := want.check(cert, b.now())
	if err != nil {
		return broker.Finished{}, err
	}
	if b.prober != nil {
		b.prober.keep(cert)
	}
	block, err := ssh.MarshalPrivateKey(private, want.keyID)
	if err != nil {
		return broker.Finished{}, errors.New("ssh: encoding the private key")
	}
	privateKey := string(pem.EncodeToMemory(block))
	raw, err := json.Marshal(map[string]string{
		"private_key": privateKey, "certificate": text, "principal": want.principal, "key_id": want.keyID,
	})
	clear(block.Bytes)
	if err != nil {
		return broker.Finished{}, errors.New("ssh: encoding the secret")
	}
	return broker.Finished{Secret: broker.NewSecret(raw), Ref: fmt.Sprintf("%s serial %d", want.keyID, cert.Serial), Expires: end,
		Digests: []broker.ValueDigest{broker.DigestValue(privateKey), broker.DigestValue(text)}}, nil
}

func (want spec) check(cert *ssh.Certificate, now time.Time) (end time.Time, err error) {
	checker := ssh.CertChecker{SupportedCriticalOptions: slices.Collect(maps.Keys(want.options)), Clock: func() time.Time { return now }}
	latest := now.Add(want.life + time.Second + broker.MaxSkew)
	switch {
	case cert.CertType != ssh.UserCert || string(cert.Key.Marshal()) != string(want.key.Marshal()):
		return end, errors.New("ssh: the certificate is not a user certificate, or has another key")
	case cert.KeyId != want.keyID:
		return end, errors.New("ssh: the certificate has another key id: set allow_user_key_ids on the role")
	case !slices.Equal(cert.ValidPrincipals, []string{want.principal}):
		return end, errors.New("ssh: the certificate's principals are not exactly the step's")
	case !maps.Equal(cert.CriticalOptions, want.options) || !maps.Equal(cert.Extensions, want.extensions):
		return end, errors.New("ssh: the certificate's options or extensions are not exactly the step's: " +
			"clear default_extensions and default_critical_options on the role")
	case cert.ValidBefore > uint64(latest.Unix()):
		return end, errors.New("ssh: the certificate outlives the step")
	}
	if err := checker.CheckCert(want.principal, cert); err != nil {
		return end, errors.New("ssh: the certificate is not valid now, or its signature is wrong")
	}
	return time.Unix(int64(cert.ValidBefore), 0).UTC(), nil
}

// Sever implements [broker.Severer]. It writes one new list for all grants. Open sessions continue: only a forced
// command and ClientAliveInterval at the target bound them.
func (b *Backend) Sever(ctx context.Context, grants []broker.Grant) error {
	if b.list == nil || len(grants) == 0 {
		return nil
	}
	now := b.now()
	ids := make(map[string]time.Time, len(grants))
	for _, g := range grants {
		ids[keyID(g.ID)] = end(g).Add(broker.Leeway)
	}
	if b.prober != nil {
		b.prober.before(ctx, ids)
	}
	if err := b.list.add(ids, now); err != nil {
		return fmt.Errorf("ssh: writing the revocation list: %w", err)
	}
	return nil
}

// Restore lists ended certificates again after a start of the process, in case the file was emptied or lost meanwhile, or
// a write of it was interrupted. The grants are those of this backend in the ledger that can be unexpired, ended ones
// included. active reports whether a grant's secret is still good.
func (b *Backend) Restore(grants []broker.Grant, active func(broker.GrantID) (bool, error)) error {
	if b.list == nil {
		return nil
	}
	now, ids := b.now(), map[string]time.Time{}
	for _, g := range grants {
		until := end(g).Add(broker.Leeway)
		if now.After(until) {
			continue
		}
		good, err := active(g.ID)
		if err != nil {
			return fmt.Errorf("ssh: restoring the revocation list: %w", err)
		}
		if !good {
			ids[keyID(g.ID)] = until
		}
	}
	if len(ids) == 0 {
		return nil
	}
	if err := b.list.add(ids, now); err != nil {
		return fmt.Errorf("ssh: restoring the revocation list: %w", err)
	}
	return nil
}

func end(g broker.Grant) time.Time {
	if g.State == broker.StateHandle && g.Lease.Expires.IsZero() {
		return g.LatestEnd() // a crash may have lost the record of a certificate that was handed over
	}
	if g.Lease.Expires.After(g.Expires) {
		return g.Lease.Expires
	}
	return g.Expires
}

// Prove implements [broker.Prover]. It reads the file that the broker writes. That file alone proves nothing: sshd may
// read another one. The configured hosts or the configuration must confirm it.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	revoked, check := map[string]bool{}, "ssh: certificate expiry; there is no revocation list"
	if b.list != nil {
		var err error
		if revoked, err = b.list.listed(); err != nil {
			return nil, fmt.Errorf("ssh: reading the revocation list: %w", err)
		}
		check = "ssh: key revocation list at " + b.list.path
	}
	now := b.now().UTC()
	out := make([]broker.Evidence, len(grants))
	var listed []int
	for i, g := range grants {
		until := end(g).UTC().Format(time.RFC3339)
		e := broker.Evidence{At: now, Check: check, Outcome: broker.OutcomeAlive, Answer: "not listed; valid until " + until}
		switch {
		case now.After(end(g).Add(broker.Leeway)):
			e.Check, e.Outcome, e.Answer = "ssh: certificate expiry", broker.OutcomeDead, "expired at "+until
		case revoked[keyID(g.ID)]:
			listed = append(listed, i)
		}
		out[i] = e
	}
	if len(listed) > 0 {
		b.confirm(ctx, grants, listed, out)
	}
	for i, g := range grants {
		out[i] = g.WithObtained(out[i])
	}
	return out, nil
}

// confirm concludes about listed certificates.
func (b *Backend) confirm(ctx context.Context, grants []broker.Grant, listed []int, out []broker.Evidence) {
	var v verdict
	if b.prober != nil {
		var newest uint64
		for _, i := range listed {
			newest = max(newest, b.list.since(keyID(grants[i].ID)))
		}
		v = b.prober.ask(ctx, newest)
	}
	for _, i := range listed {
		e, since := &out[i], b.list.since(keyID(grants[i].ID))
		e.Outcome, e.Listed = broker.OutcomeDead, true
		const after = "sshd refuses new logins; sessions opened earlier continue"
		switch {
		case v.accepting != "":
			e.Outcome, e.Listed = broker.OutcomeAlive, false
			e.Answer = "listed, but sshd at " + v.accepting + " accepts a listed certificate: it reads another list"
		case since > 0 && since <= v.version:
			e.Answer = fmt.Sprintf("listed, and refused by sshd at all %d hosts: %s", len(b.prober.hosts), after)
		case b.inUse:
			e.Answer = "listed, and by the configuration sshd reads this file: " + after
		case b.prober != nil:
			e.Outcome, e.Listed = broker.OutcomeUnknown, false
			e.Answer = "listed, but nothing shows that sshd at " + v.unconfirmed + " reads this list"
		default:
			e.Outcome, e.Listed = broker.OutcomeUnknown, false
			e.Answer = "listed, but nothing shows that sshd reads this file: set krl_in_use, or hosts to ask"
		}
	}
}
