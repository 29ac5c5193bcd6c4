package vault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// LeaseInfo is a lease as Vault knows it.
type LeaseInfo struct {
	ID      string
	Issued  time.Time
	Expires time.Time // zero: Vault names no end
}

// Leases lists what is alive below the given paths, each a tool's mint path. Leases that end
// while they are listed are left out. It takes one request per path and one per lease.
func (c *Client) Leases(ctx context.Context, prefixes ...[]string) ([]LeaseInfo, error) {
	var ids []string
	for _, p := range prefixes {
		path, err := join(p)
		if err != nil {
			return nil, err
		}
		known, err := c.list(ctx, path)
		if err != nil {
			return nil, err
		}
		for id := range known {
			ids = append(ids, id)
		}
	}
	found := make([]*LeaseInfo, len(ids))
	err := each(ctx, len(ids), func(ctx context.Context, i int) (err error) {
		found[i], err = c.lookUp(ctx, ids[i])
		return err
	})
	if err != nil {
		return nil, err
	}
	var out []LeaseInfo
	for _, l := range found {
		if l != nil {
			out = append(out, *l)
		}
	}
	return out, nil
}

// maxList is how long Vault's list of one role's leases may be: half a million of them.
const maxList = 16 << 20

// list gives the ids of the leases right below a path.
func (c *Client) list(ctx context.Context, path string) (map[string]struct{}, error) {
	a, err := c.command(ctx, call{method: "LIST", path: "sys/leases/lookup/" + path + "/", most: maxList})
	var f *failure
	if errors.As(err, &f) && f.status == 404 {
		return nil, nil // Vault's word for an empty list
	}
	if err != nil {
		return nil, fmt.Errorf("listing leases below %q: %w", path, err)
	}
	keys, ok := a.Data["keys"].([]any)
	if !ok {
		return nil, fmt.Errorf("listing leases below %q: %w", path, errShape)
	}
	ids := make(map[string]struct{}, len(keys))
	for _, k := range keys {
		s, ok := k.(string)
		if !ok {
			return nil, fmt.Errorf("listing leases below %q: %w", path, errShape)
		}
		if checkSegment(s) != nil {
			continue // a deeper path ends with a slash; it is another tool's
		}
		ids[path+"/"+s] = struct{}{}
	}
	return ids, nil
}

// lookUp gives a lease, nil when Vault does not know it.
func (c *Client) lookUp(ctx context.Context, id string) (*LeaseInfo, error) {
	a, err := c.command(ctx, call{method: "POST", path: "sys/leases/lookup", body: map[string]string{"lease_id": id}})
	if gone(err, "invalid lease", "lease not found") {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking up a lease: %w", err)
	}
	if a.Data["id"] != id {
		return nil, fmt.Errorf("looking up a lease: %w", errShape)
	}
	issued, err := instant(a.Data["issue_time"])
	if err != nil {
		return nil, err
	}
	expires, err := instant(a.Data["expire_time"])
	if err != nil {
		return nil, err
	}
	return &LeaseInfo{ID: id, Issued: issued, Expires: expires}, nil
}

func instant(v any) (time.Time, error) {
	if v == nil {
		return time.Time{}, nil
	}
	s, _ := v.(string)
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("a lease's time: %w", errShape)
	}
	return t.UTC(), nil
}

// Irrevocable gives the ids of leases that Vault has given up revoking: after six failed tries
// it only lists them, and each needs a person. It names 10,000 at most.
func (c *Client) Irrevocable(ctx context.Context) ([]string, error) {
	a, err := c.command(ctx, call{method: "GET", path: "sys/leases", query: "type=irrevocable&limit=10000"})
	if err != nil {
		return nil, fmt.Errorf("listing irrevocable leases: %w", err)
	}
	leases, ok := a.Data["leases"].([]any)
	if !ok && a.Data["leases"] != nil {
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

// Read reads one path with the broker's own token, for proofs: a certificate's revocation, an
// engine's public key. The result is nil when there is nothing. What may be read is the broker's policy's
// matter, see [SetupConfig.Reads].
func (c *Client) Read(ctx context.Context, path []string) (map[string]any, error) {
	p, err := join(path)
	if err != nil {
		return nil, err
	}
	a, err := c.command(ctx, call{method: "GET", path: p})
	var f *failure
	if errors.As(err, &f) && f.status == 404 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %q in vault: %w", strings.Join(path[:len(path)-1], "/"), err)
	}
	return a.Data, nil
}

// Fetch reads one path with the broker's own token and gives the answer as it is, nil when there is nothing: for what
// Vault does not serve as JSON, such as a revocation list, and for what takes it long. An answer of more than most
// bytes is an error. It waits as long as ctx allows.
func (c *Client) Fetch(ctx context.Context, path []string, most int64) ([]byte, error) {
	p, err := join(path)
	if err != nil {
		return nil, err
	}
	s, err := c.root(ctx)
	if err != nil {
		return nil, err
	}
	a, err := c.wire.send(ctx, call{method: "GET", path: p, token: s.token, raw: true, most: most})
	var f *failure
	switch {
	case errors.As(err, &f) && f.status == 404:
		return nil, nil
	case errors.Is(err, errForbidden):
		c.look()
	}
	if err != nil {
		return nil, fmt.Errorf("fetching %q from vault: %w", strings.Join(path[:len(path)-1], "/"), err)
	}
	return a.Raw, nil
}
