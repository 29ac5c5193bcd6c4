package vault

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/backoff"
)

// Login is how the broker authenticates to Vault: with its X.509-SVID (CertRole and Certificate) or with a JWT-SVID
// (JWTRole and JWT). There is no static token.
type Login struct {
	// CertRole is the role of the cert auth method. Vault names the login's entity after the certificate's CommonName
	// and refuses a certificate without one. So the broker's SVID needs a DNS name: SPIRE makes the first one the
	// CommonName.
	CertRole string
	// Certificate returns the current SVID. It is called for each new connection.
	Certificate func(*tls.CertificateRequestInfo) (*tls.Certificate, error)

	// JWTRole is the role of the jwt auth method.
	JWTRole string
	// JWT returns a JWT-SVID. Its single audience is the one that the role requires.
	JWT func(context.Context) (string, error)

	Mount string // of the auth method; empty: "cert" or "jwt"

	token string // set by tests only, through export_test.go
}

func (l *Login) check() error {
	cert := l.CertRole != "" && l.Certificate != nil && l.JWTRole == "" && l.JWT == nil
	jwt := l.JWTRole != "" && l.JWT != nil && l.CertRole == "" && l.Certificate == nil
	role := l.role()
	if l.token != "" {
		cert, role = true, "token"
	}
	if !cert && !jwt {
		return errors.New("Login needs either CertRole and Certificate, or JWTRole and JWT")
	}
	setDefault(&l.Mount, map[bool]string{true: "cert", false: "jwt"}[cert])
	if _, err := broker.VaultPathOf(l.Mount, role); err != nil {
		return fmt.Errorf("Login: %w", err)
	}
	return nil
}

// certificate returns the callback for every connection, since a listener may require a client certificate.
func (l *Login) certificate() func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return l.Certificate
}

// role is the auth role, and the name of the policy of the broker's own token.
func (l *Login) role() string { return l.CertRole + l.JWTRole }

// login gets a new login token. It opens a new connection, so that it presents the current SVID.
func (c *Client) login(ctx context.Context) (*node, error) {
	l := c.cfg.Login
	if l.token != "" {
		now := c.cfg.Now()
		return &node{token: l.token, accessor: "test", renewed: now,
			expires: now.Add(time.Hour), maxExpires: farFuture}, nil
	}
	body := map[string]string{"name": l.CertRole}
	if l.JWT != nil {
		token, err := l.JWT(ctx)
		if err != nil {
			return nil, fmt.Errorf("getting a JWT-SVID for vault: %w", err)
		}
		body = map[string]string{"role": l.JWTRole, "jwt": token}
	}
	sent := c.cfg.Now()
	resp, err := c.do(ctx, call{method: "POST", path: "auth/" + l.Mount + "/login", body: body, newConn: true})
	if err != nil {
		return nil, fmt.Errorf("logging in to vault: %w", err)
	}
	if err := resp.checkToken("service"); err != nil {
		return nil, fmt.Errorf("logging in to vault: %w", err)
	}
	return &node{token: resp.Auth.Token, accessor: resp.Auth.Accessor, renewed: sent,
		expires: sent.Add(seconds(resp.Auth.LeaseDuration)), maxExpires: farFuture}, nil
}

// farFuture is the maximum expiry of a token for which Vault reported none.
var farFuture = time.Unix(1<<40, 0)

// loginLoop renews the login token before half of its life has passed, and logs in again when that fails. After a new
// login the delegations of the old token are no longer held, so the engine branches them again. Their tokens are still
// renewed as long as steps may depend on them.
func (c *Client) loginLoop(ctx context.Context) {
	retry := backoff.Exponential{First: 500 * time.Millisecond, Most: 30 * time.Second}
	for {
		wait, err := c.refreshLogin(ctx)
		if ctx.Err() != nil {
			return
		}
		c.firstLoginOnce.Do(func() { close(c.firstLogin) })
		if err != nil {
			wait = retry.Next()
			c.cfg.Log.Error("vault login failed", "error", err, "again_in", wait)
		} else {
			retry.Reset()
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-c.recheck:
			c.throttle(ctx)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// throttle lets 403 responses wake the loop at most once in 200 ms.
func (c *Client) throttle(ctx context.Context) {
	_ = backoff.Sleep(ctx, 200*time.Millisecond) // loginLoop ends with ctx
}

// refreshLogin renews the login token or logs in. It returns how long to wait before the next renewal.
func (c *Client) refreshLogin(ctx context.Context) (time.Duration, error) {
	c.mu.Lock()
	s := c.session
	c.mu.Unlock()
	if s != nil {
		err := c.renew(ctx, s, true)
		if err == nil {
			return c.untilRenewal(s), c.setLoginErr(nil)
		}
		if !rejected(err) && c.loggedIn() == nil {
			return 0, c.setLoginErr(err) // Vault is down; a new login would cost every delegation a new token
		}
	}
	s, err := c.login(ctx)
	if err != nil {
		return 0, c.setLoginErr(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.session, c.loginErr = s, nil
	c.nodes[s.accessor] = s
	return c.untilRenewalLocked(s), nil
}

// rejected reports whether Vault itself refused the token, rather than being down, sealed or overloaded.
func rejected(err error) bool {
	var f *failure
	return errors.As(err, &f) && (f.status == 400 || f.status == 403 || f.status == 500)
}

func (c *Client) setLoginErr(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.loginErr = err
	return err
}

func (c *Client) untilRenewal(s *node) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.untilRenewalLocked(s)
}

// untilRenewalLocked returns the time until two fifths of the token's life have passed since its login or renewal.
func (c *Client) untilRenewalLocked(s *node) time.Duration {
	return max(s.renewed.Add(s.expires.Sub(s.renewed)*2/5).Sub(c.cfg.Now()), 200*time.Millisecond)
}
