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

// Prove implements [broker.Prover]. A certificate is dead when the list that Vault serves has it:
// that Vault revoked it says nothing yet, since with auto_rebuild the list follows hours later.
// Then Vault is asked, once for all of a batch, to make the list anew. A server that looks at no list takes
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
		p := &proof{b: b, mount: mount, grants: grants, out: out}
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

// proof is one batch at one engine. What it asks of Vault does not grow with the batch: a list is fetched for all of
// it at once, lists are made anew at most once, and at most sample certificates are asked about one by one.
type proof struct {
	b      *Backend
	mount  string
	grants []broker.Grant
	out    []broker.Evidence
	asked  map[int]known // what Vault said of certificates that were not on the list
}

// sample is how many certificates that are not on the list Vault is asked about, to learn whether it has revoked any,
// and under which authorities. The next proof asks about others, chosen at random.
const sample = 16

// known is what Vault says of one certificate.
type known struct {
	revoked  bool
	issuer   string // Vault's id of the authority that revoked it; empty: an engine of before Vault had several
	unstored bool   // Vault does not know it
}

// prove looks at the list of the engine's default authority, which as a rule is all there is to see. Each list is
// fetched after this proof began: what it has was revoked before.
func (p *proof) prove(ctx context.Context, rest []int) error {
	rest, err := p.look(ctx, "", rest)
	if err != nil || len(rest) == 0 {
		return err
	}
	if err := p.ask(ctx, rest); err != nil {
		return err
	}
	if rest, err = p.lookAgain(ctx, rest); err != nil { // others' lists, and what was revoked a moment ago
		return err
	}
	why := ""
	if len(p.late(rest)) > 0 {
		var renewed bool
		if renewed, why = p.b.renew(ctx, p.mount); renewed {
			if rest, err = p.lookAgain(ctx, rest); err != nil {
				return err
			}
		}
	}
	for _, i := range rest {
		switch k, asked := p.asked[i]; {
		case !asked:
		case k.unstored:
			p.say(i, "", "Vault does not know the certificate: the role has no_store, or another engine is mounted")
		case !k.revoked:
			p.say(i, broker.OutcomeAlive, "not revoked")
		default:
			p.say(i, broker.OutcomeAlive, "revoked in Vault, but "+p.out[i].Answer+why)
		}
	}
	return nil
}

// late gives the authorities under which Vault has revoked what is on no list that was looked at.
func (p *proof) late(rest []int) []string {
	issuers := map[string]bool{}
	for _, i := range rest {
		if k := p.asked[i]; k.revoked {
			issuers[k.issuer] = true
		}
	}
	return slices.Sorted(maps.Keys(issuers))
}

func (p *proof) lookAgain(ctx context.Context, rest []int) (_ []int, err error) {
	for _, issuer := range p.late(rest) {
		if rest, err = p.look(ctx, issuer, rest); err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// look calls dead what an authority's list has, and says of the rest, which it gives, that it does not. An empty
// issuer is the default authority.
func (p *proof) look(ctx context.Context, issuer string, at []int) (rest []int, err error) {
	path := []string{p.mount, "crl"}
	if issuer != "" {
		path = []string{p.mount, "issuer", issuer, "crl", "der"}
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
			p.say(i, broker.OutcomeDead, fmt.Sprintf("on the list of %s of %s; a server that checks no list takes it until %s",
				l.issuer, l.made.Format(time.RFC3339), ends(g).Format(time.RFC3339)))
			p.out[i].Listed = true
			continue
		}
		rest = append(rest, i)
		switch k, asked := p.asked[i]; {
		case asked && issuer != k.issuer:
		case inForce:
			p.say(i, broker.OutcomeAlive, fmt.Sprintf("not on the list of %s of %s", l.issuer, l.made.Format(time.RFC3339)))
		default:
			p.say(i, broker.OutcomeAlive, "on no list in force that Vault serves")
		}
	}
	return rest, nil
}

func (p *proof) say(i int, o broker.Outcome, answer string) {
	p.out[i].Check, p.out[i].Outcome, p.out[i].Answer = "pki: the revocation list that Vault serves", o, answer
}

// listTime bounds the fetching of a list.
const listTime = 20 * time.Second

// list fetches a list, which an engine may be without.
func (b *Backend) list(ctx context.Context, path []string, wanted map[string]bool) (list, error) {
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	der, err := b.vault.Fetch(ctx, path, MaxList)
	if err != nil || len(der) == 0 {
		return list{}, err
	}
	return parseList(der, wanted)
}

// renewal is the making of an engine's lists anew, which costs Vault the more the longer they are, and lets it revoke
// nothing meanwhile.
type renewal struct {
	running bool
	until   time.Time // no other before
}

// renew has Vault make the engine's lists anew. That takes a third of Vault's time at the most, however many are
// to be proven: what was revoked while one list was made waits for the next.
func (b *Backend) renew(ctx context.Context, mount string) (done bool, why string) {
	began := b.now()
	b.mu.Lock()
	last := b.renewals[mount]
	if last.running || began.Before(last.until) {
		b.mu.Unlock()
		return false, ", and Vault was asked for another a moment ago"
	}
	b.renewals[mount] = renewal{running: true}
	b.mu.Unlock()
	_, err := b.vault.Fetch(ctx, []string{mount, "crl", "rotate"}, 1<<20)
	ended := b.now()
	b.mu.Lock()
	b.renewals[mount] = renewal{until: ended.Add(2 * ended.Sub(began))}
	b.mu.Unlock()
	if err != nil {
		return false, ", and Vault makes no other when asked"
	}
	return true, ""
}

// ask asks for some of the certificates, eight at once.
func (p *proof) ask(ctx context.Context, rest []int) error {
	some := slices.Clone(rest)
	rand.Shuffle(len(some), func(i, k int) { some[i], some[k] = some[k], some[i] })
	some = some[:min(sample, len(some))]
	found, errs := make([]known, len(some)), make([]error, len(some))
	var g errgroup.Group
	g.SetLimit(8)
	for n, i := range some {
		g.Go(func() error {
			found[n], errs[n] = p.certificate(ctx, p.grants[i].Lease.Ref)
			return nil
		})
	}
	_ = g.Wait() // errs has every error
	p.asked = make(map[int]known, len(some))
	for n, i := range some {
		p.asked[i] = found[n]
	}
	return errors.Join(errs...)
}

func (p *proof) certificate(ctx context.Context, serial string) (known, error) {
	data, err := p.b.vault.Read(ctx, []string{p.mount, "cert", strings.ReplaceAll(serial, ":", "-")})
	if err != nil {
		return known{}, err
	}
	revoked, _ := data["revocation_time"].(json.Number)
	at, err := revoked.Int64()
	k := known{unstored: data == nil || err != nil, revoked: at > 0}
	k.issuer, _ = data["issuer_id"].(string)
	return k, nil
}
