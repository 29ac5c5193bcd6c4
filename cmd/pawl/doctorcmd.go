package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/api/client"
	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/vault"
)

func doctorCommand() *cobra.Command {
	var file string
	var onHost bool
	var host sshHost
	c := &cobra.Command{
		Use: "doctor --config FILE", Short: "Check everything a broker needs, with a hint for each fault", Args: cobra.NoArgs,
		Long: "Check everything that the broker of a configuration file needs: the policy bundle, the Workload API,\n" +
			"Vault and its rights there, the ledger and the backends. Run it on the broker's machine as the broker's\n" +
			"user. It prints one line for each check, and a hint for each fault. It does not disturb a running broker.\n" +
			"It logs in to Vault, makes the broker's database logins, and ends all of these at its end.\n\n" +
			"With --ssh-host it checks the sshd of this machine instead, as a target of SSH tools. Run it there as root.",
		Example: "  pawl doctor --config pawl.yaml\n  pawl doctor --ssh-host --user deploy --address 10.0.0.5",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if onHost {
				if err := required(cmd, "user"); err != nil {
					return err
				}
				d := doctor{out: cmd.OutOrStdout()}
				return d.sshd(cmd.Context(), host)
			}
			if err := required(cmd, "config"); err != nil {
				return err
			}
			config, err := wire.ReadConfig(file)
			if err != nil {
				return hinted{err, "docs/configuration.md explains each key"}
			}
			d := doctor{c: config, out: cmd.OutOrStdout()}
			return d.run(cmd.Context())
		},
	}
	c.Flags().StringVar(&file, "config", "", "the broker's configuration; required without --ssh-host")
	c.Flags().BoolVar(&onHost, "ssh-host", false, "check the sshd of this machine")
	c.Flags().StringSliceVar(&host.users, "user", nil, "with --ssh-host: a principal of the tools; may be repeated")
	c.Flags().StringVar(&host.address, "address", "127.0.0.1", "with --ssh-host: the address from which agents log in")
	c.Flags().StringVar(&host.sshd, "sshd", "/usr/sbin/sshd", "with --ssh-host: the program")
	c.Flags().StringVar(&host.config, "sshd-config", "", "with --ssh-host: its configuration; empty: its own default")
	c.MarkFlagsMutuallyExclusive("config", "ssh-host")
	return c
}

// sshd makes the checks of an SSH target.
func (d *doctor) sshd(ctx context.Context, h sshHost) error {
	for _, user := range h.users {
		d.check(ctx, "user "+user, "the label native needs a host without ForceCommand for its principals: docs/narrowing.md",
			func(ctx context.Context) (string, error) { return h.user(ctx, user) })
	}
	d.check(ctx, "revoked keys", "the file must be the broker's list, or a copy of it that the platform renames into place", h.list)
	return d.result()
}

// doctor checks the parts of one configuration.
type doctor struct {
	c      wire.Config
	out    io.Writer
	svid   *x509svid.SVID   // the broker's own; nil until it is fetched
	vault  *vault.Client    // logged in like the broker; nil until then
	now    func() time.Time // nil: time.Now
	faults int
}

// checkTime bounds each check.
const checkTime = 10 * time.Second

// run makes all checks. A failed check does not skip the later ones.
func (d *doctor) run(ctx context.Context) error {
	for _, check := range []struct {
		what, hint string
		run        func(context.Context) (found string, err error)
	}{
		{"policy bundle", "sign one with `pawl policy sign`, by keys that policy.keys lists", d.policy},
		{"identity", "is the Workload API at workload_api, and has it an entry for this process?", d.identity},
		{"vault", "is it up and unsealed, and is vault.ca the authority of its certificate?", d.vaultHealth},
		{"vault rights", "`pawl vault plan` prints the setup that Vault needs, with the auth role", d.vaultRights},
		{"clock", "certificates end by Vault's clock: synchronise both machines, as with NTP", d.clock},
		{"revocation lists", "without its list a revoked certificate is not dead; docs/promises.md has the settings", d.lists},
		{"ledger", "it needs a directory that the broker may write to, and room to grow", d.ledger},
		{"broker", "start it with `pawl server`; a running broker logs the reason that it is not ready", d.broker},
		{"self-test", "the broker's log has the alarm with the cause; docs/configuration.md has the permit that it needs",
			d.selfTest},
	} {
		d.check(ctx, check.what, check.hint, check.run)
	}
	if w := d.c.FreezeWarning(); w != "" {
		fmt.Fprintf(d.out, "NOTE   %-16s %s\n", "freezes", w)
	}
	names := make([]string, 0, len(d.c.Backends))
	for name := range d.c.Backends {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		d.check(ctx, "backend "+name, "issuing with its tools fails until this is repaired; other tools still work",
			func(ctx context.Context) (string, error) { return d.backend(ctx, name) })
	}
	if d.vault != nil {
		_ = d.vault.Logout(ctx) // else what the doctor made ends by itself, the logins after service_ttl
		d.vault.Close()
	}
	return d.result()
}

