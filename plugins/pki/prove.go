package pki

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ocsp"
	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// Prove implements [broker.Prover]. A certificate is dead when it is on the revocation list that Vault serves for the
// certificate's own authority. Vault's own record of the revocation does not count: with auto_rebuild the list follows
// hours later. Prove then asks Vault to rebuild the list, once for the whole batch. Where the engine makes no lists and
// has an OCSP responder, the responder's answer counts. It also does for a few certificates of servers that ask it. A
// server that checks neither accepts the certificate until it expires. If the response of the mint was lost, only the
// certificate's expiry proves it dead. While the tool's servers may resume a session of the certificate, neither expiry
// nor, where they check no list then, the list proves it dead.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	out := make([]broker.Evidence, len(grants))
	mounts := map[string][]int{}
	for i, g := range grants {
		mount, _, _ := strings.Cut(g.Path.String(), "/")
		end, after := expiry(g), afterlifeOf(g)
		out[i] = broker.Evidence{At: b.now().UTC(), Check: "pki: certificate expiry"}
		expired := out[i].At.After(end.Add(broker.Leeway))
		switch {
		case expired && (after.listed || !out[i].At.Before(after.until)):
			out[i].Outcome, out[i].Answer = broker.OutcomeDead, "expired at "+end.Format(time.RFC3339)+" for new handshakes"
		case g.Lease.Ref == "" || mount == "":
			out[i].Answer = "the response of the mint was lost; a certificate from it expires by " + end.Format(time.RFC3339)
		default:
			mounts[mount] = append(mounts[mount], i)
		}
	}
	for mount, at := range mounts {
		p := newProof(b, mount, grants, out)
		if err := p.prove(ctx, at); err != nil {
			return nil, fmt.Errorf("pki: proving %d grants of %s: %w", len(at), mount, err)
		}
	}
	for i, g := range grants {
		afterlifeOf(g).allow(&out[i], out[i].At.After(expiry(g)))
	}
	return out, nil
}

// proof proves one batch of grants of one engine. The number of its requests to Vault does not grow with the batch, but
// for those to an OCSP responder. It fetches the list of each authority once for all certificates, requests at most one
// rebuild, and reads at most sampleSize certificates.
type proof struct {
	b       *Backend
	mount   string
	grants  []broker.Grant
	out     []broker.Evidence
	serials []string    // of each grant
	by      []authority // of each grant
	lists   map[authority]list
	issuers map[authority][]issuer // those that Vault has
	sample  map[int]record         // Vault's records of some certificates that were not on a list
}

func newProof(b *Backend, mount string, grants []broker.Grant, out []broker.Evidence) *proof {
	p := &proof{b: b, mount: mount, grants: grants, out: out, lists: map[authority]list{},
		serials: make([]string, len(grants)), by: make([]authority, len(grants))}
	for i, g := range grants {
		p.serials[i], p.by[i] = parseRef(g.Lease.Ref)
	}
	return p
}

// sampleSize is the number of unlisted certificates that a proof reads from Vault. They show whether Vault revoked any
// of them. The sample is random, so the next proof reads others.
const sampleSize = 16

// record is Vault's record of one certificate.
type record struct {
	revoked  bool
	issuer   string // Vault's id of the authority under which it is booked; empty: none, or an older Vault
	by       authority
	unstored bool // Vault has no such certificate
}

// prove asks the responder about a few certificates of servers that ask it: a list takes Vault longer the more
// certificates were revoked. For the others it checks the list of the engine's default authority first, which is usually
// the only one. Every list is fetched during the proof, so each certificate on it is already revoked.
func (p *proof) prove(ctx context.Context, rest []int) (err error) {
	if rest, err = p.concludeAsked(ctx, rest); err != nil || len(rest) == 0 {
		return err
	}
	if err := p.fetchList(ctx, rest, p.mount, "crl"); err != nil {
		return err
	}
	if rest = p.concludeListed(rest); len(rest) == 0 {
		return nil
	}
	if err := p.readSample(ctx, rest); err != nil {
		return err
	}
	if p.issuers == nil {
		if p.issuers, err = p.b.issuers.of(ctx, p.mount); err != nil {
			return err
		}
	}
	if err := p.fetchOwn(ctx, rest); err != nil { // other authorities, and revocations of a moment ago
		return err
	}
	rest = p.concludeListed(rest)
	why := ""
	if len(p.unlisted(rest)) > 0 {
		if rest, why, err = p.renew(ctx, rest); err != nil {
			return err
		}
	}
	for _, i := range rest {
		p.concludeUnlisted(i, why)
	}
	return nil
}

