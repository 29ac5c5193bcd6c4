// Command vaultserver is HashiCorp Vault reduced to the engines that Pawl works with. It is a real server for
// development and tests on machines without a Vault.
//
// Vault is under the Business Source License 1.1. Therefore this is a separate module: nothing here is ever linked
// into the product. The server starts sealed, as `vault server` does. Package parts initialises and unseals it over
// the API, so that root token and unseal key never touch a disk.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	jwtauth "github.com/hashicorp/vault-plugin-auth-jwt"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/audit"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	"github.com/hashicorp/vault/builtin/logical/database"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/builtin/logical/ssh"
	"github.com/hashicorp/vault/builtin/logical/transit"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/plugins/database/postgresql"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical"
	"github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
	"github.com/hashicorp/vault/vault/cluster"
)

// options are the command-line flags.
type options struct {
	address     string
	certFile    string
	keyFile     string
	storage     string        // directory; empty keeps everything in memory
	maxDuration time.Duration // of one request; zero is Vault's own default of 90 s
	standby     string        // host:port of a second node over the same storage; empty: none
	retryBase   time.Duration // base of the back-off after a failed revocation; zero is Vault's own default of 10 s
	logLevel    string
}

func main() {
	var o options
	flag.StringVar(&o.address, "address", "127.0.0.1:0", "`host:port` to listen on; port 0 takes a free one")
	flag.StringVar(&o.certFile, "cert", "", "PEM `file` with the server's certificate (required)")
	flag.StringVar(&o.keyFile, "key", "", "PEM `file` with the certificate's key (required)")
	flag.StringVar(&o.storage, "storage", "", "`directory` that keeps state across a restart; in memory if empty")
	flag.DurationVar(&o.maxDuration, "max-request-duration", 0, "how long one request may take; 0 is Vault's default, 90s")
	flag.DurationVar(&o.retryBase, "revoke-retry-base", 0, "base of the back-off before a failed revocation is retried; 0 is Vault's default, 10s")
	flag.StringVar(&o.standby, "standby", "", "`host:port` of a second node in this process, over the same storage in memory; none if empty")
	flag.StringVar(&o.logLevel, "log-level", "warn", "trace, debug, info, warn or error")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "vaultserver: error: %v\n", err)
		os.Exit(1)
	}
}

// run serves until ctx ends, then seals the core so that file storage stays consistent.
func run(ctx context.Context, o options) error {
	logger := hclog.New(&hclog.LoggerOptions{Name: "vault", Level: hclog.LevelFromString(o.logLevel), Output: os.Stderr})
	storage, err := newStorage(o, logger)
	if err != nil {
		return fmt.Errorf("opening storage: %w", err)
	}
	nodes := []string{o.address}
	if o.standby != "" {
		nodes = append(nodes, o.standby)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, len(nodes))
	for _, address := range nodes {
		go func() { ended <- serve(ctx, o, address, storage, logger) }()
	}
	for range nodes { // the end of one node ends the other
		err = errors.Join(err, <-ended)
		stop()
	}
	return err
}

// serve runs one node until ctx ends.
func serve(ctx context.Context, o options, address string, storage physical.Backend, logger hclog.Logger) error {
	listener, err := listen(o, address)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }() // the server below closes it, except after an early error
	url := "https://" + listener.Addr().String()

	core, err := newCore(o, url, storage, logger)
	if err != nil {
		return fmt.Errorf("starting the core: %w", err)
	}
	if o.standby != "" {
		core.SetClusterListenerAddrs([]*net.TCPAddr{anyPort})
		core.SetClusterHandler(vaulthttp.Handler.Handler(&vault.HandlerProperties{
			Core: core, ListenerConfig: &configutil.Listener{MaxRequestDuration: o.maxDuration}}))
	}
	server := &http.Server{
		Handler: vaulthttp.Handler.Handler(&vault.HandlerProperties{
			Core:           core,
			ListenerConfig: &configutil.Listener{Address: listener.Addr().String(), MaxRequestDuration: o.maxDuration},
		}),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		ErrorLog:          logger.StandardLogger(nil),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	fmt.Println("ready", url)

	select {
	case err := <-served:
		return fmt.Errorf("serving on %s: %w", url, err)
	case <-ctx.Done():
	}
	closeErr := server.Close()
	<-served
	return errors.Join(closeErr, core.ShutdownWait())
}

// listen requests a certificate from every client and requires none. The cert auth method checks it.
func listen(o options, address string) (net.Listener, error) {
	pair, err := tls.LoadX509KeyPair(o.certFile, o.keyFile)
	if err != nil {
		return nil, fmt.Errorf("loading -cert and -key: %w", err)
	}
	listener, err := tls.Listen("tcp", address, &tls.Config{
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequestClientCert,
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2", "http/1.1"},
	})
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return listener, nil
}