// backend checks that the target is there, and what the plugin examines with the broker's rights.
func (d *doctor) backend(ctx context.Context, name string) (string, error) {
	c := d.c.Backends[name]
	found, err := wire.Reach(ctx, c)
	if err != nil || d.vault == nil {
		return found, err
	}
	var tools []broker.Tool
	if running, err := wire.LoadPolicy(d.c.Policy); err == nil { // else the check of the bundle says why not
		tools = running.Current().Tools()
	}
	more, err := wire.Examine(ctx, d.vault, name, c, tools)
	if more != "" {
		found += "; " + more
	}
	return found, err
}

func (d *doctor) result() error {
	if d.faults > 0 {
		return fmt.Errorf("%d of the checks failed", d.faults)
	}
	return nil
}

// check makes one check and prints its line.
func (d *doctor) check(ctx context.Context, what, hint string, run func(context.Context) (string, error)) {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	found, err := run(ctx)
	if err != nil {
		d.faults++
		text := strings.ReplaceAll(oneLine(err.Error()), "\n", "; ")
		fmt.Fprintf(d.out, "WRONG  %-16s %s\n       %-16s hint: %s\n", what, text, "", hint)
		return
	}
	fmt.Fprintf(d.out, "ok     %-16s %s\n", what, found)
}

func (d *doctor) policy(context.Context) (string, error) {
	p, err := wire.CheckPolicy(d.c)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d tools, %d warnings, %s", len(p.Tools()), len(p.Warnings()), p.Digest()), nil
}

func (d *doctor) options() (options []workloadapi.ClientOption) {
	if d.c.WorkloadAPI != "" {
		options = append(options, workloadapi.WithAddr(d.c.WorkloadAPI))
	}
	return options
}

func (d *doctor) identity(ctx context.Context) (string, error) {
	got, err := workloadapi.FetchX509Context(ctx, d.options()...)
	if err != nil {
		return "", err
	}
	for _, name := range d.c.TrustDomains {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return "", fmt.Errorf("trust_domains: %w", err)
		}
		if !got.Bundles.Has(td) {
			return "", fmt.Errorf("the Workload API has no bundle of %s, so the broker refuses its workloads", td)
		}
	}
	want, err := client.ParseIdentity(d.c.SPIFFEID)
	if err != nil {
		return "", err
	}
	d.svid, err = want.Choose(got.SVIDs, spiffeid.ID{},
		"set spiffe_id to the SPIFFE ID or the hint of the broker's own entry, or leave one entry for it")
	if err != nil {
		return "", err
	}
	end := d.svid.Certificates[0].NotAfter
	if left := time.Until(end); left <= 0 {
		return "", fmt.Errorf("the SVID of %s expired at %s", d.svid.ID, end.UTC().Format(time.RFC3339))
	}
	return fmt.Sprintf("%s until %s", d.svid.ID, end.UTC().Format(time.RFC3339)), nil
}

