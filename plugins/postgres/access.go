package postgres

import "github.com/pawlsec/pawl/broker"

// Access gives the Vault path of the tool's mint and how it is used there.
func (b *Backend) Access(t broker.Tool) (path []string, write, leased bool) {
	return []string{t.Path[0], "creds", t.Path[1]}, false, true
}
