package parts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
)

// VaultConfig configures a Vault server.
type VaultConfig struct {
	// Persistent keeps state in files, so that Restart finds it again. False keeps everything in memory.
	Persistent bool
	// MaxRequestDuration bounds one request, and so the time in which a mint already sent may complete. Zero is
	// Vault's default of 90 s.
	MaxRequestDuration time.Duration
	// RevokeRetryBase is the base of the back-off between Vault's six attempts at a revocation. Zero is Vault's
	// default of 10 s, ten minutes in total. Only the server built here accepts another value; with one on PATH,
	// Vault returns ErrMissing.
	RevokeRetryBase time.Duration
	// Standby runs a second node over the same storage, which StepDown makes the active one. A standby forwards requests.
	// It excludes Persistent. Only the server built here has it; with one on PATH, Vault returns ErrMissing.
	Standby bool
	// Binaries says where the program comes from. Zero finds or builds it.
	Binaries Binaries
}

// VaultServer is a real Vault with TLS on a loopback port, initialised and unsealed. It requests a client certificate
// but does not require one, so TLS certificate auth works. Root token and unseal key are only in memory. Its methods
// are not safe for concurrent use with Restart.
type VaultServer struct {
	config    VaultConfig
	workdir   *workdir
	run       command
	process   *process
	address   string
	standby   string // empty without Standby
	authority []byte
	unsealKey string
	rootToken string
}

// Vault starts a Vault server. It returns ErrMissing if there is none and none can be built.
func Vault(ctx context.Context, config VaultConfig) (*VaultServer, error) {
	path, official, err := config.Binaries.Vault(ctx)
	if err != nil {
		return nil, err
	}
	if official && config.RevokeRetryBase != 0 {
		return nil, missing("Vault", "the one on PATH does not support another back-off between attempts at a revocation")
	}
	if official && config.Standby {
		return nil, missing("Vault", "the one on PATH does not run a standby in memory")
	}
	workdir, err := newWorkdir("vault", "KILL")
	if err != nil {
		return nil, err
	}
	v := &VaultServer{config: config, workdir: workdir}
	if err := v.prepare(path, official); err != nil {
		return nil, errors.Join(fmt.Errorf("preparing Vault: %w", err), v.Close())
	}
	if err := v.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("starting Vault: %w", err), v.Close())
	}
	return v, nil
}

// prepare writes the files that the server reads and chooses its command line.
func (v *VaultServer) prepare(path string, official bool) error {
	authority, certificate, key, err := serverCertificate(time.Now())
	if err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	v.authority, v.address = authority, fmt.Sprintf("127.0.0.1:%d", port)
	for name, text := range map[string][]byte{"ca.pem": authority, "cert.pem": certificate, "key.pem": key} {
		if err := os.WriteFile(v.workdir.path(name), text, 0o600); err != nil {
			return err
		}
	}
	if v.config.Standby {
		if port, err = freePort(); err != nil {
			return err
		}
		v.standby = fmt.Sprintf("127.0.0.1:%d", port)
	}
	if !official {
		v.run = command{path: path, args: v.flags()}
		return nil
	}
	settings, err := json.Marshal(v.settings())
	if err != nil {
		return err
	}
	file := v.workdir.path("config.json")
	v.run = command{path: path, args: []string{"server", "-config=" + file}}
	return os.WriteFile(file, settings, 0o600)
}

// logLevel is the log level of every server: warnings and errors.
const logLevel = "warn"

// flags returns the command line of the server built from cmd/parts/vaultserver.
func (v *VaultServer) flags() []string {
	flags := []string{
		"-address=" + v.address,
		"-cert=" + v.workdir.path("cert.pem"),
		"-key=" + v.workdir.path("key.pem"),
		"-max-request-duration=" + v.config.MaxRequestDuration.String(),
		"-revoke-retry-base=" + v.config.RevokeRetryBase.String(),
		"-log-level=" + logLevel,
	}
	if v.standby != "" {
		flags = append(flags, "-standby="+v.standby)
	}
	if v.config.Persistent {
		flags = append(flags, "-storage="+v.workdir.path("storage"))
	}
	return flags
}

// settings returns the configuration file of an official vault or bao.
func (v *VaultServer) settings() map[string]any {
	listener := map[string]any{
		"address":       v.address,
		"tls_cert_file": v.workdir.path("cert.pem"),
		"tls_key_file":  v.workdir.path("key.pem"),
	}
	if v.config.MaxRequestDuration > 0 {
		listener["max_request_duration"] = v.config.MaxRequestDuration.String()
	}
	storage := map[string]any{"inmem": map[string]any{}}
	if v.config.Persistent {
		storage = map[string]any{"file": map[string]any{"path": v.workdir.path("storage")}}
	}
	return map[string]any{
		"listener":      []any{map[string]any{"tcp": listener}},
		"storage":       storage,
		"api_addr":      v.Address(),
		"disable_mlock": true,
		"log_level":     logLevel,
	}
}

