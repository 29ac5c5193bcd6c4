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
	// KRL is the path of the key revocation list, sshd's RevokedKeys. Its directory must exist, and only one process
	// may write the file. The platform distributes it to other hosts. Empty: no list, and certificates work until they
	// expire.
	KRL string
	Now func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend], [broker.Severer] and [broker.Prover]. Safe for
// concurrent use.
type Backend struct {
	list *list // nil: there is none
	now  func() time.Time
}

// New returns a Backend. It reads the revocation list, so that revoked certificates stay revoked, and then writes it:
// sshd refuses every login while the file is missing.
func New(cfg Config) (*Backend, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	b := &Backend{now: cfg.Now}
	if cfg.KRL == "" {
		return b, nil
	}
	var err error
	if b.list, err = openList(cfg.KRL, cfg.Now()); err != nil {
		return nil, fmt.Errorf("ssh: opening the revocation list %q: %w", cfg.KRL, err)
	}
	return b, nil
}

// Access returns the Vault path of the tool's mint, whether the mint is a write, and whether it yields a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return t.Path.Insert(1, "sign"), true, false
}

// keyID returns the key id of a grant's certificate. It is known before the mint, unlike the serial number. So a
// certificate can be revoked even if the response of its mint was lost.
func keyID(id broker.GrantID) string { return "pawl-" + string(id) }

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
		Path: path, TTL: want.life,
		Data: map[string]any{
			"public_key": string(ssh.MarshalAuthorizedKey(want.key)), "cert_type": "user", "key_id": want.keyID, "valid_principals": want.principal,
			"ttl": strconv.FormatInt(int64(want.life/time.Second), 10) + "s", "critical_options": want.options, "extensions": want.extensions,
		},
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) {
			return b.finish(answer, want, private)
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
	latest := now.Add(want.life + time.Second)
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
func (b *Backend) Sever(_ context.Context, grants []broker.Grant) error {
	if b.list == nil || len(grants) == 0 {
		return nil
	}
	now := b.now()
	ids := make(map[string]time.Time, len(grants))
	for _, g := range grants {
		ids[keyID(g.ID)] = end(g).Add(leeway)
	}
	if err := b.list.add(ids, now); err != nil {
		return fmt.Errorf("ssh: writing the revocation list: %w", err)
	}
	return nil
}

// leeway is the greatest accepted lag of a target's clock.
const leeway = time.Minute

func end(g broker.Grant) time.Time {
	if g.Lease.Expires.After(g.Expires) {
		return g.Lease.Expires
	}
	return g.Expires
}

// Prove implements [broker.Prover]. It reads the file that sshd reads.
func (b *Backend) Prove(_ context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	revoked := map[string]bool{}
	check := "ssh: certificate expiry; there is no revocation list"
	if b.list != nil {
		ids, err := b.list.read()
		if err != nil {
			return nil, fmt.Errorf("ssh: reading the revocation list: %w", err)
		}
		for _, id := range ids {
			revoked[id] = true
		}
		check = "ssh: key revocation list at " + b.list.path
	}
	now := b.now().UTC()
	out := make([]broker.Evidence, len(grants))
	for i, g := range grants {
		until := end(g).UTC().Format(time.RFC3339)
		e := broker.Evidence{At: now, Check: check, Outcome: broker.OutcomeAlive, Answer: "not listed; valid until " + until}
		switch {
		case now.After(end(g).Add(leeway)):
			e.Check, e.Outcome, e.Answer = "ssh: certificate expiry", broker.OutcomeDead, "expired at "+until
		case revoked[keyID(g.ID)]:
			e.Listed, e.Outcome = true, broker.OutcomeDead
			e.Answer = "listed: sshd refuses new logins; sessions opened earlier continue"
		}
		out[i] = e
	}
	return out, nil
}
