package pki

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// list is a revocation list as relying parties get it.
type list struct {
	issuer  string // the authority's name
	made    time.Time
	next    time.Time
	serials map[string]bool
}

// Prove implements [broker.Prover]. A certificate is dead when the list that Vault serves has it:
// that Vault revoked it says nothing yet, since with auto_rebuild the list follows hours later.
// Then Vault is asked, once for all, to make the list anew. A server that looks at no list takes
// the certificate until its end. Where the answer of the mint was lost only time proves.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	out := make([]broker.Evidence, len(grants))
	mounts := map[string][]int{}
	for i, g := range grants {
		mount, _, _ := strings.Cut(g.Path, "/")
		end := ends(g)
		out[i] = broker.Evidence{At: b.now().UTC(), Check: "pki: the certificate's end"}
		switch {
		case out[i].At.After(end.Add(2 * time.Second)):
			out[i].Outcome, out[i].Answer = broker.OutcomeDead, "it ended at "+end.Format(time.RFC3339)
		case g.Lease.Ref == "" || mount == "":
			out[i].Answer = "the answer of the mint was lost; what it made ends by " + end.Format(time.RFC3339)
		default:
			mounts[mount] = append(mounts[mount], i)
		}
	}
	for mount, at := range mounts {
		p := proof{b: b, mount: mount, grants: grants, out: out}
		if err := p.prove(ctx, at); err != nil {
			return nil, fmt.Errorf("pki: proving %d grants of %s: %w", len(at), mount, err)
		}
	}
	return out, nil
}

// ends is when a grant's certificate ends by itself.
func ends(g broker.Grant) time.Time {
	if g.Lease.Expires.After(g.Expires) {
		return g.Lease.Expires.UTC()
	}
	return g.Expires.UTC()
}

// proof is one batch at one engine.
type proof struct {
	b      *Backend
	mount  string
	grants []broker.Grant
	out    []broker.Evidence
}

// known is what Vault says of one certificate.
type known struct {
	revoked  time.Time // zero: it is not
	issuer   string    // Vault's id of the authority that revoked it
	unstored bool      // Vault does not know it
}

func (p proof) prove(ctx context.Context, at []int) error {
	served, err := p.list(ctx, []string{p.mount, "cert", "crl"}, "certificate")
	if err != nil {
		return err
	}
	at = p.settle(at, served, nil)
	if len(at) == 0 {
		return nil
	}
	certificates, err := p.certificates(ctx, at)
	if err != nil {
		return err
	}
	late := map[string][]int{} // by issuer: revoked, and not in a list that was looked at
	for n, i := range at {
		switch c := certificates[n]; {
		case c.unstored:
			p.say(i, "", "Vault does not know the certificate: the role has no_store, or another engine is mounted")
		case c.revoked.IsZero():
			p.say(i, broker.OutcomeAlive, "not revoked")
		default:
			late[c.issuer] = append(late[c.issuer], i)
		}
	}
	if len(late) == 0 {
		return nil
	}
	rotated := false
	for issuer, at := range late {
		path, member := []string{p.mount, "issuer", issuer, "crl"}, "crl"
		if issuer == "" { // an engine of before Vault had several issuers
			path, member = []string{p.mount, "cert", "crl"}, "certificate"
		}
		if at, err = p.look(ctx, path, member, at, nil); err != nil || len(at) == 0 {
			if err != nil {
				return err
			}
			continue
		}
		var refused error
		if !rotated {
			_, refused = p.b.vault.Read(ctx, []string{p.mount, "crl", "rotate"})
			rotated = refused == nil
		}
		if _, err := p.look(ctx, path, member, at, refused); err != nil {
			return err
		}
	}
	return nil
}

// look judges certificates by one list, and gives those that it does not have.
func (p proof) look(ctx context.Context, path []string, member string, at []int, refused error) ([]int, error) {
	served, err := p.list(ctx, path, member)
	if err != nil {
		return nil, err
	}
	return p.settle(at, served, refused), nil
}

// settle calls dead what a list has, and says of the rest, which it gives, that it does not.
func (p proof) settle(at []int, l list, refused error) (rest []int) {
	now := p.b.now()
	for _, i := range at {
		g := p.grants[i]
		switch {
		case l.serials[g.Lease.Ref] && now.Before(l.next):
			p.say(i, broker.OutcomeDead, fmt.Sprintf("on the list of %s of %s; a server that checks no list takes it until %s",
				l.issuer, l.made.Format(time.RFC3339), ends(g).Format(time.RFC3339)))
			p.out[i].Listed = true
			continue
		case l.made.IsZero() || !now.Before(l.next):
			p.say(i, broker.OutcomeAlive, "revoked in Vault, which serves no list in force that says so")
		case refused != nil:
			p.say(i, broker.OutcomeAlive, fmt.Sprintf("revoked in Vault, but not on the list of %s of %s, and Vault makes no other when asked", l.issuer, l.made.Format(time.RFC3339)))
		default:
			p.say(i, broker.OutcomeAlive, fmt.Sprintf("revoked in Vault, but not on the list of %s of %s", l.issuer, l.made.Format(time.RFC3339)))
		}
		rest = append(rest, i)
	}
	return rest
}

func (p proof) say(i int, o broker.Outcome, answer string) {
	p.out[i].Check, p.out[i].Outcome, p.out[i].Answer = "pki: the revocation list that Vault serves", o, answer
}

// list reads a list, which an engine may be without.
func (p proof) list(ctx context.Context, path []string, member string) (list, error) {
	data, err := p.b.vault.Read(ctx, path)
	if err != nil {
		return list{}, err
	}
	text, _ := data[member].(string)
	if text == "" {
		return list{}, nil
	}
	return parseList(text)
}

// parseList reads a list in PEM, alone.
func parseList(text string) (list, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "X509 CRL" || len(strings.TrimSpace(string(rest))) > 0 {
		return list{}, errors.New("what Vault serves is not one revocation list")
	}
	crl, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		return list{}, errors.New("the revocation list that Vault serves cannot be read")
	}
	l := list{issuer: crl.Issuer.String(), made: crl.ThisUpdate.UTC(), next: crl.NextUpdate, serials: make(map[string]bool, len(crl.RevokedCertificateEntries))}
	for _, e := range crl.RevokedCertificateEntries {
		if e.ReasonCode != removed {
			l.serials[number(e.SerialNumber)] = true
		}
	}
	return l, nil
}

// removed is the reason by which a list takes a certificate off an earlier one (RFC 5280, 5.3.1).
const removed = 8

// certificates asks for each, eight at once.
func (p proof) certificates(ctx context.Context, at []int) ([]known, error) {
	found, errs := make([]known, len(at)), make([]error, len(at))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for n, i := range at {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			found[n], errs[n] = p.certificate(ctx, p.grants[i].Lease.Ref)
		})
	}
	wg.Wait()
	return found, errors.Join(errs...)
}

func (p proof) certificate(ctx context.Context, serial string) (known, error) {
	data, err := p.b.vault.Read(ctx, []string{p.mount, "cert", strings.ReplaceAll(serial, ":", "-")})
	if err != nil {
		return known{}, err
	}
	revoked, _ := data["revocation_time"].(json.Number)
	at, err := revoked.Int64()
	k := known{unstored: data == nil || err != nil}
	if at > 0 {
		k.revoked = time.Unix(at, 0).UTC()
	}
	k.issuer, _ = data["issuer_id"].(string)
	return k, nil
}