// vaultRoots reads the authorities of Vault's certificate.
func (d *doctor) vaultRoots() (*x509.CertPool, error) {
	pem, err := os.ReadFile(d.c.Vault.CA)
	if err != nil {
		return nil, fmt.Errorf("vault.ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("vault.ca %q holds no certificate", d.c.Vault.CA)
	}
	return roots, nil
}

// vaultHealth requests Vault's health, which needs no login.
func (d *doctor) vaultHealth(ctx context.Context) (string, error) {
	roots, err := d.vaultRoots()
	if err != nil {
		return "", err
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	client := &http.Client{Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, d.c.Vault.Address+"/v1/sys/health", nil)
	if err != nil {
		return "", err
	}
	answer, err := client.Do(r)
	if err != nil {
		return "", err
	}
	_ = answer.Body.Close() // only the status counts
	switch answer.StatusCode {
	case http.StatusOK:
		return d.c.Vault.Address + " is unsealed", nil
	case http.StatusTooManyRequests: // the check of the rights shows whether it forwards
		return d.c.Vault.Address + " is unsealed, a standby", nil
	case 474:
		return "", fmt.Errorf("%s is a standby that has lost the active node", d.c.Vault.Address)
	case http.StatusNotImplemented:
		return "", fmt.Errorf("%s is not initialised", d.c.Vault.Address)
	case http.StatusServiceUnavailable:
		return "", fmt.Errorf("%s is sealed", d.c.Vault.Address)
	}
	return "", fmt.Errorf("%s answers %s", d.c.Vault.Address, answer.Status)
}

// vaultRights logs in like the broker, and makes the requests of the broker's background work.
func (d *doctor) vaultRights(ctx context.Context) (string, error) {
	client, err := d.connect(ctx)
	if err != nil {
		return "", err
	}
	d.vault = client
	var wrong []string
	for _, c := range client.Check(ctx) {
		wrong = append(wrong, c.Text)
	}
	if len(wrong) > 0 {
		return "", errors.New(strings.Join(wrong, "; "))
	}
	stuck, err := client.Irrevocable(ctx)
	if err != nil {
		return "", fmt.Errorf("listing irrevocable leases: %w", err)
	}
	if len(stuck) > 0 {
		return "", fmt.Errorf("vault has given up revoking %d leases; a person must end them by hand", len(stuck))
	}
	running, err := wire.LoadPolicy(d.c.Policy)
	if err != nil {
		return "logged in; the tools' rights are unknown without a policy bundle", nil
	}
	leased := 0
	for _, tool := range wire.Access(running.Current().Tools(), d.c.Backends) {
		if !tool.Leased {
			continue
		}
		if _, err := client.Leases(ctx, tool.Path); err != nil {
			return "", fmt.Errorf("listing the leases of policy %s: %w", tool.Policy, err)
		}
		leased++
	}
	return fmt.Sprintf("logged in, may list the leases of %d tools, none is irrevocable", leased), nil
}

// clock compares Vault's clock with this machine's.
func (d *doctor) clock(ctx context.Context) (string, error) {
	if d.vault == nil {
		return "", errors.New("not tried: the login to Vault failed")
	}
	if err := d.vault.MeasureClock(ctx); err != nil {
		return "", err
	}
	ahead, uncertain, _ := d.vault.Skew()
	return fmt.Sprintf("Vault's is %.1fs ahead of this machine's, within %.1fs", ahead.Seconds(), uncertain.Seconds()),
		d.vault.CheckClock()
}

// connect logs in like the broker.
func (d *doctor) connect(ctx context.Context) (*vault.Client, error) {
	if d.svid == nil {
		return nil, errors.New("not tried: there is no SVID to log in with")
	}
	roots, err := d.vaultRoots()
	if err != nil {
		return nil, err
	}
	client, err := vault.New(vault.Config{
		Address: d.c.Vault.Address, Roots: roots, Namespace: d.c.Vault.Namespace, Login: d.login(),
		BehindProxy: d.c.Vault.BehindProxy, Now: d.now,

		IdentityPolicies: d.c.Vault.IdentityPolicies, Tools: d.access})
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := client.Ready()
		if err == nil {
			return client, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			client.Close()
			return nil, fmt.Errorf("logging in: %w", err)
		}
	}
}

// access lists the access to Vault of the bundle's tools; none without a bundle.
func (d *doctor) access() []vault.Access {
	running, err := wire.LoadPolicy(d.c.Policy)
	if err != nil {
		return nil
	}
	return wire.Access(running.Current().Tools(), d.c.Backends)
}

// lists checks that every authority of the tools' certificates has a revocation list.
func (d *doctor) lists(ctx context.Context) (string, error) {
	running, err := wire.LoadPolicy(d.c.Policy)
	if err != nil {
		return "the tools are unknown without a policy bundle", nil
	}
	if d.vault == nil {
		return "", errors.New("not tried: the login to Vault failed")
	}
	found, err := wire.Survey(ctx, d.vault, running.Current().Tools(), d.c.Backends)
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "no tool makes certificates", nil
	}
	return strings.Join(found, "; "), nil
}

