package drill

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/dev"
)

// secret is a thief's copy of a step's secret: a login's DSN, or a certificate's serial number.
type secret struct {
	step       *agent.Step
	login, dsn string
	cert       *big.Int  // serial number of a certificate, nil for a login
	ends       time.Time // when it expires
}

func (s *secret) kind() string {
	if s.cert != nil {
		return "certificate"
	}
	return "login"
}

// take takes the i-th step. The holders take turns, and every fourth round makes certificates.
func (d *drill) take(ctx context.Context, i int) (*secret, error) {
	from := d.tree[holders[i%len(holders)]]
	if d.env.Postgres == nil || i/len(holders)%4 == 3 {
		return takeCertificate(ctx, from)
	}
	step, err := from.Begin(ctx, agent.Call{Tool: "db.read", Args: agent.Args{"tables": []string{"orders"}}})
	if err != nil {
		return nil, err
	}
	s := step.Secret()
	dsn := fmt.Sprintf("host=%s port=%s dbname=%s user=%s password=%s sslmode=disable connect_timeout=5",
		s.Field("host"), s.Field("port"), s.Field("database"), s.Field("username"), s.Field("password"))
	return &secret{step: step, ends: step.Grant().Expires, login: s.Field("username"), dsn: dsn}, nil
}

func takeCertificate(ctx context.Context, from *agent.Delegation) (*secret, error) {
	step, err := from.Begin(ctx, agent.Call{Tool: "tls.call", Args: agent.Args{"name": "drill.agents.pawl.dev"}})
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(step.Secret().Field("certificate")))
	if block == nil {
		return nil, errors.New("the secret has no certificate as the pki plugin documents it")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate: %w", err)
	}
	return &secret{step: step, ends: step.Grant().Expires, cert: cert.SerialNumber}, nil
}

// works checks the secret at its backend, not at the broker: PostgreSQL accepts the login, or Vault's revocation
// list does not have the certificate. Any answer besides acceptance and refusal is an error.
func (s *secret) works(ctx context.Context, env *dev.Env) (bool, error) {
	if s.cert != nil {
		revoked, err := revocationList(ctx, env)
		return !revoked[s.cert.String()], err
	}
	conn, err := pgx.Connect(ctx, s.dsn)
	if err == nil {
		_ = conn.Close(ctx) // it only had to open
		return true, nil
	}
	var refusal *pgconn.PgError
	if !errors.As(err, &refusal) || !strings.HasPrefix(refusal.Code, "28") { // invalid authorization
		return false, errors.New("PostgreSQL neither accepts nor refuses the login")
	}
	return false, nil
}

// revocationList reads the serial numbers on the revocation list of Vault's PKI. The list is public.
func revocationList(ctx context.Context, env *dev.Env) (map[string]bool, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(env.Vault.CAPEM())
	client := &http.Client{Timeout: 5 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, env.Vault.Address()+"/v1/pki/crl", nil)
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("fetching the revocation list: %w", err)
	}
	defer answer.Body.Close() //nolint:errcheck // only read
	raw, err := io.ReadAll(io.LimitReader(answer.Body, 16<<20))
	if err != nil {
		return nil, fmt.Errorf("fetching the revocation list: %w", err)
	}
	list, err := x509.ParseRevocationList(raw)
	if err != nil {
		return nil, fmt.Errorf("reading the revocation list: %w", err)
	}
	serials := map[string]bool{}
	for _, e := range list.RevokedCertificateEntries {
		serials[e.SerialNumber.String()] = true
	}
	return serials, nil
}

// usableLogins lists the agents' logins that are usable: those that may log in, and those with a session. conn is
// the superuser's connection.
func usableLogins(ctx context.Context, conn *pgx.Conn) (map[string]bool, error) {
	rows, err := conn.Query(ctx, `SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname LIKE 'pawl-gr%'
		UNION SELECT usename FROM pg_stat_activity WHERE usename LIKE 'pawl-gr%'`)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	usable := map[string]bool{}
	for _, name := range names {
		usable[name] = true
	}
	return usable, err
}

// probe polls the two backends and records when each secret stops working. A poll takes a moment, so a death is
// recorded a little late and never early. At the end it tries each secret like a thief.
func (d *drill) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var logins, certs []*secret
	for _, s := range d.live {
		if s.cert != nil {
			certs = append(certs, s)
		} else {
			logins = append(logins, s)
		}
	}
	var loginDeaths, certDeaths []float64
	var failed error
	var work sync.WaitGroup
	work.Go(func() {
		certDeaths = d.poll(ctx, certs, func() (func(*secret) bool, error) {
			revoked, err := revocationList(ctx, d.env)
			return func(s *secret) bool { return !revoked[s.cert.String()] }, err
		})
	})
	work.Go(func() {
		if len(logins) == 0 {
			return
		}
		conn, err := pgx.Connect(ctx, d.env.Database)
		if failed = err; err != nil {
			return
		}
		defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // only read
		loginDeaths = d.poll(ctx, logins, func() (func(*secret) bool, error) {
			usable, err := usableLogins(ctx, conn)
			return func(s *secret) bool { return usable[s.login] }, err
		})
	})
	work.Wait()
	d.result.DeadMS = sorted(append(loginDeaths, certDeaths...))
	if failed != nil {
		return failed
	}
	return d.tryAll(context.WithoutCancel(ctx))
}

// poll queries a backend until no secret works, and returns when each one stopped. A query that fails is retried.
func (d *drill) poll(
	ctx context.Context, left []*secret, query func() (works func(*secret) bool, err error),
) (deaths []float64) {
	for left = slices.Clone(left); len(left) > 0 && ctx.Err() == nil; {
		works, err := query()
		at := d.since()
		left = slices.DeleteFunc(left, func(s *secret) bool {
			if err != nil || works(s) {
				return false
			}
			deaths = append(deaths, at)
			return true
		})
	}
	return deaths
}

// tryAll counts the secrets that their backends still accept.
func (d *drill) tryAll(ctx context.Context) error {
	var alive atomic.Int32
	err := each(ctx, len(d.live), func(ctx context.Context, i int) error {
		works, err := d.live[i].works(ctx, d.env)
		if works {
			alive.Add(1)
		}
		return err
	})
	d.result.Alive = int(alive.Load())
	return err
}
