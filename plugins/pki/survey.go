package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Survey checks whether the certificates of an engine can be proven dead: each authority that can have issued them needs
// a valid revocation list or, where the engine makes no lists, an OCSP responder. It changes nothing. found describes
// the engine. The error names each authority without a list, and each right that the broker lacks.
func Survey(ctx context.Context, v Reader, mount string, now time.Time) (found string, err error) {
	b := &Backend{vault: v, now: func() time.Time { return now }}
	c, err := b.readConfig(ctx, mount)
	switch {
	case err != nil:
		return "", fmt.Errorf("%s/config/crl cannot be read: apply `pawl vault plan` again (%w)", mount, err)
	case c.listsOff && c.ocspOff:
		return "", fmt.Errorf("%s makes no revocation lists and has no OCSP responder: "+
			"no server can learn of a revocation, so set disable=false in %s/config/crl", mount, mount)
	}
	s := &issuers{vault: v, known: map[string]*x509.Certificate{}}
	all, err := s.of(ctx, mount)
	if err != nil {
		return "", fmt.Errorf("the authorities of %s: %w", mount, err)
	}
	keys := 0
	var faults []error
	for a, same := range all {
		for _, one := range same {
			if !one.key {
				continue // it was imported without its key, and has issued nothing here
			}
			keys++
			if c.listsOff {
				continue
			}
			if err := b.surveyList(ctx, mount, a, one); err != nil {
				faults = append(faults, err)
			}
		}
	}
	slices.SortFunc(faults, func(x, y error) int { return strings.Compare(x.Error(), y.Error()) })
	switch {
	case len(faults) > 0:
		return "", errors.Join(faults...)
	case keys == 0:
		return "", fmt.Errorf("%s has no authority that can issue a certificate", mount)
	case c.listsOff:
		return fmt.Sprintf("%s: %d authorities, no revocation lists, OCSP only", mount, keys), nil
	case c.delta:
		return fmt.Sprintf("%s: %d authorities, each has a revocation list; enable_delta is on: "+
			"give servers the complete list alone", mount, keys), nil
	}
	return fmt.Sprintf("%s: %d authorities, each has a revocation list", mount, keys), nil
}

// surveyList checks the list of one authority. Without crl-signing Vault goes on serving the last list until that
// expires, but puts no certificate on it, also where another authority on the same key may sign.
func (b *Backend) surveyList(ctx context.Context, mount string, a authority, one issuer) error {
	name := fmt.Sprintf("issuer %s (%s) of %s", one.id, one.cert.Subject, mount)
	data, err := read(ctx, b.vault, mount, "issuer", one.id)
	if err != nil {
		return fmt.Errorf("%s cannot be read: apply `pawl vault plan` again (%w)", name, err)
	}
	if usage, _ := data["usage"].(string); !slices.Contains(strings.Split(usage, ","), "crl-signing") {
		return fmt.Errorf("%s has no revocation list of its own: give its usage crl-signing, and rotate the lists", name)
	}
	l, err := b.list(ctx, nil, mount, "issuer", one.id, "crl", "der")
	switch {
	case err != nil:
		return fmt.Errorf("the list of %s: %w", name, err)
	case l.made.IsZero():
		return fmt.Errorf("%s has no revocation list: rotate the lists", name)
	case l.by != a:
		return fmt.Errorf("%s serves the list of another authority, %s", name, l.issuer)
	case !l.inForce(b.now()):
		return fmt.Errorf("the list of %s is not valid: it was due at %s, so set auto_rebuild in %s/config/crl", name,
			l.next.Format(time.RFC3339), mount)
	}
	return nil
}
