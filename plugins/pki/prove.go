package pki

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pawlsec/pawl/broker"
)

// Prove implements [broker.Prover]. A certificate is dead when it is on the revocation list that Vault serves. Vault's
// own record of the revocation does not count: with auto_rebuild the list follows hours later. Prove then asks Vault
// to rebuild the list, once for the whole batch. A server that checks no list accepts the certificate until it
// expires. If the response of the mint was lost, only the certificate's expiry proves it dead.
func (b *Backend) Prove(ctx context.Context, grants []broker.Grant) ([]broker.Evidence, error) {
	out := make([]broker.Evidence, len(grants))
	mounts := map[string][]int{}
	for i, g := range grants {
		mount, _, _ := strings.Cut(g.Path.String(), "/")
		end := expiry(g)
		out[i] = broker.Evidence{At: b.now().UTC(), Check: "pki: certificate expiry"}
		switch {
		case out[i].At.After(end.Add(2 * time.Second)):
			out[i].Outcome, out[i].Answer = broker.OutcomeDead, "expired at "+end.Format(time.RFC3339)
		case g.Lease.Ref == "" || mount == "":
			out[i].Answer = "the response of the mint was lost; a certificate from it expires by " + end.Format(time.RFC3339)
		default:
			mounts[mount] = append(mounts[mount], i)
		}
	}
	for mount, at := range mounts {
		p := &proof{b: b, mount: mount, grants: grants, out: out}
		if err := p.prove(ctx, at); err != nil {
			return nil, fmt.Errorf("pki: proving %d grants of %s: %w", len(at), mount, err)
		}
	}
	return out, nil
}

// expiry returns the time by which a grant's certificate expires.
func expiry(g broker.Grant) time.Time {
	if g.Lease.Expires.After(g.Expires) {
		return g.Lease.Expires.UTC()
	}
	return g.Expires.UTC()
}

// proof proves one batch of grants of one engine. Its number of requests to Vault does not grow with the batch. It
// fetches a list once for all certificates, requests at most one rebuild, and reads at most sampleSize certificates.
type proof struct {
	b      *Backend
	mount  string
	grants []broker.Grant
	out    []broker.Evidence
	sample map[int]record // Vault's records of some certificates that were not on the list
}

// sampleSize is the number of unlisted certificates that a proof reads from Vault. They show whether Vault revoked any
// of them, and under which authorities. The sample is random, so the next proof reads others.
const sampleSize = 16

// record is Vault's record of one certificate.
type record struct {
	revoked  bool
	issuer   string // Vault's id of the authority that revoked it; empty: a Vault older than multiple issuers
	unstored bool   // Vault has no such certificate
}

// prove checks the list of the engine's default authority first: usually it is the only one. Every list is fetched
// during the proof, so each certificate on it is already revoked.
func (p *proof) prove(ctx context.Context, rest []int) error {
	rest, err := p.checkList(ctx, "", rest)
	if err != nil || len(rest) == 0 {
		return err
	}
	if err := p.readSample(ctx, rest); err != nil {
		return err
	}
	if rest, err = p.checkIssuers(ctx, rest); err != nil { // other authorities, and revocations of a moment ago
		return err
	}
	why := ""
	if len(p.unlistedIssuers(rest)) > 0 {
		var rebuilt bool
		if rebuilt, why = p.b.rebuild(ctx, p.mount); rebuilt {
			if rest, err = p.checkIssuers(ctx, rest); err != nil {
				return err
			}
		}
	}
	for _, i := range rest {
		switch r, read := p.sample[i]; {
		case !read:
		case r.unstored:
			p.conclude(i, "", "Vault does not know the certificate: the role has no_store, or another engine is mounted")
		case !r.revoked:
			p.conclude(i, broker.OutcomeAlive, "not revoked")
		default:
			p.conclude(i, broker.OutcomeAlive, "revoked in Vault, but "+p.out[i].Answer+why)
		}
	}
	return nil
}

// unlistedIssuers returns the authorities that revoked a sampled certificate which was on no checked list.
func (p *proof) unlistedIssuers(rest []int) []string {
	issuers := map[string]bool{}
	for _, i := range rest {
		if r := p.sample[i]; r.revoked {
			issuers[r.issuer] = true
		}
	}
	return slices.Sorted(maps.Keys(issuers))
}

