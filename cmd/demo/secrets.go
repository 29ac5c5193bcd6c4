package demo

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pawlsec/pawl/broker/agent"
)

// held is a secret that was issued to an agent, and a thief's copy of it.
type held struct {
	step  *agent.Step
	login login
	cert  *tls.Certificate
	p     *play
}

// login is a secret of the postgres plugin.
type login struct {
	Username, Password, Host, Port, Database string
}

func (l login) dsn() string {
	return fmt.Sprintf("host=%s port=%s dbname=%s user=%s password=%s sslmode=disable connect_timeout=5",
		l.Host, l.Port, l.Database, l.Username, l.Password)
}

// login takes a step that gives a database login for a table.
func (p *play) login(ctx context.Context, d *agent.Delegation, table string) (*held, error) {
	step, err := d.Begin(ctx, agent.Call{Tool: "db.read", Args: agent.Args{"tables": []string{table}}})
	if err != nil {
		return nil, err
	}
	s := step.Secret()
	h := &held{step: step, p: p, login: login{Username: s.Field("username"), Password: s.Field("password"),
		Host: s.Field("host"), Port: s.Field("port"), Database: s.Field("database")}}
	p.live = append(p.live, h)
	return h, nil
}

// certificate takes a step that gives a client certificate.
func (p *play) certificate(ctx context.Context, d *agent.Delegation) error {
	step, err := d.Begin(ctx, agent.Call{Tool: "tls.call", Args: agent.Args{"name": "writer.agents.pawl.dev"}})
	if err != nil {
		return err
	}
	s := step.Secret()
	cert, err := tls.X509KeyPair([]byte(s.Field("certificate")), []byte(s.Field("private_key")))
	if err != nil {
		return errors.New("the secret has no certificate and key as the pki plugin documents them")
	}
	p.live = append(p.live, &held{step: step, cert: &cert, p: p})
	return nil
}

// holdTen takes ten steps, some with each agent, and leaves a database session open in the middle of a cursor.
func (p *play) holdTen(ctx context.Context) error {
	certificates := 3
	if p.env.Postgres == nil {
		certificates = 10
	}
	for range certificates {
		if err := p.certificate(ctx, p.part); err != nil {
			return err
		}
	}
	for i := range 10 - certificates {
		d := p.root
		if i%2 == 0 {
			d = p.part
		}
		if _, err := p.login(ctx, d, "orders"); err != nil {
			return err
		}
	}
	for _, h := range p.live {
		if err := h.works(ctx); err != nil {
			return fmt.Errorf("a live secret does not work: %w", err)
		}
	}
	if p.env.Postgres == nil {
		p.note("ten_live", "10 certificates are live, and the TLS server accepts each one")
		return nil
	}
	var err error
	if p.session, err = openSession(ctx, p.live[len(p.live)-1].login); err != nil {
		return err
	}
	p.note("ten_live", "7 logins and 3 certificates are live; each one works, and one login has a session open "+
		"with a cursor in the middle of a table")
	return nil
}

// works tries the secret at its backend.
func (h *held) works(ctx context.Context) error {
	if h.cert != nil {
		return h.p.door.try(ctx, *h.cert)
	}
	conn, err := pgx.Connect(ctx, h.login.dsn())
	if err != nil {
		return err
	}
	defer conn.Close(ctx) //nolint:errcheck // only a probe
	return conn.Ping(ctx)
}

func (h *held) read(ctx context.Context, table string) (rows int, err error) {
	conn, err := pgx.Connect(ctx, h.login.dsn())
	if err != nil {
		return 0, err
	}
	defer conn.Close(ctx) //nolint:errcheck // only read
	err = conn.QueryRow(ctx, "SELECT count(*) FROM "+pgx.Identifier{table}.Sanitize()).Scan(&rows)
	return rows, err
}

// refused runs a statement that PostgreSQL must refuse, and returns PostgreSQL's message.
func (h *held) refused(ctx context.Context, sql string) (message string, err error) {
	conn, err := pgx.Connect(ctx, h.login.dsn())
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing was changed
	_, err = conn.Exec(ctx, sql)
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != "42501" { // insufficient_privilege
		return "", fmt.Errorf("PostgreSQL answered with %v, not with insufficient_privilege", err)
	}
	return pg.Message, nil
}

// untilDead tries every secret until its backend refuses it, and the open session until it ends. It returns when
// the last one was refused, and how many were not refused within the deadline.
func (p *play) untilDead(ctx context.Context, since time.Time) (ms float64, alive int) {
	deadline := time.Now().Add(20 * time.Second)
	left := append([]*held{}, p.live...)
	for {
		var working []*held
		for _, h := range left {
			if h.works(ctx) == nil {
				working = append(working, h)
			}
		}
		left = working
		ended := p.session.ended(ctx)
		if len(left) == 0 && ended || time.Now().After(deadline) {
			if alive = len(left); !ended {
				alive++
			}
			return milliseconds(time.Since(since)), alive
		}
	}
}

// session is a database session with an open cursor.
type session struct{ conn *pgx.Conn }

func openSession(ctx context.Context, l login) (*session, error) {
	conn, err := pgx.Connect(ctx, l.dsn())
	if err != nil {
		return nil, err
	}
	_, err = conn.Exec(ctx, "BEGIN; DECLARE reading CURSOR FOR SELECT * FROM orders; FETCH 1 FROM reading")
	return &session{conn}, err
}

// ended reports whether the session has ended: its cursor returns nothing more. A nil session has.
func (s *session) ended(ctx context.Context) bool {
	if s == nil {
		return true
	}
	_, err := s.conn.Exec(ctx, "FETCH 0 FROM reading")
	return err != nil
}

func (s *session) close() {
	if s != nil {
		_ = s.conn.Close(context.Background()) // best effort: PostgreSQL is stopped next
	}
}
