package vault

import (
	"fmt"
	"strings"

	"github.com/pawlsec/pawl/broker"
)

// checkPolicy allows only names that Vault keeps unchanged. Vault lower-cases and trims other names, and a name that is
// normalized after its check was not checked (CVE-2025-5999 in Vault was that fault).
func checkPolicy(name string) error {
	if err := broker.CheckVaultName(name); err != nil {
		return fmt.Errorf("vault policy: %w", err)
	}
	if strings.ToLower(name) != name || name == "root" || name == "default" {
		return fmt.Errorf("vault policy %q: must be lower-case and neither root nor default", name)
	}
	return nil
}

// checkLease refuses an id that is not a path of valid segments, since the client puts its prefix into a path. An id is
// a mint path and one more segment.
func checkLease(id string) error {
	for s := range strings.SplitSeq(id, "/") {
		if err := broker.CheckVaultName(s); err != nil {
			return fmt.Errorf("lease id: %w", err)
		}
	}
	return nil
}

// parent is the path without its last segment, for errors.
func parent(p broker.VaultPath) string {
	s := p.String()
	return s[:max(strings.LastIndexByte(s, '/'), 0)]
}

// Access is the access to Vault that one tool needs: the policy that its mints need, and the one path that the
// policy opens. The tool's backend defines the path.
type Access struct {
	Tool   broker.ToolName  // for messages
	Policy string           // "pawl-tool-…"
	Path   broker.VaultPath // the full mint path
	Write  bool             // a mint is a write; otherwise a read
	Leased bool             // Vault lists the leases below Path
	Wrap   bool             // the mint asks for a wrapped response; the policy then refuses any other
}
