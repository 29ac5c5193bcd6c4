package main

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

// vaultClient sends requests to Vault directly, as a client without Pawl does: one token and persistent connections.
// It uses HTTP/1.1, which costs Vault less time than HTTP/2. Safe for concurrent use.
type vaultClient struct {
	base  string
	token string
	http  *http.Client
}

func newVaultClient(address string, roots *x509.CertPool, token string) *vaultClient {
	return &vaultClient{base: address + "/v1/", token: token, http: &http.Client{Timeout: 5 * time.Minute, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, MaxIdleConnsPerHost: 64, DisableCompression: true,
		TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}}}
}

// as returns the same client with another token and connections of its own.
func (c *vaultClient) as(token string) *vaultClient {
	transport := c.http.Transport.(*http.Transport).Clone()
	transport.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	return &vaultClient{base: c.base, token: token, http: &http.Client{Timeout: c.http.Timeout, Transport: transport}}
}

func (c *vaultClient) close() { c.http.CloseIdleConnections() }

// vaultAnswer is an answer of Vault.
type vaultAnswer struct {
	LeaseID string         `json:"lease_id"`
	Data    map[string]any `json:"data"`
	Auth    struct {
		Token    string `json:"client_token"`
		Accessor string `json:"accessor"`
	} `json:"auth"`
	Errors []string `json:"errors"`
}

func (a vaultAnswer) text(name string) string { s, _ := a.Data[name].(string); return s }

// errNotThere means 404.
var errNotThere = errors.New("vault has nothing there")

// ask sends one request and reads the whole answer.
func (c *vaultClient) ask(ctx context.Context, method, path string, body any) (a vaultAnswer, err error) {
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
		return a, fmt.Errorf("%s %s: %w", method, path, errNotThere)
	case resp.StatusCode >= 300:
		return a, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, strings.Join(a.Errors, "; "))
	}
	return a, nil
}

// child makes a token with the policy of a client without Pawl.
func (c *vaultClient) child(ctx context.Context) (token, accessor string, err error) {
	a, err := c.ask(ctx, "POST", "auth/token/create", map[string]any{"policies": []string{"bench-direct"}, "ttl": "30m", "no_default_policy": true})
	return a.Auth.Token, a.Auth.Accessor, err
}

// leases counts the leases below a path.
func (c *vaultClient) leases(ctx context.Context, path string) (int, error) {
	a, err := c.ask(ctx, "LIST", "sys/leases/lookup/"+path, nil)
	if errors.Is(err, errNotThere) {
		return 0, nil
	}
	keys, _ := a.Data["keys"].([]any)
	return len(keys), err
}

// noLeases waits until no lease is left below a path.
func (c *vaultClient) noLeases(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		n, err := c.leases(ctx, path)
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
