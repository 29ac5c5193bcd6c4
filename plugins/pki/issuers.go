package pki

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/pawlsec/pawl/broker"
)

// issuers reads the authorities of an engine. Safe for concurrent use.
type issuers struct {
	vault Reader

	mu    sync.Mutex                   // guards known; never held over the network
	known map[string]*x509.Certificate // by mount and id: Vault never gives an id to another authority
}

// issuer is one authority of an engine, with Vault's id for it.
type issuer struct {
	id   string
	cert *x509.Certificate
	key  bool // Vault has its key, so it can have issued certificates and can sign lists
}

// maxAuthority is the size limit of an authority's certificate in bytes.
const maxAuthority = 64 << 10

// of returns the authorities that the engine has now. Several of them can be one authority to relying parties, after a
// renewal on the same key.
func (s *issuers) of(ctx context.Context, mount string) (map[authority][]issuer, error) {
	path, err := broker.VaultPathOf(mount, "issuers")
	if err != nil {
		return nil, err
	}
	ids, err := s.vault.List(ctx, path)
	if err != nil {
		return nil, err
	}
	all := map[authority][]issuer{}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		cert, err := s.certificate(ctx, mount, id)
		if err != nil {
			return nil, err
		}
		if cert != nil {
			a := authorityOf(cert)
			key, _ := ids[id]["key_id"].(string)
			all[a] = append(all[a], issuer{id, cert, key != ""})
		}
	}
	for _, same := range all { // the first can sign lists, if any can
		slices.SortStableFunc(same, func(x, y issuer) int { return cmp.Compare(rank(x), rank(y)) })
	}
	return all, nil
}

func rank(s issuer) int {
	if s.key {
		return 0
	}
	return 1
}

// certificate returns an authority's certificate, or nil if it was deleted meanwhile.
func (s *issuers) certificate(ctx context.Context, mount, id string) (*x509.Certificate, error) {
	s.mu.Lock()
	cert := s.known[mount+"/"+id]
	s.mu.Unlock()
	if cert != nil {
		return cert, nil
	}
	der, err := fetch(ctx, s.vault, maxAuthority, mount, "issuer", id, "der")
	if err != nil || len(der) == 0 {
		return nil, err
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("the certificate of issuer %s cannot be parsed", id)
	}
	s.mu.Lock()
	s.known[mount+"/"+id] = cert
	s.mu.Unlock()
	return cert, nil
}
