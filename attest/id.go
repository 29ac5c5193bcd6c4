package attest

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of the SPIFFE-ID standard (sections 2.1 and 2.3), in bytes. go-spiffe has none.
const (
	MaxID          = 2048
	MaxTrustDomain = 255
)

const idScheme = "spiffe://"

// ParseID reads the SPIFFE ID of a workload: at most MaxID bytes, a trust domain of at most
// MaxTrustDomain bytes, and a path. One without a path is an authority's, not a workload's.
func ParseID(s string) (spiffeid.ID, error) {
	if len(s) > MaxID {
		return spiffeid.ID{}, fmt.Errorf("longer than %d bytes", MaxID)
	}
	rest, ok := strings.CutPrefix(s, idScheme)
	if !ok {
		return spiffeid.ID{}, fmt.Errorf("does not begin with %s", idScheme)
	}
	td, path, _ := strings.Cut(rest, "/")
	if len(td) > MaxTrustDomain {
		return spiffeid.ID{}, fmt.Errorf("trust domain longer than %d bytes", MaxTrustDomain)
	}
	if path == "" {
		return spiffeid.ID{}, errors.New("has no path")
	}
	return spiffeid.FromString(s)
}

// parseTrustDomain reads a configured name. The standard allows empty labels; here they are a
// slip of the pen that would never match.
func parseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	if len(name) > MaxTrustDomain {
		return spiffeid.TrustDomain{}, fmt.Errorf("a name longer than %d bytes", MaxTrustDomain)
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