func newCore(o options, url string, storage physical.Backend, logger hclog.Logger) (*vault.Core, error) {
	if o.maxDuration > 0 {
		vault.DefaultMaxRequestDuration = o.maxDuration // bounds a revocation in the background
	}
	config := &vault.CoreConfig{
		Physical:           storage,
		Logger:             logger,
		RedirectAddr:       url,
		DisableMlock:       true, // needs a privilege that a test does not have
		BuiltinRegistry:    builtins{},
		LogicalBackends:    engines,
		CredentialBackends: authMethods,
		AuditBackends:      map[string]audit.Factory{"file": audit.NewFileBackend},

		ExpirationRevokeRetryBase: o.retryBase,
	}
	if o.standby != "" {
		config.HAPhysical = storage.(physical.HABackend)
		config.ClusterAddr = "https://" + anyPort.String()
		config.ClusterNetworkLayer = newNetwork(logger)
		config.ClusterHeartbeatInterval = time.Second // a standby soon sees that it does not reach the active node
	}
	return vault.NewCore(config)
}

// anyPort has Vault take a free port for the other node, and announce it.
var anyPort = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}

// network connects a node with the other one. The signal USR1 cuts it, as a firewall between the nodes would: clients still
// reach both. USR2 mends it.
type network struct {
	*cluster.TCPLayer

	mu    sync.Mutex // guards the fields below
	cut   bool
	conns []net.Conn // that the node made to the other one
}

func newNetwork(logger hclog.Logger) *network {
	n := &network{TCPLayer: cluster.NewTCPLayer([]*net.TCPAddr{anyPort}, logger)}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		for s := range signals {
			n.mu.Lock()
			n.cut = s == syscall.SIGUSR1
			if n.cut {
				for _, c := range n.conns {
					_ = c.Close() // that may have ended
				}
				n.conns = nil
			}
			n.mu.Unlock()
		}
	}()
	return n
}

// Dial implements cluster.NetworkLayer.
func (n *network) Dial(address string, timeout time.Duration, config *tls.Config) (*tls.Conn, error) {
	n.mu.Lock()
	cut := n.cut
	n.mu.Unlock()
	if cut {
		return nil, errors.New("the network between the nodes is cut")
	}
	conn, err := n.TCPLayer.Dial(address, timeout, config)
	if err == nil {
		n.mu.Lock()
		n.conns = append(n.conns, conn)
		n.mu.Unlock()
	}
	return conn, err
}

func newStorage(o options, logger hclog.Logger) (physical.Backend, error) {
	dir := o.storage
	if o.standby != "" {
		return inmem.NewInmemHA(nil, logger)
	}
	if dir == "" {
		return inmem.NewInmem(nil, logger)
	}
	return file.NewFileBackend(map[string]string{"path": dir}, logger)
}

var (
	engines = map[string]logical.Factory{
		"database": database.Factory,
		"kv":       kv.Factory,
		"pki":      pki.Factory,
		"ssh":      ssh.Factory,
		"transit":  transit.Factory,
	}
	authMethods = map[string]logical.Factory{
		"approle": approle.Factory,
		"cert":    cert.Factory,
		"jwt":     jwtauth.Factory,
		"oidc":    jwtauth.Factory,
	}
	databases = map[string]func() (any, error){
		"postgresql-database-plugin": postgresql.New,
	}
)

// builtins lists the compiled-in plugins for the core's catalogue. Without it the database engine finds no plugin.
type builtins struct{}

func (builtins) Get(name string, kind consts.PluginType) (func() (any, error), bool) {
	var factory logical.Factory
	var ok bool
	switch kind {
	case consts.PluginTypeDatabase:
		plugin, ok := databases[name]
		return plugin, ok
	case consts.PluginTypeSecrets:
		factory, ok = engines[name]
	case consts.PluginTypeCredential:
		factory, ok = authMethods[name]
	}
	if !ok {
		return nil, false
	}
	return func() (any, error) { return factory, nil }, true
}

func (b builtins) Contains(name string, kind consts.PluginType) bool {
	_, ok := b.Get(name, kind)
	return ok
}

func (builtins) Keys(kind consts.PluginType) []string {
	switch kind {
	case consts.PluginTypeDatabase:
		return keys(databases)
	case consts.PluginTypeSecrets:
		return keys(engines)
	case consts.PluginTypeCredential:
		return keys(authMethods)
	}
	return nil
}

func (b builtins) DeprecationStatus(name string, kind consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, b.Contains(name, kind)
}

func (builtins) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }

func keys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