// renew gives revoked certificates that are on no list yet another chance: a new list or, if the engine makes no lists,
// its OCSP responder. It returns the grants still to be concluded, and the reason why none was of use.
func (p *proof) renew(ctx context.Context, rest []int) (_ []int, why string, err error) {
	c, err := p.b.readConfig(ctx, p.mount)
	switch {
	case err == nil && c.listsOff && c.ocspOff:
		return rest, ", and the engine's config/crl disables both its lists and its OCSP responder", nil
	case err == nil && c.listsOff:
		return p.concludeByOCSP(ctx, rest), ", and the engine makes no lists: config/crl has disable", nil
	}
	// Without the right to read config/crl the engine is taken to make lists.
	done, why := p.b.rebuilds.request(ctx, p.mount)
	if !done {
		return rest, why, nil
	}
	if err := p.fetchOwn(ctx, rest); err != nil {
		return nil, "", err
	}
	return p.concludeListed(rest), "", nil
}

// unlisted returns the authorities of sampled certificates that are revoked and on no list.
func (p *proof) unlisted(rest []int) []authority {
	found := map[authority]bool{}
	for _, i := range rest {
		if p.sample[i].revoked && len(p.issuers[p.by[i]]) > 0 {
			found[p.by[i]] = true
		}
	}
	return slices.Collect(maps.Keys(found))
}

// fetchOwn fetches the lists of the authorities that may have one of the certificates on a newer list.
func (p *proof) fetchOwn(ctx context.Context, rest []int) error {
	wanted := map[authority]bool{}
	for _, a := range p.unlisted(rest) {
		wanted[a] = true
	}
	for _, i := range rest {
		if _, fetched := p.lists[p.by[i]]; !fetched && len(p.issuers[p.by[i]]) > 0 {
			wanted[p.by[i]] = true
		}
	}
	for a := range wanted {
		if err := p.fetchList(ctx, rest, p.mount, "issuer", p.issuers[a][0].id, "crl", "der"); err != nil {
			return err
		}
	}
	return nil
}

// fetchList fetches the list at a path and keeps it as the list of the authority that it names.
func (p *proof) fetchList(ctx context.Context, at []int, path ...string) error {
	wanted := make(map[string]bool, len(at))
	for _, i := range at {
		wanted[serialBytes(p.serials[i])] = true
	}
	l, err := p.b.list(ctx, wanted, path...)
	if err == nil && l.by.known() {
		p.lists[l.by] = l
	}
	return err
}

// concludeListed concludes that the certificates on the lists of their own authorities are dead, and returns the others.
func (p *proof) concludeListed(at []int) (rest []int) {
	for _, i := range at {
		l := p.lists[p.by[i]]
		if !p.by[i].known() || !l.inForce(p.b.now()) || !l.has[serialBytes(p.serials[i])] {
			rest = append(rest, i)
			continue
		}
		p.conclude(i, broker.OutcomeDead, fmt.Sprintf(
			"on the list of %s, issued at %s; a server that checks no list accepts it until %s",
			l.issuer, l.made.Format(time.RFC3339), expiry(p.grants[i]).Format(time.RFC3339)))
		p.out[i].Listed = true
	}
	return rest
}

