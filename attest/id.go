package attest

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of the SPIFFE-ID standard (sections 2.1 and 2.3), in bytes. go-spiffe does not enforce them.
const (
	maxID          = 2048
	maxTrustDomain = 255
)

const idScheme = "spiffe://"

// ParseID parses the SPIFFE ID of a workload: at most 2,048 bytes, a trust domain of at most 255 bytes, and a path. It
// rejects an ID without a path, which names an authority.
func ParseID(s string) (spiffeid.ID, error) {
	if len(s) > maxID {
		return spiffeid.ID{}, fmt.Errorf("longer than %d bytes", maxID)
	}
	rest, ok := strings.CutPrefix(s, idScheme)
	if !ok {
		return spiffeid.ID{}, fmt.Errorf("does not begin with %s", idScheme)
	}
	td, path, _ := strings.Cut(rest, "/")
	if len(td) > maxTrustDomain {
		return spiffeid.ID{}, fmt.Errorf("trust domain longer than %d bytes", maxTrustDomain)
	}
	if path == "" {
		return spiffeid.ID{}, errors.New("has no path")
	}
	return spiffeid.FromString(s)
}

// parseTrustDomain parses a configured name. The standard allows empty labels. Here they are an error, because a
// mistyped name would never match.
func parseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	if len(name) > maxTrustDomain {
		return spiffeid.TrustDomain{}, fmt.Errorf("a name longer than %d bytes", maxTrustDomain)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("%q: %w", name, err)
	}
	if td.Name() != name || strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") || strings.Contains(name, "..") {
		return spiffeid.TrustDomain{}, fmt.Errorf("%q is not a plain name like example.org", name)
	}
	return td, nil
}
