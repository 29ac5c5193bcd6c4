package jwt

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"strconv"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// signingKey is a transit key. Its newest version signs; every version that Vault still lists verifies.
type signingKey struct {
	version  int
	public   *ecdsa.PublicKey         // of version
	versions map[int]*ecdsa.PublicKey // includes public
	read     time.Time
}

// keyAge is the time for which a key is cached before it is read from Vault again.
const keyAge = time.Minute

func (b *Backend) key(ctx context.Context, path broker.VaultPath) (signingKey, error) {
	b.mu.Lock()
	k, ok := b.keys[path]
	b.mu.Unlock()
	if now := b.cfg.Now(); ok && now.Sub(k.read) < keyAge && !now.Before(k.read) {
		return k, nil
	}
	return b.readKey(ctx, path)
}

// readKey reads a key from Vault and caches it.
func (b *Backend) readKey(ctx context.Context, path broker.VaultPath) (k signingKey, err error) {
	data, err := b.cfg.Vault.Read(ctx, path.Insert(1, "keys"))
	if err == nil {
		k, err = parseKey(data)
	}
	var known *broker.Error
	if errors.As(err, &known) {
		return signingKey{}, err // Vault's own refusal, which says more
	}
	if err != nil {
		return signingKey{}, broker.Errorf(broker.Unavailable, "issue", "the signing key cannot be used").With(broker.CodeBackendDown).Because(err)
	}
	k.read = b.cfg.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keys[path] = k
	return k, nil
}

func parseKey(data map[string]any) (signingKey, error) {
	if data["type"] != "ecdsa-p256" {
		return signingKey{}, errors.New("jwt: the transit key must be of type ecdsa-p256")
	}
	latest, _ := data["latest_version"].(json.Number)
	version, err := strconv.Atoi(latest.String())
	if err != nil || version < 1 {
		return signingKey{}, errors.New("jwt: the transit key has no version")
	}
	k := signingKey{version: version, versions: map[int]*ecdsa.PublicKey{}}
	listed, _ := data["keys"].(map[string]any)
	for name, entry := range listed {
		n, err := strconv.Atoi(name)
		if err != nil {
			return signingKey{}, errors.New("jwt: the transit key has a version that is not a number")
		}
		if k.versions[n], err = parsePublic(entry); err != nil {
			return signingKey{}, err
		}
	}
	if k.public = k.versions[version]; k.public == nil {
		return signingKey{}, errors.New("jwt: the transit key has no public key")
	}
	return k, nil
}

func parsePublic(entry any) (*ecdsa.PublicKey, error) {
	fields, _ := entry.(map[string]any)
	text, _ := fields["public_key"].(string)
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("jwt: the transit key has no public key")
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, errors.New("jwt: the transit key's public key cannot be parsed")
	}
	ec, ok := public.(*ecdsa.PublicKey)
	if !ok || ec.Curve.Params().BitSize != 256 {
		return nil, errors.New("jwt: the transit key is not on P-256")
	}
	return ec, nil
}