// concludeUnlisted concludes about a certificate that is on no list of its authority. why is the reason why no newer
// list shows it.
func (p *proof) concludeUnlisted(i int, why string) {
	r, read := p.sample[i]
	l, fetched := p.lists[p.by[i]]
	own := p.issuers[p.by[i]]
	switch {
	case read && r.unstored:
		p.conclude(i, "", "Vault does not know the certificate: the role has no_store, or another engine is mounted")
	case read && !r.revoked:
		p.conclude(i, broker.OutcomeAlive, "not revoked")
	case !p.by[i].known():
		p.conclude(i, "", "its authority is not recorded, or has no key id, so no list can be compared with it")
	case len(own) == 0 && !fetched:
		p.conclude(i, "", "its authority is gone from Vault, which can make no list of it: a server that trusts the "+
			"authority accepts the certificate until "+expiry(p.grants[i]).Format(time.RFC3339))
	default:
		where := "on no valid list that Vault serves"
		if l.inForce(p.b.now()) {
			where = fmt.Sprintf("not on the list of %s, issued at %s", l.issuer, l.made.Format(time.RFC3339))
		}
		if read {
			where = "revoked in Vault, but " + where + why
			if why == "" {
				where += booked(r, own)
			}
		}
		p.conclude(i, broker.OutcomeAlive, where)
	}
}

// booked returns why a revoked certificate is not on a list that was rebuilt since.
func booked(r record, own []issuer) string {
	switch {
	case r.issuer == "":
		return ""
	case slices.ContainsFunc(own, func(s issuer) bool { return s.id == r.issuer }):
		return "; it is booked under issuer " + r.issuer + ", which may not sign lists: give its usage crl-signing"
	}
	return "; it is booked on the list of issuer " + r.issuer + ", another authority"
}

func (p *proof) conclude(i int, o broker.Outcome, answer string) {
	p.out[i].Check, p.out[i].Outcome, p.out[i].Answer = "pki: the revocation list that Vault serves", o, answer
}

// maxAsked is the number of certificates about which one proof asks a responder. The next proof asks about others.
const maxAsked = 256

// concludeByOCSP asks the responder of an engine without lists about each certificate, and concludes that those which
// it calls revoked are dead. It returns the others, those without an answer among them.
func (p *proof) concludeByOCSP(ctx context.Context, rest []int) (others []int) {
	asked := slices.Clone(rest)
	rand.Shuffle(len(asked), func(i, k int) { asked[i], asked[k] = asked[k], asked[i] })
	asked = slices.DeleteFunc(asked, func(i int) bool { return len(p.issuers[p.by[i]]) == 0 })
	asked = asked[:min(maxAsked, len(asked))]
	answers := p.ask(ctx, asked)
	for _, i := range rest {
		if answers[i] == nil || answers[i].Status != ocsp.Revoked {
			others = append(others, i)
			continue
		}
		p.concludeRevoked(i, answers[i])
	}
	return others
}

// fewAsked is the largest number of certificates of one engine that a proof shows dead by its responder alone. A list
// shows more of them with fewer requests.
const fewAsked = 16

// concludeAsked concludes about a few certificates of servers that ask the responder. It returns the others, those
// without an answer among them.
func (p *proof) concludeAsked(ctx context.Context, rest []int) (others []int, err error) {
	var asked []int
	for _, i := range rest {
		if asksFor(p.grants[i].Lease.Ref) {
			asked = append(asked, i)
		}
	}
	if len(asked) == 0 || len(asked) > fewAsked {
		return rest, nil
	}
	if p.issuers, err = p.b.issuers.of(ctx, p.mount); err != nil {
		return nil, err
	}
	asked = slices.DeleteFunc(asked, func(i int) bool { return len(p.issuers[p.by[i]]) == 0 })
	answers := p.ask(ctx, asked)
	for _, i := range rest {
		switch a := answers[i]; {
		case a == nil || a.Status != ocsp.Revoked && a.Status != ocsp.Good:
			others = append(others, i)
		case a.Status == ocsp.Revoked:
			p.concludeRevoked(i, a)
		default:
			p.conclude(i, broker.OutcomeAlive, "not revoked")
			p.out[i].Check = checkOCSP
		}
	}
	return others, nil
}

