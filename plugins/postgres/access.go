package postgres

import "github.com/pawlsec/pawl/broker"

// Access returns the Vault path of the tool's mint. A mint reads the path and makes a lease.
func (b *Backend) Access(t broker.Tool) (path []string, write, leased bool) {
	return []string{t.Path[0], "creds", t.Path[1]}, false, true
}
