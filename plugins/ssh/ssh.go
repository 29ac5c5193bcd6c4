// Package ssh gives a step a key of its own with a certificate from Vault's SSH engine that lets
// it in as one principal, for one command, and cuts certificates by a key revocation list that
// sshd reads at every login.
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

// Config says what the backend stands on.
type Config struct {
	// KRL is the file of the key revocation list, sshd's RevokedKeys. The directory must exist and
	// one process writes it; bringing the file to other hosts is the platform's matter. Empty:
	// certificates live to their end.
	KRL string
	Now func() time.Time // zero: time.Now
}

// Backend implements [broker.Backend], [broker.Severer] and [broker.Prover]. Safe for
// concurrent use.
type Backend struct {
	list *list // nil: none
	now  func() time.Time
}

// New makes a Backend. It reads the revocation list, so that what was revoked stays so, and
// writes it, so that sshd, which lets nobody in while the file is missing, finds one.
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

// Access gives the Vault path of the tool's mint and how it is used there.
func (b *Backend) Access(t broker.Tool) (path []string, write, leased bool) {
	return []string{t.Path[0], "sign", t.Path[1]}, true, false
}

// keyID is what the certificate of a grant is called. It is known before the mint, so that a
// certificate whose answer was lost can be revoked too, which its serial number could not.
func keyID(id broker.GrantID) string { return "pawl-" + string(id) }

// Prepare implements [broker.Backend]. The private key is made here and never leaves memory but
// in the secret.
func (b *Backend) Prepare(_ context.Context, t broker.Tool, g broker.Grant) (broker.Mint, string, error) {
	s, err := load(t)
	if err != nil {
		return broker.Mint{}, "", err
	}
	w, err := s.wants(g.Args)
	if err != nil {
		return broker.Mint{}, "", broker.Errorf(broker.Malformed, "issue", "%s", err).With(broker.CodeArgumentOutside)
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return broker.Mint{}, "", fmt.Errorf("ssh: making a key: %w", err)
	}
	if w.key, err = ssh.NewPublicKey(public); err != nil {
		return broker.Mint{}, "", fmt.Errorf("ssh: making a key: %w", err)
	}
	w.keyID = keyID(g.ID)
	w.life = (g.Expires.Sub(b.now()) + time.Second - 1).Truncate(time.Second)
	path, _, _ := b.Access(t)
	return broker.Mint{
		Path: path, TTL: w.life,
		Data: map[string]any{
			"public_key": string(ssh.MarshalAuthorizedKey(w.key)), "cert_type": "user", "key_id": w.keyID, "valid_principals": w.principal,
			"ttl": strconv.FormatInt(int64(w.life/time.Second), 10) + "s", "critical_options": w.options, "extensions": w.extensions,
		},
		Finish: func(answer map[string]any, _ time.Time) (broker.Finished, error) { return b.finish(answer, w, private) },
	}, string(g.ID), nil
}

// wants is what a certificate is asked to be.
type wants struct {
	key        ssh.PublicKey
	keyID      string
	principal  string
	options    map[string]string
	extensions map[string]string
	life       time.Duration
}

// finish refuses a certificate that is anything but what was asked for: a role may add
// extensions, principals or time.
func (b *Backend) finish(answer map[string]any, w wants, private ed25519.PrivateKey) (broker.Finished, error) {
	text, _ := answer["signed_key"].(string)
	key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(text))
	cert, ok := key.(*ssh.Certificate)
	if err != nil || !ok || len(rest) > 0 {
		return broker.Finished{}, errors.New("ssh: the answer is not a certificate")
	}
	end, err := w.check(cert, b.now())
	if err != nil {
		return broker.Finished{}, err
	}
	block, err := ssh.MarshalPrivateKey(private, w.keyID)
	if err != nil {
		return broker.Finished{}, errors.New("ssh: encoding the private key")
	}
	privateKey := string(pem.EncodeToMemory(block))
	raw, err := json.Marshal(map[string]string{
		"private_key": privateKey, "certificate": text, "principal": w.principal, "key_id": w.keyID,
	})
	clear(block.Bytes)
	if err != nil {
		return broker.Finished{}, errors.New("ssh: encoding the secret")
	}
	return broker.Finished{Secret: broker.NewSecret(raw), Ref: fmt.Sprintf("%s serial %d", w.keyID, cert.Serial), Expires: end,
		Digests: []broker.ValueDigest{broker.DigestValue(privateKey), broker.DigestValue(text)}}, nil
}

func (w wants) check(cert *ssh.Certificate, now time.Time) (end time.Time, err error) {
	checker := ssh.CertChecker{SupportedCriticalOptions: slices.Collect(maps.Keys(w.options)), Clock: func() time.Time { return now }}
	latest := now.Add(w.life + time.Second)
	switch {
	case cert.CertType != ssh.UserCert || string(cert.Key.Marshal()) != string(w.key.Marshal()):
		return end, errors.New("ssh: the certificate is not a user's, or of another key")
	case cert.KeyId != w.keyID:
		return end, errors.New("ssh: the certificate has another key id: set allow_user_key_ids of the role")
	case !slices.Equal(cert.ValidPrincipals, []string{w.principal}):
		return end, errors.New("ssh: the certificate's principals are not exactly the step's")
	case !maps.Equal(cert.CriticalOptions, w.options) || !maps.Equal(cert.Extensions, w.extensions):
		return end, errors.New("ssh: the certificate's options or extensions are not exactly the step's: clear default_extensions and default_critical_options of the role")
	case cert.ValidBefore > uint64(latest.Unix()):
		return end, errors.New("ssh: the certificate lives longer than the step")
	}
	if err := checker.CheckCert(w.principal, cert); err != nil {
		return end, errors.New("ssh: the certificate is not valid now, or its signature is wrong")
	}
	return time.Unix(int64(cert.ValidBefore), 0).UTC(), nil
}

// Sever implements [broker.Severer]: one new list for all. Sessions that are open run on; a
// forced command and ClientAliveInterval at the target bound them.
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

// leeway is how far behind a target's clock may be.
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
	check := "ssh: the certificate's end; there is no revocation list"
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
			e.Check, e.Outcome, e.Answer = "ssh: the certificate's end", broker.OutcomeDead, "it ended at "+until
		case revoked[keyID(g.ID)]:
			e.Listed, e.Outcome, e.Answer = true, broker.OutcomeDead, "listed: sshd refuses new logins; a session opened before runs on"
		}
		out[i] = e
	}
	return out, nil
}
