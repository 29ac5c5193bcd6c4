package vault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// errNoPath means that a caller gave the zero path.
var errNoPath = errors.New("a vault path is required")

// Leases returns the ids of the live leases directly below a mint path, with one request.
func (c *Client) Leases(ctx context.Context, path broker.VaultPath) ([]string, error) {
	if path.IsZero() {
		return nil, errNoPath
	}
	known, err := c.list(ctx, path.String())
	return slices.Collect(maps.Keys(known)), err
}

// LookUpLeases implements [broker.LeaseLister]. It omits leases that end during the call.
func (c *Client) LookUpLeases(ctx context.Context, ids []string) (out []broker.FoundLease, err error) {
	found := make([]*broker.FoundLease, len(ids))
	if err := forEach(ctx, len(ids), func(ctx context.Context, i int) (err error) {
		found[i], err = c.lookUpLease(ctx, ids[i])
		return err
	}); err != nil {
		return nil, err
	}
	for _, l := range found {
		if l != nil {
			out = append(out, *l)
		}
	}
	return out, nil
}

// maxList is the limit in bytes of the list of one role's leases: about half a million of them.
const maxList = 16 << 20

// auditHint names the likely cause of a failed list. Vault's answer is "internal error" alone, and its log has the rest.
const auditHint = "an audit device of Vault may be unable to write the long entry, as a socket over UDP or syslog is: " +
	"set elide_list_responses on each audit device, or add a file device"

// list returns the ids of the leases directly below a path.
func (c *Client) list(ctx context.Context, path string) (map[string]struct{}, error) {
	resp, err := c.doWithLogin(ctx, call{method: "LIST", path: "sys/leases/lookup/" + path + "/", maxBytes: maxList})
	var f *failure
	if errors.As(err, &f) && f.status == 404 {
		return nil, nil // Vault answers 404 for an empty list
	}
	if f != nil && f.status == 500 {
		return nil, fmt.Errorf("listing leases below %q: %w: %s", path, err, auditHint)
	}
	if err != nil {
		return nil, fmt.Errorf("listing leases below %q: %w", path, err)
	}
	keys, ok := resp.Data["keys"].([]any)
	if !ok {
		return nil, fmt.Errorf("listing leases below %q: %w", path, errShape)
	}
	ids := make(map[string]struct{}, len(keys))
	for _, k := range keys {
		s, ok := k.(string)
		if !ok {
			return nil, fmt.Errorf("listing leases below %q: %w", path, errShape)
		}
		if broker.CheckVaultName(s) != nil {
			continue // a deeper path ends with a slash and belongs to another tool
		}
		ids[path+"/"+s] = struct{}{}
	}
	return ids, nil
}

// lookUpLease returns a lease, or nil if Vault does not know it.
func (c *Client) lookUpLease(ctx context.Context, id string) (*broker.FoundLease, error) {
	resp, err := c.doWithLogin(ctx, call{method: "POST", path: "sys/leases/lookup",
		body: map[string]string{"lease_id": id}})
	if gone(err, "invalid lease", "lease not found") {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking up a lease: %w", err)
	}
	if resp.Data["id"] != id {
		return nil, fmt.Errorf("looking up a lease: %w", errShape)
	}
	issued, err := parseTime(resp.Data["issue_time"])
	if err != nil {
		return nil, err
	}
	return &broker.FoundLease{ID: id, Issued: issued}, nil
}

func parseTime(v any) (time.Time, error) {
	if v == nil {
		return time.Time{}, nil
	}
	s, _ := v.(string)
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("reading a lease's time: %w", errShape)
	}
	return t.UTC(), nil
}

// Irrevocable returns the ids of the leases that Vault could not revoke in six attempts. Vault then only lists them,
// and an operator must act on each. It returns at most 10,000 ids.
func (c *Client) Irrevocable(ctx context.Context) ([]string, error) {
	resp, err := c.doWithLogin(ctx, call{method: "GET", path: "sys/leases", query: "type=irrevocable&limit=10000"})
	if err != nil {
		return nil, fmt.Errorf("listing irrevocable leases: %w", err)
	}
	leases, ok := resp.Data["leases"].([]any)
	if !ok && resp.Data["leases"] != nil {
		return nil, fmt.Errorf("listing irrevocable leases: %w", errShape)
	}
	ids := make([]string, len(leases))
	for i, l := range leases {
		entry, _ := l.(map[string]any)
		if ids[i], ok = entry["lease_id"].(string); !ok {
			return nil, fmt.Errorf("listing irrevocable leases: %w", errShape)
		}
	}
	return ids, nil
}

// Read reads one path with the broker's own token, for proofs: a certificate's revocation, an engine's public key. The
// result is nil if the path holds nothing. The broker's policy decides which paths it may read, see
// [SetupConfig.Reads].
func (c *Client) Read(ctx context.Context, path broker.VaultPath) (map[string]any, error) {
	if path.IsZero() {
		return nil, errNoPath
	}
	resp, err := c.doWithLogin(ctx, call{method: "GET", path: path.String()})
	var f *failure
	if errors.As(err, &f) && f.status == 404 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %q in vault: %w", parent(path), err)
	}
	return resp.Data, nil
}

// Fetch reads one path with the broker's own token and returns the undecoded body, or nil if the path holds nothing.
// Use it for responses that are not JSON, such as a revocation list, and for slow ones. A response of more than
// maxBytes is an error. It waits as long as ctx allows.
func (c *Client) Fetch(ctx context.Context, path broker.VaultPath, maxBytes int64) ([]byte, error) {
	if path.IsZero() {
		return nil, errNoPath
	}
	s, err := c.loginToken(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := c.wire.send(ctx, call{method: "GET", path: path.String(), token: s.token, raw: true, maxBytes: maxBytes})
	var f *failure
	switch {
	case errors.As(err, &f) && f.status == 404:
		return nil, nil
	case errors.Is(err, errForbidden):
		c.recheckLogin()
	}
	if err != nil {
		return nil, fmt.Errorf("fetching %q from vault: %w", parent(path), err)
	}
	return resp.Raw, nil
}
