package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/broker/api/client"
)

// variable is a variable of the environment and the example value for errors.
type variable struct{ name, example string }

// The pawl command uses the same variables (docs/configuration.md).
var (
	addressVariable  = variable{"PAWL_ADDRESS", "https://pawl.example.org:8443"}
	serverIDVariable = variable{"PAWL_SERVER_ID", "spiffe://example.org/pawl"}
	idVariable       = variable{"PAWL_ID", "spiffe://example.org/agent"}
	socketVariable   = variable{workloadapi.SocketEnv, "unix:///run/spire/agent/public/api.sock"}
)

// EnvironmentError lists the missing and malformed variables of the environment. Its text has an example
// value for each.
type EnvironmentError struct {
	Variables []string // their names
	text      []string
}

func (e *EnvironmentError) Error() string { return strings.Join(e.text, "; ") }

func (e *EnvironmentError) add(v variable, wrong string) {
	e.Variables = append(e.Variables, v.name)
	e.text = append(e.text, fmt.Sprintf("%s %s, for example %s=%s", v.name, wrong, v.name, v.example))
}

// svidWait is how long FromEnvironment waits for the Workload API.
const svidWait = 10 * time.Second

// FromEnvironment makes a client from these variables, which `pawl dev --env FILE` writes:
//
//	PAWL_ADDRESS            the broker's address, such as https://pawl.example.org:8443
//	PAWL_SERVER_ID          the broker's SPIFFE ID, such as spiffe://example.org/pawl
//	SPIFFE_ENDPOINT_SOCKET  the Workload API, such as unix:///run/spire/agent/public/api.sock
//
// The agent's identity is the X.509-SVID of the Workload API. Where that gives this process several, the
// variable PAWL_ID has the SPIFFE ID or the hint of the agent's own; without it the error wraps
// [ErrIdentity]. The client chooses again at each rotation until Close. FromEnvironment waits at most 10 s for the first SVID. It opens no connection to the
// broker. If PAWL_ADDRESS is "unix:/path", the other two are not needed. The error for missing and
// malformed variables is an *[EnvironmentError].
func FromEnvironment(ctx context.Context) (*Client, error) {
	return Config{}.FromEnvironment(ctx)
}

// FromEnvironment is like the function [FromEnvironment], but a field that is set in cfg replaces its
// variable.
func (cfg Config) FromEnvironment(ctx context.Context) (*Client, error) {
	var wrong EnvironmentError
	if err := cfg.addressFrom(&wrong); err != nil {
		return nil, err
	}
	var socket string
	var own client.Identity
	if !strings.HasPrefix(cfg.Address, "unix:") && cfg.TLS == nil && cfg.HTTPClient == nil {
		cfg.serverIDFrom(&wrong)
		if cfg.Source == nil {
			socket, own = socketFrom(&wrong), cfg.ownFrom(&wrong)
		}
	}
	if len(wrong.Variables) > 0 {
		return nil, &wrong
	}
	if socket == "" {
		return New(cfg)
	}
	source, err := identity(ctx, socket, own)
	if err != nil {
		return nil, err
	}
	cfg.Source = source
	c, err := New(cfg)
	if err != nil {
		_ = source.Close() // the other error counts
		return nil, err
	}
	c.source = source
	return c, nil
}

// addressFrom checks the address before the wait for the Workload API.
func (cfg *Config) addressFrom(wrong *EnvironmentError) error {
	given := cfg.Address != ""
	if !given {
		cfg.Address = os.Getenv(addressVariable.name)
	}
	if cfg.Address == "" {
		wrong.add(addressVariable, "is not set")
		return nil
	}
	probe := client.Config{Address: cfg.Address, HTTP: cfg.HTTPClient}
	if probe.HTTP == nil && !strings.HasPrefix(cfg.Address, "unix:") {
		probe.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	}
	_, err := client.New(probe)
	if err != nil && !given {
		wrong.add(addressVariable, "is not https://host:port or unix:/path")
		return nil
	}
	return err
}

func (cfg *Config) serverIDFrom(wrong *EnvironmentError) {
	if !cfg.ServerID.IsZero() {
		return
	}
	text := os.Getenv(serverIDVariable.name)
	id, err := spiffeid.FromString(text)
	switch {
	case text == "":
		wrong.add(serverIDVariable, "is not set")
	case err != nil:
		wrong.add(serverIDVariable, "is not a SPIFFE ID")
	}
	cfg.ServerID = id
}

func socketFrom(wrong *EnvironmentError) string {
	socket := os.Getenv(socketVariable.name)
	switch {
	case socket == "":
		wrong.add(socketVariable, "is not set")
	case workloadapi.ValidateAddress(socket) != nil:
		wrong.add(socketVariable, "is not unix:///path or tcp://ip:port")
	}
	return socket
}

// identity waits for the agent's SVID. The source outlives ctx and must be closed.
func identity(ctx context.Context, socket string, own client.Identity) (client.CloserSource, error) {
	ctx, cancel := context.WithTimeout(ctx, svidWait)
	defer cancel()
	source, err := client.OpenIdentity(ctx, own, "set "+idVariable.name+" or Config.ID to the SPIFFE ID or the hint of its own",
		workloadapi.WithAddr(socket))
	if errors.Is(err, client.ErrIdentity) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("getting an X.509-SVID from the Workload API at %s (is this workload registered?): %w",
			socket, err)
	}
	return source, nil
}

// ownFrom reads which of several SVIDs is the agent's own.
func (cfg *Config) ownFrom(wrong *EnvironmentError) client.Identity {
	text, given := cfg.ID, cfg.ID != ""
	if !given {
		text = os.Getenv(idVariable.name)
	}
	own, err := client.ParseIdentity(text)
	if err != nil {
		wrong.add(idVariable, "is neither a SPIFFE ID nor a hint")
	}
	cfg.ID = ""
	return own
}
