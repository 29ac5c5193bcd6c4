package vault

import (
	"context"
	"errors"
	"fmt"

	"github.com/pawlsec/pawl/broker"
)

// List returns the names directly below a path, with the broker's own token, each with Vault's description of it
// (key_info), which is nil where Vault gives none. It omits deeper paths.
func (c *Client) List(ctx context.Context, path broker.VaultPath) (map[string]map[string]any, error) {
	if path.IsZero() {
		return nil, errNoPath
	}
	resp, err := c.doWithLogin(ctx, call{method: "LIST", path: path.String(), maxBytes: maxList})
	var f *failure
	if errors.As(err, &f) && f.status == 404 {
		return nil, nil // Vault answers 404 for an empty list
	}
	if err != nil {
		return nil, fmt.Errorf("listing %q in vault: %w", path, err)
	}
	keys, ok := resp.Data["keys"].([]any)
	if !ok {
		return nil, fmt.Errorf("listing %q in vault: %w", path, errShape)
	}
	infos, _ := resp.Data["key_info"].(map[string]any)
	names := make(map[string]map[string]any, len(keys))
	for _, k := range keys {
		if s, ok := k.(string); ok && broker.CheckVaultName(s) == nil {
			names[s], _ = infos[s].(map[string]any)
		}
	}
	return names, nil
}

// maxOCSP is the size limit of an OCSP response in bytes.
const maxOCSP = 64 << 10

// OCSP asks the responder of a pki engine, as relying parties do: without a token. Request and response are in DER.
func (c *Client) OCSP(ctx context.Context, mount string, request []byte) ([]byte, error) {
	p, err := broker.VaultPathOf(mount, "ocsp")
	if err != nil {
		return nil, err
	}
	resp, err := c.wire.send(ctx, call{method: "POST", path: p.String(), rawBody: request, contentType: "application/ocsp-request",
		raw: true, maxBytes: maxOCSP})
	if err != nil {
		return nil, fmt.Errorf("asking the OCSP responder of %q in vault: %w", mount, err)
	}
	return resp.Raw, nil
}
