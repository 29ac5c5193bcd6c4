package demo

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/cmd/dev"
)

// prove checks that nothing is left alive: at the backends, in Vault and in the ledger.
func (p *play) prove(ctx context.Context) error {
	p.scene("6  Nothing is left")
	alive := 0
	for _, h := range p.live {
		if h.works(ctx) == nil {
			alive++
		}
	}
	p.note("tried_again", "each captured secret was tried once more at its backend: %d of %d work", alive, len(p.live))
	open, err := p.awaitClosed(ctx)
	if err != nil {
		return err
	}
	p.note("ledger", "the ledger has %d grants that are not closed", open)
	leases, err := agentLeases(p.env)
	if err != nil {
		return err
	}
	p.note("vault_leases", "Vault has %d leases of agents", len(leases))
	left := alive + open + len(leases)
	if p.env.Postgres != nil {
		logins, err := agentLogins(ctx, p.env)
		if err != nil {
			return err
		}
		p.note("pg_roles", "PostgreSQL has %d logins of agents", len(logins))
		left += len(logins)
	}
	for i := range p.Events {
		if e := &p.Events[i]; e.AliveAfter != nil {
			*e.AliveAfter += left
			p.AliveAfter, p.FencedMS, p.DeadMS, p.Secrets = *e.AliveAfter, *e.FencedMS, *e.DeadMS, *e.Secrets
		}
	}
	if p.AliveAfter != 0 {
		return fmt.Errorf("%d secrets, grants, leases or logins are left alive", p.AliveAfter)
	}
	return nil
}

// awaitClosed waits until every grant is closed in the ledger, and returns the number that is not.
func (p *play) awaitClosed(ctx context.Context) (open int, err error) {
	id, err := broker.ParseChainID(string(p.root.Info().Chain))
	if err != nil {
		return 0, err
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		changed, cancel := p.env.Broker.Broker.Watch(id)
		open = 0
		err := broker.EachPage(func(page broker.Page) (string, error) {
			v, err := p.env.Broker.Broker.Chain(ctx, id, page)
			for _, g := range v.Grants {
				if g.State != broker.StateClosed {
					open++
				}
			}
			return v.Next, err
		})
		if err != nil || open == 0 || time.Now().After(deadline) {
			cancel()
			return open, err
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
		}
		cancel()
	}
}

// agentLeases lists the leases of agents' secrets in Vault with the root token, independently of the broker.
func agentLeases(env *dev.Env) (ids []string, err error) {
	client, err := env.Vault.Client()
	if err != nil {
		return nil, err
	}
	for _, prefix := range []string{
		"database/creds/pawl-db-read", "database/creds/pawl-db-admin", "pki/issue/pawl-client",
	} {
		listed, err := client.Logical().List("sys/leases/lookup/" + prefix)
		if err != nil {
			return nil, err
		}
		if listed == nil {
			continue
		}
		keys, _ := listed.Data["keys"].([]any)
		for _, k := range keys {
			ids = append(ids, fmt.Sprintf("%s/%v", prefix, k))
		}
	}
	return ids, nil
}

// agentLogins lists the agents' logins in PostgreSQL with the superuser's connection, independently of the broker.
func agentLogins(ctx context.Context, env *dev.Env) (names []string, err error) {
	conn, err := pgx.Connect(ctx, env.Database)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx) //nolint:errcheck // only read
	rows, err := conn.Query(ctx, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'pawl-gr%'")
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// tlsServer accepts certificates of Vault's PKI that are not on its revocation list. It fetches the list for
// each handshake.
type tlsServer struct {
	env      *dev.Env
	roots    *x509.CertPool
	listener net.Listener
	cert     tls.Certificate
	done     sync.WaitGroup
}

func newTLSServer(env *dev.Env) (*tlsServer, error) {
	s := &tlsServer{env: env, roots: x509.NewCertPool()}
	ca, err := s.fetch("/v1/pki/ca/pem")
	if err != nil {
		return nil, err
	}
	if !s.roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("vault's PKI has no authority")
	}
	svid, err := env.Identities.X509SVID(dev.BrokerID)
	if err != nil {
		return nil, err
	}
	s.cert = tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, c := range svid.Certificates {
		s.cert.Certificate = append(s.cert.Certificate, c.Raw)
	}
	if s.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	s.done.Go(s.serve)
	return s, nil
}

func (s *tlsServer) fetch(path string) ([]byte, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.env.Vault.CAPEM())
	client := &http.Client{Timeout: 5 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}}}
	answer, err := client.Get(s.env.Vault.Address() + path)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", path, answer.Status)
	}
	return io.ReadAll(io.LimitReader(answer.Body, 1<<20))
}

func (s *tlsServer) serve() {
	config := &tls.Config{Certificates: []tls.Certificate{s.cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: s.roots,
		SessionTicketsDisabled: true, VerifyPeerCertificate: s.notRevoked,
		MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12}
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second)) // it fails only on a closed connection
		_ = tls.Server(conn, config).Handshake()              // the client sees the outcome
		_ = conn.Close()
	}
}

func (s *tlsServer) notRevoked(_ [][]byte, chains [][]*x509.Certificate) error {
	raw, err := s.fetch("/v1/pki/crl/pem")
	if err != nil {
		return err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return errors.New("no revocation list")
	}
	list, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		return err
	}
	for _, e := range list.RevokedCertificateEntries {
		if e.SerialNumber.Cmp(chains[0][0].SerialNumber) == 0 {
			return errors.New("the certificate is revoked")
		}
	}
	return nil
}

// try presents a certificate to the server. It uses TLS 1.2, because the client then learns within the
// handshake whether the server accepted its certificate.
func (s *tlsServer) try(ctx context.Context, cert tls.Certificate) error {
	d := tls.Dialer{Config: &tls.Config{Certificates: []tls.Certificate{cert}, MaxVersion: tls.VersionTLS12,
		InsecureSkipVerify: true}} // the client's certificate is tested, not the server's
	conn, err := d.DialContext(ctx, "tcp", s.listener.Addr().String())
	if err != nil {
		return err
	}
	return conn.Close()
}

func (s *tlsServer) close() {
	if s != nil {
		_ = s.listener.Close() // ends serve
		s.done.Wait()
	}
}