func (p *proof) checkIssuers(ctx context.Context, rest []int) (_ []int, err error) {
	for _, issuer := range p.unlistedIssuers(rest) {
		if rest, err = p.checkList(ctx, issuer, rest); err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// checkList concludes that the certificates on an authority's list are dead. It returns the others, with evidence that
// they are not listed. An empty issuer is the default authority.
func (p *proof) checkList(ctx context.Context, issuer string, at []int) (rest []int, err error) {
	path, err := broker.VaultPathOf(p.mount, "crl")
	if issuer != "" {
		path, err = broker.VaultPathOf(p.mount, "issuer", issuer, "crl", "der")
	}
	if err != nil {
		return nil, err
	}
	wanted := make(map[string]bool, len(at))
	for _, i := range at {
		wanted[serialBytes(p.grants[i].Lease.Ref)] = true
	}
	l, err := p.b.list(ctx, path, wanted)
	if err != nil {
		return nil, err
	}
	inForce := !l.made.IsZero() && p.b.now().Before(l.next)
	for _, i := range at {
		g := p.grants[i]
		if inForce && l.has[serialBytes(g.Lease.Ref)] {
			p.conclude(i, broker.OutcomeDead, fmt.Sprintf(
				"on the list of %s, issued at %s; a server that checks no list accepts it until %s",
				l.issuer, l.made.Format(time.RFC3339), expiry(g).Format(time.RFC3339)))
			p.out[i].Listed = true
			continue
		}
		rest = append(rest, i)
		switch r, read := p.sample[i]; {
		case read && issuer != r.issuer:
		case inForce:
			p.conclude(i, broker.OutcomeAlive,
				fmt.Sprintf("not on the list of %s, issued at %s", l.issuer, l.made.Format(time.RFC3339)))
		default:
			p.conclude(i, broker.OutcomeAlive, "on no valid list that Vault serves")
		}
	}
	return rest, nil
}

func (p *proof) conclude(i int, o broker.Outcome, answer string) {
	p.out[i].Check, p.out[i].Outcome, p.out[i].Answer = "pki: the revocation list that Vault serves", o, answer
}

// listTimeout bounds the fetch of a list.
const listTimeout = 20 * time.Second

// list fetches and parses a list. An engine may have none: the result is then empty.
func (b *Backend) list(ctx context.Context, path broker.VaultPath, wanted map[string]bool) (list, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	der, err := b.vault.Fetch(ctx, path, maxList)
	if err != nil || len(der) == 0 {
		return list{}, err
	}
	return parseList(der, wanted)
}

// rebuild is the state of rebuilding an engine's lists. The cost of a rebuild grows with the lists, and Vault revokes
// nothing meanwhile.
type rebuild struct {
	running bool
	until   time.Time // no other before
}

// rebuild asks Vault to rebuild the engine's lists, and waits for that. Rebuilds take a third of Vault's time at most,
// regardless of the number of proofs: a certificate revoked during one rebuild waits for the next.
func (b *Backend) rebuild(ctx context.Context, mount string) (done bool, why string) {
	began := b.now()
	b.mu.Lock()
	last := b.rebuilds[mount]
	if last.running || began.Before(last.until) {
		b.mu.Unlock()
		return false, ", and a rebuild of the list was requested a moment ago"
	}
	b.rebuilds[mount] = rebuild{running: true}
	b.mu.Unlock()
	path, err := broker.VaultPathOf(mount, "crl", "rotate")
	if err == nil {
		_, err = b.vault.Fetch(ctx, path, 1<<20)
	}
	ended := b.now()
	b.mu.Lock()
	b.rebuilds[mount] = rebuild{until: ended.Add(2 * ended.Sub(began))}
	b.mu.Unlock()
	if err != nil {
		return false, ", and Vault does not rebuild the list on request"
	}
	return true, ""
}

// readSample reads a random sample of the certificates from Vault, eight at a time.
func (p *proof) readSample(ctx context.Context, rest []int) error {
	some := slices.Clone(rest)
	rand.Shuffle(len(some), func(i, k int) { some[i], some[k] = some[k], some[i] })
	some = some[:min(sampleSize, len(some))]
	found, errs := make([]record, len(some)), make([]error, len(some))
	var g errgroup.Group
	g.SetLimit(8)
	for n, i := range some {
		g.Go(func() error {
			found[n], errs[n] = p.certificate(ctx, p.grants[i].Lease.Ref)
			return nil
		})
	}
	_ = g.Wait() // errs has every error
	p.sample = make(map[int]record, len(some))
	for n, i := range some {
		p.sample[i] = found[n]
	}
	return errors.Join(errs...)
}

func (p *proof) certificate(ctx context.Context, serial string) (record, error) {
	path, err := broker.VaultPathOf(p.mount, "cert", strings.ReplaceAll(serial, ":", "-"))
	if err != nil {
		return record{}, err
	}
	data, err := p.b.vault.Read(ctx, path)
	if err != nil {
		return record{}, err
	}
	revoked, _ := data["revocation_time"].(json.Number)
	at, err := revoked.Int64()
	r := record{unstored: data == nil || err != nil, revoked: at > 0}
	r.issuer, _ = data["issuer_id"].(string)
	return r, nil
}