// start runs the server and unseals it. It initialises new storage first.
func (v *VaultServer) start(ctx context.Context) error {
	client, err := v.Client()
	if err != nil {
		return err
	}
	v.process, err = v.workdir.start(v.run)
	if err != nil {
		return err
	}
	var initialised bool
	err = v.process.ready(ctx, func(ctx context.Context) (err error) {
		initialised, err = client.Sys().InitStatusWithContext(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if !initialised {
		secrets, err := client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
		if err != nil {
			return fmt.Errorf("initialising: %w", err)
		}
		v.unsealKey, v.rootToken = secrets.KeysB64[0], secrets.RootToken
	}
	if err := v.Unseal(ctx); err != nil || v.standby == "" {
		return err
	}
	return v.unsealStandby(ctx)
}

// Client returns a new client that holds the root token and never retries.
func (v *VaultServer) Client() (*api.Client, error) { return v.client(v.Address()) }

func (v *VaultServer) client(address string) (*api.Client, error) {
	config := api.DefaultConfig()
	if config.Error != nil {
		return nil, fmt.Errorf("preparing a Vault client: %w", config.Error)
	}
	config.Address, config.MaxRetries = address, 0
	if err := config.ConfigureTLS(&api.TLSConfig{CACertBytes: v.authority}); err != nil {
		return nil, fmt.Errorf("preparing a Vault client: %w", err)
	}
	client, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("preparing a Vault client: %w", err)
	}
	client.ClearNamespace() // VAULT_NAMESPACE and VAULT_TOKEN are for another server
	client.SetToken(v.rootToken)
	return client, nil
}

// Address returns the server's URL, https://127.0.0.1:port. It stays the same across a Restart.
func (v *VaultServer) Address() string { return "https://" + v.address }

// CAPEM returns the certificate authority that verifies the server.
func (v *VaultServer) CAPEM() []byte { return v.authority }

// CAFile returns the path of a file with CAPEM, which exists until Close.
func (v *VaultServer) CAFile() string { return v.workdir.path("ca.pem") }

// RootToken returns the root token. It changes at a Restart without Persistent.
func (v *VaultServer) RootToken() string { return v.rootToken }

// Log returns the end of the server's log.
func (v *VaultServer) Log() string { return v.process.tail() }

// Seal seals the server, as an operator would.
func (v *VaultServer) Seal(ctx context.Context) error {
	client, err := v.Client()
	if err != nil {
		return err
	}
	if err := client.Sys().SealWithContext(ctx); err != nil {
		return fmt.Errorf("sealing Vault: %w", err)
	}
	return nil
}

// StepDown makes the other node the active one, and returns when this one is a standby that forwards requests.
func (v *VaultServer) StepDown(ctx context.Context) error {
	client, err := v.Client()
	if err != nil {
		return err
	}
	if err := client.Sys().StepDownWithContext(ctx); err != nil {
		return fmt.Errorf("stepping down: %w", err)
	}
	return v.process.ready(ctx, func(ctx context.Context) error {
		health, err := client.Sys().HealthWithContext(ctx)
		if err == nil && !health.Standby {
			err = errors.New("still active")
		}
		if err == nil {
			_, err = client.Auth().Token().LookupSelfWithContext(ctx)
		}
		return err
	})
}

// Cut cuts the network between the two nodes: a standby forwards no requests. It does not wait for the effect.
func (v *VaultServer) Cut() error { return v.process.signal(syscall.SIGUSR1) }

// Mend undoes Cut.
func (v *VaultServer) Mend() error { return v.process.signal(syscall.SIGUSR2) }

// unsealStandby unseals the second node.
func (v *VaultServer) unsealStandby(ctx context.Context) error {
	client, err := v.client("https://" + v.standby)
	if err != nil {
		return err
	}
	return v.process.ready(ctx, func(ctx context.Context) error {
		status, err := client.Sys().UnsealWithContext(ctx, v.unsealKey)
		if err == nil && status.Sealed {
			err = errors.New("still sealed")
		}
		return err
	})
}

// Unseal unseals the server and returns when it answers requests again.
func (v *VaultServer) Unseal(ctx context.Context) error {
	client, err := v.Client()
	if err != nil {
		return err
	}
	status, err := client.Sys().UnsealWithContext(ctx, v.unsealKey)
	if err != nil {
		return fmt.Errorf("unsealing Vault: %w", err)
	}
	if status.Sealed {
		return errors.New("unsealing Vault: it is still sealed")
	}
	return v.process.ready(ctx, func(ctx context.Context) error {
		health, err := client.Sys().HealthWithContext(ctx)
		if err == nil && (health.Sealed || health.Standby) {
			err = errors.New("still sealed or on standby")
		}
		return err
	})
}

// Pause stops the process. The system still accepts connections, but no request is answered.
func (v *VaultServer) Pause() error { return v.process.pause() }

// Continue undoes Pause.
func (v *VaultServer) Continue() error { return v.process.signal(syscall.SIGCONT) }

// Kill ends the process as a crash would, and returns when it is gone. Restart starts it again.
func (v *VaultServer) Kill() error { return v.process.kill() }

// Restart ends the process in order if it still runs, starts it on the same address and unseals it. Without
// Persistent all its data is lost and RootToken is new.
func (v *VaultServer) Restart(ctx context.Context) error {
	if err := v.process.end(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stopping Vault: %w", err)
	}
	if err := v.start(ctx); err != nil {
		return fmt.Errorf("restarting Vault: %w", err)
	}
	return nil
}

// Close ends the server and removes its data.
func (v *VaultServer) Close() error {
	var err error
	if v.process != nil {
		err = v.process.kill()
	}
	return errors.Join(err, v.workdir.close())
}
