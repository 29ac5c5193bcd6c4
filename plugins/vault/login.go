package vault

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"
)

// Login says how the broker proves itself to Vault: with its X.509-SVID (CertRole and
// Certificate) or with a JWT-SVID (JWTRole and JWT). There is no static token.
type Login struct {
	// CertRole is the role of the cert auth method. Vault names the login's entity after the
	// certificate's CommonName and refuses a certificate without one, so the broker's SVID needs
	// a DNS name (SPIRE makes the first one the CommonName).
	CertRole string
	// Certificate gives the SVID of the moment; it is called for each new connection.
	Certificate func(*tls.CertificateRequestInfo) (*tls.Certificate, error)

	// JWTRole is the role of the jwt auth method.
	JWTRole string
	// JWT gives a JWT-SVID whose one audience is the one that the role demands.
	JWT func(context.Context) (string, error)

	Mount string // of the auth method; empty: "cert" or "jwt"

	token string // of tests alone, through export_test.go
}

func (l *Login) check() error {
	cert := l.CertRole != "" && l.Certificate != nil && l.JWTRole == "" && l.JWT == nil
	jwt := l.JWTRole != "" && l.JWT != nil && l.CertRole == "" && l.Certificate == nil
	role := l.CertRole + l.JWTRole
	if l.token != "" {
		cert, role = true, "token"
	}
	if !cert && !jwt {
		return errors.New("Login needs CertRole and Certificate, or JWTRole and JWT, and not both")
	}
	orText(&l.Mount, map[bool]string{true: "cert", false: "jwt"}[cert])
	if err := checkPath([]string{l.Mount, role}); err != nil {
		return fmt.Errorf("Login: %w", err)
	}
	return nil
}

// certificate is shown on every connection, since a listener may demand one.
func (l *Login) certificate() func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return l.Certificate
}

// login gets a new login token. The SVID is shown on a connection made for this request alone,
// so that it is the one of the moment.
func (c *Client) login(ctx context.Context) (*node, error) {
	l := c.cfg.Login
	if l.token != "" {
		now := c.cfg.Now()
		return &node{token: l.token, accessor: "test", begun: now, ends: now.Add(time.Hour), hard: farFuture}, nil
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
	a, err := c.ask(ctx, call{method: "POST", path: "auth/" + l.Mount + "/login", body: body, fresh: true})
	if err != nil {
		return nil, fmt.Errorf("logging in to vault: %w", err)
	}
	if err := a.token("service"); err != nil {
		return nil, fmt.Errorf("logging in to vault: %w", err)
	}
	return &node{token: a.Auth.Token, accessor: a.Auth.Accessor, begun: sent,
		ends: sent.Add(seconds(a.Auth.LeaseDuration)), hard: farFuture}, nil
}

// farFuture is a hard end that Vault did not tell us.
var farFuture = time.Unix(1<<40, 0)

// keepLoggedIn renews the login token well before its half-life and logs in again when that
// fails. The delegations made under a token that could not be renewed are branched again by
// the engine: they no longer count as held, but are renewed as long as steps may hang on them.
func (c *Client) keepLoggedIn(ctx context.Context) {
	const first, last = 500 * time.Millisecond, 30 * time.Second
	pause := first
	for {
		wait, err := c.refresh(ctx)
		if ctx.Err() != nil {
			return
		}
		c.once.Do(func() { close(c.met) })
		if err != nil {
			c.cfg.Log.Error("not logged in to vault", "error", err, "again_in", pause)
			wait, pause = pause, min(2*pause, last)
		} else {
			pause = first
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-c.kick:
			c.pace(ctx)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// pace lets refusals kick the loop at most every 200 ms.
func (c *Client) pace(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(200 * time.Millisecond):
	}
}

// refresh renews the login token or logs in, and tells when to come again.
func (c *Client) refresh(ctx context.Context) (time.Duration, error) {
	c.mu.Lock()
	s := c.session
	c.mu.Unlock()
	if s != nil {
		err := c.renew(ctx, s, true)
		if err == nil {
			return c.due(s), c.note(nil)
		}
		if !answered(err) && c.Ready() == nil {
			return 0, c.note(err) // Vault is away; a new login would cost every delegation a new token
		}
	}
	s, err := c.login(ctx)
	if err != nil {
		return 0, c.note(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.session, c.down = s, nil
	c.nodes[s.accessor] = s
	return c.dueLocked(s), nil
}

// answered reports whether Vault itself refused, as against being away, sealed or overloaded.
func answered(err error) bool {
	var f *failure
	return errors.As(err, &f) && (f.status == 400 || f.status == 403 || f.status == 500)
}

func (c *Client) note(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = err
	return err
}

func (c *Client) due(s *node) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dueLocked(s)
}

// dueLocked is two fifths of the token's life after it began or was renewed.
func (c *Client) dueLocked(s *node) time.Duration {
	return max(s.begun.Add(s.ends.Sub(s.begun)*2/5).Sub(c.cfg.Now()), 200*time.Millisecond)
}