// ask asks the responder about certificates whose authorities Vault has. The result has no answer where none came.
func (p *proof) ask(ctx context.Context, about []int) []*ocsp.Response {
	answers := make([]*ocsp.Response, len(p.grants))
	var g errgroup.Group
	g.SetLimit(8)
	for _, i := range about {
		g.Go(func() error {
			answer, err := askOCSP(ctx, p.b.vault, p.mount, p.issuers[p.by[i]][0].cert, p.serials[i], p.b.now())
			if err == nil {
				answers[i] = answer
			}
			return nil // without an answer it stays as it is
		})
	}
	_ = g.Wait() // none of them fails
	return answers
}

const checkOCSP = "pki: the OCSP responder that Vault serves"

func (p *proof) concludeRevoked(i int, a *ocsp.Response) {
	p.conclude(i, broker.OutcomeDead, fmt.Sprintf(
		"revoked at %s, by the OCSP responder for %s; a server that does not ask accepts it until %s",
		a.RevokedAt.UTC().Format(time.RFC3339), p.issuers[p.by[i]][0].cert.Subject, expiry(p.grants[i]).Format(time.RFC3339)))
	p.out[i].Check, p.out[i].Listed = checkOCSP, true
}

// config is an engine's configuration of its lists.
type config struct {
	listsOff bool // it makes no lists, and serves an empty one
	ocspOff  bool // it has no OCSP responder
	delta    bool // it makes delta lists
}

func (b *Backend) readConfig(ctx context.Context, mount string) (config, error) {
	data, err := read(ctx, b.vault, mount, "config", "crl")
	if err != nil {
		return config{}, err
	}
	var c config
	c.listsOff, _ = data["disable"].(bool)
	c.ocspOff, _ = data["ocsp_disable"].(bool)
	c.delta, _ = data["enable_delta"].(bool)
	return c, nil
}

// listTimeout bounds the fetch of a list.
const listTimeout = 20 * time.Second

// list fetches and parses a list. An engine may have none: the result is then empty.
func (b *Backend) list(ctx context.Context, wanted map[string]bool, path ...string) (list, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	der, err := fetch(ctx, b.vault, maxList, path...)
	if err != nil || len(der) == 0 {
		return list{}, err
	}
	return parseList(der, wanted)
}

// readSample reads a random sample of the certificates from Vault, eight at a time. It learns the authority of
// certificates of an earlier version, which recorded the serial number alone.
func (p *proof) readSample(ctx context.Context, rest []int) error {
	some := slices.Clone(rest)
	rand.Shuffle(len(some), func(i, k int) { some[i], some[k] = some[k], some[i] })
	some = some[:min(sampleSize, len(some))]
	found, errs := make([]record, len(some)), make([]error, len(some))
	var g errgroup.Group
	g.SetLimit(8)
	for n, i := range some {
		g.Go(func() error {
			found[n], errs[n] = p.certificate(ctx, p.serials[i])
			return nil
		})
	}
	_ = g.Wait() // errs has every error
	p.sample = make(map[int]record, len(some))
	for n, i := range some {
		p.sample[i] = found[n]
		if !p.by[i].known() {
			p.by[i] = found[n].by
		}
	}
	return errors.Join(errs...)
}

func (p *proof) certificate(ctx context.Context, serial string) (record, error) {
	data, err := read(ctx, p.b.vault, p.mount, "cert", strings.ReplaceAll(serial, ":", "-"))
	if err != nil {
		return record{}, err
	}
	revoked, _ := data["revocation_time"].(json.Number)
	at, err := revoked.Int64()
	r := record{unstored: data == nil || err != nil, revoked: at > 0}
	r.issuer, _ = data["issuer_id"].(string)
	text, _ := data["certificate"].(string)
	if block, _ := pem.Decode([]byte(text)); block != nil {
		if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
			r.by = issuerOf(cert)
		}
	}
	return r, nil
}