func (d *doctor) login() vault.Login {
	role := cmp.Or(d.c.Vault.Role, "pawl-broker")
	if d.c.Vault.Auth == "jwt" {
		return vault.Login{Mount: d.c.Vault.Mount, JWTRole: role, JWT: func(ctx context.Context) (string, error) {
			svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: d.c.Vault.Audience, Subject: d.svid.ID}, d.options()...)
			if err != nil {
				return "", err
			}
			return svid.Marshal(), nil
		}}
	}
	certificate := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		c := &tls.Certificate{PrivateKey: d.svid.PrivateKey, Leaf: d.svid.Certificates[0]}
		for _, cert := range d.svid.Certificates {
			c.Certificate = append(c.Certificate, cert.Raw)
		}
		return c, nil
	}
	return vault.Login{Mount: d.c.Vault.Mount, CertRole: role, Certificate: certificate}
}

// minFree is the free space that the ledger's disk must have, in bytes.
const minFree = 256 << 20

// ledger checks the file and its disk. It does not open the file, because a running broker has it locked.
func (d *doctor) ledger(context.Context) (string, error) {
	dir := filepath.Dir(d.c.Ledger)
	const write, search = 2, 1 // access(2)
	if err := syscall.Access(dir, write|search); err != nil {
		return "", fmt.Errorf("directory %q: %w", dir, err)
	}
	what := "will be created at the first start"
	switch info, err := os.Stat(d.c.Ledger); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return "", err
	case !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0:
		return "", fmt.Errorf("%q has mode %s; only the broker's user may have access", d.c.Ledger, info.Mode())
	default:
		what = fmt.Sprintf("%d MiB", info.Size()>>20)
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(dir, &disk); err != nil {
		return "", fmt.Errorf("directory %q: %w", dir, err)
	}
	free := disk.Bavail * uint64(disk.Bsize)
	if free < minFree {
		return "", fmt.Errorf("only %d MiB are free in %q", free>>20, dir)
	}
	return fmt.Sprintf("%s, %s; %d MiB free", d.c.Ledger, what, free>>20), nil
}

// broker requests the readiness of a running broker over the operators' socket. A condition that leaves other tools
// working is a fault too.
func (d *doctor) broker(ctx context.Context) (string, error) {
	answer, err := d.get(ctx, "/readyz")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return "not running", nil
	}
	if err != nil {
		return "", err
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	var health struct {
		Conditions []api.Condition `json:"conditions"`
	}
	if err := json.NewDecoder(io.LimitReader(answer.Body, 1<<20)).Decode(&health); err != nil {
		return "", fmt.Errorf("the broker's readiness answers %s, and not JSON", answer.Status)
	}
	var wrong []string
	for _, c := range health.Conditions {
		wrong = append(wrong, fmt.Sprintf("%s (%s): %s", c.Part, c.Code, c.Detail))
	}
	switch {
	case answer.StatusCode != http.StatusOK:
		return "", fmt.Errorf("running but not ready: %s", strings.Join(wrong, "; "))
	case len(wrong) > 0:
		return "", fmt.Errorf("running, but not all of it works: %s", strings.Join(wrong, "; "))
	}
	return "running and ready", nil
}

// get requests a path from a running broker over the operators' socket.
func (d *doctor) get(ctx context.Context, path string) (*http.Response, error) {
	dialSocket := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.c.Listen.Socket)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://socket"+path, nil)
	if err != nil {
		return nil, err
	}
	return (&http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dialSocket}}).Do(r)
}

// selfTest reads the result of the self-test from a running broker's metrics.
func (d *doctor) selfTest(ctx context.Context) (string, error) {
	if d.c.SelfTest.Every == 0 {
		return "none is configured", nil
	}
	answer, err := d.get(ctx, "/metrics")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return "the broker is not running", nil
	}
	if err != nil {
		return "", err
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	page, err := io.ReadAll(io.LimitReader(answer.Body, 16<<20))
	switch {
	case err != nil:
		return "", err
	case answer.StatusCode != http.StatusOK:
		return "", fmt.Errorf("the broker's metrics answer %s", answer.Status)
	case !strings.Contains(string(page), "\npawl_selftest_ok 1\n"):
		return "", fmt.Errorf("the last self-test failed, or none has passed for two periods of %v: revoking may not work",
			d.c.SelfTest.Every)
	case strings.Contains(string(page), "\npawl_selftest_success_timestamp_seconds 0\n"):
		return "the first self-test has not run yet", nil
	}
	return "passed", nil
}
