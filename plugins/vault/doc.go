// Package vault is the broker's only client of HashiCorp Vault and OpenBao. It logs in with the broker's SVID, keeps
// the tree of delegation tokens, mints, revokes and sweeps.
//
// It keeps three promises:
//   - A mint is one request on the wire. No layer resends it. Only a signature is asked for once more, when Vault refused the
//     version of its key.
//   - A path is built from checked segments, never from text.
//   - A token lives in memory and in the header of a request. It never appears in an error, a log or a file.
package vault
