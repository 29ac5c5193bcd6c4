package parts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// SPIREConfig configures a SPIRE server and agent.
type SPIREConfig struct {
	// TrustDomain is the name of the trust domain. Empty is pawl.test.
	TrustDomain string
	// SVIDLifetime is how long X.509-SVIDs and JWT-SVIDs are valid; the agent renews at half of it. Zero is one hour.
	SVIDLifetime time.Duration
	// Binaries says where the programs come from. Zero finds or builds them.
	Binaries Binaries
}

// SPIREServers are a real SPIRE server and agent. The agent joined by token and attests workloads by their Unix
// process. Safe for concurrent use.
type SPIREServers struct {
	config        SPIREConfig
	serverPath    string
	server, agent *workdir
	serverRun     *process
	agentRun      *process
	agentID       string
	serverPort    int
}

// SPIRE starts a server and an agent, which takes some seconds. It returns ErrMissing if they are not on the machine
// and cannot be built.
func SPIRE(ctx context.Context, config SPIREConfig) (*SPIREServers, error) {
	serverPath, agentPath, err := config.Binaries.SPIRE(ctx)
	if err != nil {
		return nil, err
	}
	if config.TrustDomain == "" {
		config.TrustDomain = "pawl.test"
	}
	if config.SVIDLifetime == 0 {
		config.SVIDLifetime = time.Hour
	}
	s := &SPIREServers{config: config, serverPath: serverPath}
	if err := s.startServer(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the SPIRE server: %w", err), s.Close())
	}
	if err := s.startAgent(ctx, agentPath); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the SPIRE agent: %w", err), s.Close())
	}
	return s, nil
}

const serverSettings = `
server {
	bind_address = "127.0.0.1"
	bind_port = %d
	socket_path = %q
	trust_domain = %q
	data_dir = %q
	log_level = "WARN"
	default_x509_svid_ttl = %q
	default_jwt_svid_ttl = %q
	ca_ttl = "24h"
}
plugins {
	DataStore "sql" { plugin_data { database_type = "sqlite3", connection_string = %q } }
	KeyManager "memory" { plugin_data {} }
	NodeAttestor "join_token" { plugin_data {} }
}
`

func (s *SPIREServers) startServer(ctx context.Context) (err error) {
	if s.server, err = newWorkdir("spire-server", "KILL"); err != nil {
		return err
	}
	if s.serverPort, err = freePort(); err != nil {
		return err
	}
	lifetime := s.config.SVIDLifetime.String()
	settings := fmt.Sprintf(serverSettings, s.serverPort, s.serverSocket(), s.config.TrustDomain, s.server.dir,
		lifetime, lifetime, s.server.path("datastore.sqlite3"))
	if err := os.WriteFile(s.server.path("server.conf"), []byte(settings), 0o600); err != nil {
		return err
	}
	s.serverRun, err = s.server.start(command{
		path: s.serverPath,
		args: []string{"run", "-config", s.server.path("server.conf")},
	})
	if err != nil {
		return err
	}
	return s.serverRun.ready(ctx, func(ctx context.Context) error {
		if _, err := os.Stat(s.serverSocket()); err != nil {
			return err // a health check starts a process, so wait for the socket first
		}
		_, err := s.ask(ctx, "healthcheck")
		return err
	})
}

func (s *SPIREServers) serverSocket() string { return s.server.path("server.sock") }

// ask runs one spire-server command against this server.
func (s *SPIREServers) ask(ctx context.Context, words ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, s.serverPath, append(words, "-socketPath", s.serverSocket())...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("spire-server %s: %w: %s", words[0], err, strings.TrimSpace(stderr.String()))
	}
	return []byte(stdout.String()), nil
}

const agentSettings = `
agent {
	data_dir = %q
	server_address = "127.0.0.1"
	server_port = %d
	socket_path = %q
	trust_domain = %q
	trust_bundle_path = %q
	join_token_file = %q
	log_level = "WARN"
	experimental { sync_interval = "1s" }
}
plugins {
	KeyManager "memory" { plugin_data {} }
	NodeAttestor "join_token" { plugin_data {} }
	WorkloadAttestor "unix" { plugin_data {} }
}
`

