package vault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/pawlsec/pawl/broker"
)

// wrap is the part of an answer that describes a wrapping token: a token of one use, below no
// other, that opens what Vault keeps for it.
type wrap struct {
	Token    string
	Accessor string
	TTL      int64  // seconds
	Path     string // where what is wrapped was made
	Inside   string // accessor of the token that is wrapped
	Members  map[string]any
}

func (d decoder) wrap() (*wrap, error) {
	if d.null() {
		return nil, nil
	}
	raw, err := d.ReadValue()
	if err != nil {
		return nil, errShape
	}
	var w wrap
	own := decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}
	err = own.object(2, map[string]func() error{
		"token":            func() error { return own.text(&w.Token) },
		"accessor":         func() error { return own.text(&w.Accessor) },
		"ttl":              func() error { return own.integer(&w.TTL) },
		"creation_path":    func() error { return own.text(&w.Path) },
		"wrapped_accessor": func() error { return own.text(&w.Inside) },
	})
	if err != nil {
		return nil, err
	}
	w.Members, err = decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}.data()
	return &w, err
}

// acceptWrapped checks an answer that wraps a token, and the token inside by its accessor: the
// answer says nothing of it. The wrapping token does not hang on the step's, so one that is
// refused is ended here; what it wraps ends with the step's.
func (c *Client) acceptWrapped(ctx context.Context, a answer, path string, s step, m broker.Mint) (broker.Lease, broker.Secret, error) {
	lease, secret, err := c.unseen(ctx, a, path, s, m)
	if err != nil && a.Wrap != nil && opaque(a.Wrap.Accessor) {
		c.discard(ctx, a.Wrap.Accessor)
	}
	return lease, secret, err
}

func (c *Client) unseen(ctx context.Context, a answer, path string, s step, m broker.Mint) (broker.Lease, broker.Secret, error) {
	w := a.Wrap
	switch {
	case w == nil || a.Auth != nil || a.Data != nil || a.LeaseID != "":
		return broker.Lease{}, broker.Secret{}, errors.New("vault's answer is not wrapped")
	case !opaque(w.Token) || !opaque(w.Accessor) || !opaque(w.Inside) || w.Inside == w.Accessor:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's answer wraps no token that could be ended")
	case w.Path != path:
		return broker.Lease{}, broker.Secret{}, errors.New("vault's answer wraps what was made at another path than the mint")
	case w.TTL <= 0 || w.TTL > maxLease || m.TTL > 0 && seconds(w.TTL) > ceil(m.TTL):
		return broker.Lease{}, broker.Secret{}, errors.New("vault's wrapping token lives longer than the tool allows")
	}
	inside, err := c.command(ctx, call{method: "POST", path: "auth/token/lookup-accessor", body: map[string]string{"accessor": w.Inside}})
	if err != nil {
		return broker.Lease{}, broker.Secret{}, fmt.Errorf("looking at the wrapped token: %w", err)
	}
	life, err := checkInside(inside.Data, w, path, m.TTL)
	if err != nil {
		return broker.Lease{}, broker.Secret{}, err
	}
	now := c.cfg.Now()
	end := now.Add(max(life, seconds(w.TTL))) // unwrapped or not
	if end.After(s.expires) {
		end = s.expires
	}
	w.Members["auth"] = inside.Data
	return finish(m, w.Members, broker.Lease{Expires: end}, end, now)
}

// checkInside holds what Vault knows of the wrapped token to the same as an answer that is one.
func checkInside(token map[string]any, w *wrap, path string, limit time.Duration) (life time.Duration, err error) {
	accessor, _ := token["accessor"].(string)
	made, _ := token["path"].(string)
	kind, _ := token["type"].(string)
	orphan, said := token["orphan"].(bool)
	digits, _ := token["ttl"].(json.Number)
	ttl, err := digits.Int64()
	switch {
	case accessor != w.Inside || made != path || kind != "service":
		return 0, errors.New("vault's wrapped token is not the one that was asked for")
	case err != nil || ttl <= 0 || ttl > maxLease:
		return 0, errors.New("vault's wrapped token has no end, or one beyond all bounds")
	case !said || orphan || limit > 0 && seconds(ttl) > ceil(limit):
		return 0, errors.New("vault's wrapped token outlives the step's, or lives longer than the tool allows")
	}
	return seconds(ttl), nil
}
