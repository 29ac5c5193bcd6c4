package postgres

import "github.com/pawlsec/pawl/broker"

// Access returns the Vault path of the tool's mint. A mint reads the path and makes a lease.
func (b *Backend) Access(t broker.Tool) (path broker.VaultPath, write, leased bool) {
	return mintPath(t), false, true
}
