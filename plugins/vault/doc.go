// Package vault is the one client of HashiCorp Vault and OpenBao: it logs in with the broker's
// SVID, keeps the tree of delegation tokens, mints, revokes and sweeps.
//
// Three promises hold here and nowhere else. A mint is one request on the wire, never sent
// again by any layer. A path is built from checked segments, never from text. A token is in
// memory and in the header of a request, and in no error, log or file.
package vault
