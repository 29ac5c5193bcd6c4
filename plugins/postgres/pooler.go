package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
)

// poolerError says that a connection does not lead to the server itself. A pooler may send each statement to another
// server, and log in there as another user. So nothing that is read over it proves that a login is dead, and no right
// that is granted over it is certain.
type poolerError struct{ what string }

func (e *poolerError) Error() string {
	return e.what + ", not to the server itself: name the server in dsn; no secret is made through a pooler, " +
		"and none is proven dead"
}

// poolerKey is where a connection has its poolerError.
const poolerKey = "pawl.pooler"

// examiner returns pgxpool's AfterConnect, which calls another one first unless that is nil. It closes a shaper's
// connection that leads to a pooler. It keeps one of a revoker, since severing through a pooler is better than not
// severing. checkDirect refuses it for proofs.
func examiner(p Purpose, log *slog.Logger, first func(context.Context, *pgx.Conn) error) func(
	context.Context, *pgx.Conn,
) error {
	return func(ctx context.Context, conn *pgx.Conn) error {
		if first != nil {
			if err := first(ctx, conn); err != nil {
				return err
			}
		}
		what, err := poolerOf(ctx, conn)
		if err != nil || what == "" {
			return err
		}
		found := &poolerError{fmt.Sprintf("the connection to %s %s", conn.PgConn().Conn().RemoteAddr(), what)}
		log.Error("a database is behind a pooler", "database", conn.Config().Database, "purpose", p, "err", found)
		if p == Shaper {
			return found
		}
		conn.PgConn().CustomData()[poolerKey] = found
		return nil
	}
}

// checkDirect returns a poolerError if the connection leads to a pooler.
func checkDirect(conn *pgx.Conn) error {
	if found, ok := conn.PgConn().CustomData()[poolerKey].(*poolerError); ok {
		return found
	}
	return nil
}

// checkPoolDirect is checkDirect for one connection of a pool.
func checkPoolDirect(ctx context.Context, pool *pgxpool.Pool) error {
	return pool.AcquireFunc(ctx, func(c *pgxpool.Conn) error { return checkDirect(c.Conn()) })
}

// poolerOf describes the pooler to which a connection leads; empty if it leads to a server. A pooler that shares
// sessions answers with a process id of its own, and so does one that logs in as another user. pgpool passes the id on,
// so a connection that the server sees with another port is asked for its program. A forwarder such as HAProxy also
// changes the port, but it is no pooler.
func poolerOf(ctx context.Context, conn *pgx.Conn) (string, error) {
	var user string
	var pid uint32
	var port *int32
	err := conn.QueryRow(ctx, "SELECT session_user::text, pg_backend_pid(), inet_client_port()",
		pgx.QueryExecModeSimpleProtocol).Scan(&user, &pid, &port)
	if err != nil {
		return "", err
	}
	address := conn.PgConn().Conn().RemoteAddr()
	ours, _ := conn.PgConn().Conn().LocalAddr().(*net.TCPAddr)
	direct := ours != nil && port != nil && int(*port) == ours.Port || ours == nil && port == nil
	switch {
	case user != conn.Config().User:
		return fmt.Sprintf("leads to %s, which logs in as %s for everyone", programAt(ctx, address), user), nil
	case pid != conn.PgConn().PID():
		return "leads to " + programAt(ctx, address), nil
	case !direct:
		if program := programAt(ctx, address); program == pgpool || program == pgBouncer {
			return "leads to " + program, nil
		}
	}
	return "", nil
}

// The programs that identify themselves.
const (
	pgBouncer  = "PgBouncer"
	pgpool     = "pgpool"
	postgreSQL = "PostgreSQL"
	someOther  = "a pooler" // or a server that is not PostgreSQL
)

// probeTimeout bounds one question to a server.
const probeTimeout = 3 * time.Second

// Program recognises the program at an address without a credential, by its refusal of a login without a user:
// PostgreSQL, PgBouncer, pgpool, or another pooler. It sends nothing else. The refusal leaves a line in the log there.
func Program(ctx context.Context, network, address string) (string, error) {
	refusal, err := refusalAt(ctx, network, address)
	switch {
	case err != nil:
		return "", err
	case refusal.Routine != "": // PostgreSQL alone names the routine of its code
		return postgreSQL, nil
	case refusal.Code == "08P01" && refusal.Message == "no username supplied":
		return pgBouncer, nil
	case refusal.File != "":
		return pgpool, nil
	}
	return someOther, nil
}

// programAt is Program for the other end of a connection. A program that does not answer is someOther.
func programAt(ctx context.Context, address net.Addr) string {
	program, err := Program(ctx, address.Network(), address.String())
	if err != nil {
		return someOther
	}
	return program
}

func refusalAt(ctx context.Context, network, address string) (*pgproto3.ErrorResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var dial net.Dialer
	conn, err := dial.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // it was only read
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	startup := binary.BigEndian.AppendUint32(nil, 9) // its own length
	startup = binary.BigEndian.AppendUint32(startup, pgproto3.ProtocolVersion30)
	if _, err := conn.Write(append(startup, 0)); err != nil {
		return nil, err
	}
	message, err := pgproto3.NewFrontend(conn, conn).Receive()
	if err != nil {
		return nil, err
	}
	refusal, ok := message.(*pgproto3.ErrorResponse)
	if !ok {
		return nil, errors.New("it accepts a login without a user")
	}
	return refusal, nil
}
