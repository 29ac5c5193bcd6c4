// Package plain is the side of a measurement without Pawl.
package plain

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Vault sends requests to Vault directly, as a client without Pawl does: one token and persistent connections.
// It uses HTTP/1.1, which costs Vault less time than HTTP/2. Safe for concurrent use.
type Vault struct {
	base  string
	token string
	http  *http.Client
}

func NewVault(address string, roots *x509.CertPool, token string) *Vault {
	return &Vault{base: address + "/v1/", token: token, http: &http.Client{Timeout: 5 * time.Minute, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, MaxIdleConnsPerHost: 64, DisableCompression: true,
		TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}}}
}

// As returns the same client with another token and connections of its own.
func (c *Vault) As(token string) *Vault {
	transport := c.http.Transport.(*http.Transport).Clone()
	transport.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	return &Vault{base: c.base, token: token, http: &http.Client{Timeout: c.http.Timeout, Transport: transport}}
}

func (c *Vault) Close() { c.http.CloseIdleConnections() }

// Answer is an answer of Vault.
type Answer struct {
	LeaseID string         `json:"lease_id"`
	Data    map[string]any `json:"data"`
	Auth    struct {
		Token    string `json:"client_token"`
		Accessor string `json:"accessor"`
	} `json:"auth"`
	Errors []string `json:"errors"`
}

func (a Answer) Text(name string) string { s, _ := a.Data[name].(string); return s }

// ErrNotThere means 404.
var ErrNotThere = errors.New("vault has nothing there")

// Ask sends one request and reads the whole answer.
func (c *Vault) Ask(ctx context.Context, method, path string, body any) (a Answer, err error) {
	var in io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return a, err
		}
		in = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, in)
	if err != nil {
		return a, err
	}
	req.Header.Set("X-Vault-Token", c.token)
	resp, err := c.http.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return a, err
	}
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &a); err != nil {
			return a, err
		}
	}
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return a, fmt.Errorf("%s %s: %w", method, path, ErrNotThere)
	case resp.StatusCode >= 300:
		return a, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, strings.Join(a.Errors, "; "))
	}
	return a, nil
}

// Child makes a token with the policy of a client without Pawl.
func (c *Vault) Child(ctx context.Context) (token, accessor string, err error) {
	a, err := c.Ask(ctx, "POST", "auth/token/create", map[string]any{"policies": []string{"bench-direct"}, "ttl": "30m", "no_default_policy": true})
	return a.Auth.Token, a.Auth.Accessor, err
}

// Leases counts the leases below a path.
func (c *Vault) Leases(ctx context.Context, path string) (int, error) {
	a, err := c.Ask(ctx, "LIST", "sys/leases/lookup/"+path, nil)
	if errors.Is(err, ErrNotThere) {
		return 0, nil
	}
	keys, _ := a.Data["keys"].([]any)
	return len(keys), err
}

// NoLeases waits until no lease is left below a path.
func (c *Vault) NoLeases(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		n, err := c.Leases(ctx, path)
		if err != nil || n == 0 {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Leased makes one leased secret directly.
func (c *Vault) Leased(ctx context.Context, path string) (lease string, err error) {
	method, body := "GET", any(nil)
	if path == "pki/issue/plain" {
		method, body = "POST", map[string]any{"common_name": "a.agents.pawl.dev", "ttl": "14m"}
	}
	a, err := c.Ask(ctx, method, path, body)
	return a.LeaseID, err
}