func (s *SPIREServers) startAgent(ctx context.Context, path string) (err error) {
	if s.agent, err = newWorkdir("spire-agent", "KILL"); err != nil {
		return err
	}
	bundle, err := s.BundlePEM(ctx)
	if err != nil {
		return err
	}
	answer, err := s.ask(ctx, "token", "generate", "-output", "json")
	if err != nil {
		return err
	}
	var token struct{ Value string }
	if err := json.Unmarshal(answer, &token); err != nil || token.Value == "" {
		return errors.New("the server's answer has no join token")
	}
	s.agentID = "spiffe://" + s.config.TrustDomain + "/spire/agent/join_token/" + token.Value
	settings := fmt.Sprintf(agentSettings, s.agent.dir, s.serverPort, s.agentSocket(), s.config.TrustDomain,
		s.agent.path("bundle.pem"), s.agent.path("token"))
	for name, text := range map[string]string{"agent.conf": settings, "bundle.pem": string(bundle), "token": token.Value} {
		if err := os.WriteFile(s.agent.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	s.agentRun, err = s.agent.start(command{path: path, args: []string{"run", "-config", s.agent.path("agent.conf")}})
	if err != nil {
		return err
	}
	return s.agentRun.ready(ctx, func(ctx context.Context) error {
		_, err := os.Stat(s.agentSocket()) // appears when the agent has joined
		return err
	})
}

func (s *SPIREServers) agentSocket() string { return s.agent.path("agent.sock") }

// WorkloadAPI returns the address of the Workload API, in the form of SPIFFE_ENDPOINT_SOCKET.
func (s *SPIREServers) WorkloadAPI() string { return "unix://" + s.agentSocket() }

// TrustDomain returns the name of the trust domain.
func (s *SPIREServers) TrustDomain() string { return s.config.TrustDomain }

// BundlePEM returns the present X.509 authorities of the trust domain.
func (s *SPIREServers) BundlePEM(ctx context.Context) ([]byte, error) {
	return s.ask(ctx, "bundle", "show", "-format", "pem")
}

// Authority makes one step in replacing the authority of X.509-SVIDs, of "prepare", "activate", "taint" and "revoke", in
// this order. Workloads see each a second or two later.
func (s *SPIREServers) Authority(ctx context.Context, step string) error {
	words := []string{"localauthority", "x509", step}
	if step != "prepare" {
		answer, err := s.ask(ctx, "localauthority", "x509", "show", "-output", "json")
		if err != nil {
			return err
		}
		var all struct {
			Prepared, Old struct {
				ID string `json:"authority_id"`
			}
		}
		if err := json.Unmarshal(answer, &all); err != nil {
			return fmt.Errorf("spire-server localauthority show: %w", err)
		}
		id := all.Old.ID
		if step == "activate" {
			id = all.Prepared.ID
		}
		words = append(words, "-authorityID", id)
	}
	_, err := s.ask(ctx, words...)
	return err
}

// Entry registers a workload under a complete SPIFFE ID. Without selectors it covers every process of our user. Entry
// then returns when the Workload API issues that identity to us. With selectors (such as "unix:path:/bin/x") it
// returns when the server has the entry; the agent synchronises every second.
func (s *SPIREServers) Entry(ctx context.Context, spiffeID string, selectors ...string) error {
	return s.EntryWithHint(ctx, spiffeID, "", selectors...)
}

// EntryWithHint is Entry with a hint, by which a workload can tell its SVIDs apart. Empty is none.
func (s *SPIREServers) EntryWithHint(ctx context.Context, spiffeID, hint string, selectors ...string) error {
	ours := len(selectors) == 0
	if ours {
		selectors = []string{"unix:uid:" + strconv.Itoa(os.Getuid())}
	}
	words := []string{"entry", "create", "-parentID", s.agentID, "-spiffeID", spiffeID, "-hint", hint}
	for _, selector := range selectors {
		words = append(words, "-selector", selector)
	}
	if _, err := s.ask(ctx, words...); err != nil {
		return fmt.Errorf("registering %s: %w", spiffeID, err)
	}
	if !ours {
		return nil
	}
	return s.agentRun.ready(ctx, func(ctx context.Context) error { return s.handsOut(ctx, spiffeID) })
}

func (s *SPIREServers) handsOut(ctx context.Context, spiffeID string) error {
	svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		return fmt.Errorf("calling the Workload API: %w", err)
	}
	for _, svid := range svids {
		if svid.ID.String() == spiffeID {
			return nil
		}
	}
	return fmt.Errorf("the Workload API does not hand out %s", spiffeID)
}

// Close ends both and removes their data.
func (s *SPIREServers) Close() error {
	var errs []error
	for _, p := range []*process{s.agentRun, s.serverRun} {
		if p != nil {
			errs = append(errs, p.kill())
		}
	}
	for _, n := range []*workdir{s.agent, s.server} {
		if n != nil {
			errs = append(errs, n.close())
		}
	}
	return errors.Join(errs...)
}
