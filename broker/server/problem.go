package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
)

// problemOf is the only mapping from the broker's errors to the wire. An error without a kind is internal, and its
// text is not sent.
func problemOf(err error) *api.Problem {
	var p *api.Problem
	if errors.As(err, &p) {
		return p
	}
	var e *broker.Error
	switch {
	case !errors.As(err, &e) && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)):
		return api.NewProblem(api.KindUnavailable, "", "the request timed out").Because(err)
	case e == nil || kindOf(e.Kind) == api.KindInternal:
		return api.NewProblem(api.KindInternal, "", "").Because(err)
	}
	p = api.NewProblem(kindOf(e.Kind), api.Code(e.Code), e.Msg).After(e.RetryAfter).Because(err)
	p.Policies, p.Missing, p.Remedy, p.Revocation = e.Policies, e.Missing, e.Remedy, string(e.Revocation)
	return p
}

func kindOf(k broker.Kind) api.Kind {
	switch k {
	case broker.Malformed:
		return api.KindMalformed
	case broker.Unauthenticated:
		return api.KindUnauthenticated
	case broker.Denied:
		return api.KindDenied
	case broker.NotFound:
		return api.KindNotFound
	case broker.Revoked:
		return api.KindRevoked
	case broker.Expired:
		return api.KindExpired
	case broker.Conflict:
		return api.KindConflict
	case broker.Unavailable:
		return api.KindUnavailable
	case broker.OverLimit:
		return api.KindOverLimit
	}
	return api.KindInternal
}

func malformed(format string, args ...any) *api.Problem {
	return api.NewProblem(api.KindMalformed, "", fmt.Sprintf(format, args...))
}

// noIdentity returns the problem for a failed authentication: 401, unless the error has a kind of its own.
func noIdentity(err error) error {
	var e *broker.Error
	if errors.As(err, &e) {
		return err
	}
	return api.NewProblem(api.KindUnauthenticated, "", "").Because(err)
}

// refuse answers with a problem.
func (s *Server) refuse(x *exchange, err error) {
	p := *problemOf(err)
	p.Request = x.id
	body, err := json.Marshal(&p)
	if err != nil {
		panic("a problem always encodes")
	}
	h := x.w.Header()
	h.Set("Content-Type", api.ProblemType)
	if p.RetryAfterMS > 0 {
		h.Set("Retry-After", strconv.FormatInt((p.RetryAfterMS+999)/1000, 10))
	}
	if p.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="pawl"`)
	}
	if p.Code == api.Code(broker.CodeDelegationUnknown) || p.Code == api.Code(broker.CodeGrantUnknown) {
		x.holdBack(s.cfg.Now())
	}
	_ = x.write(p.Status, body) // the client has disconnected; the log has the rest
}

// grain is the unit of the time after which the broker says that an id is unknown.
const grain = 25 * time.Millisecond

// holdBack waits until a whole number of grains has passed since the request came in. The id of another's delegation is
// refused like one that nobody has, and the time of a look at its records must not tell them apart.
func (x *exchange) holdBack(now time.Time) {
	t := time.NewTimer(grain - now.Sub(x.began)%grain)
	defer t.Stop()
	select {
	case <-t.C:
	case <-x.Context().Done():
	}
}

// socketTime is how long a client may take to send a body, or to receive one write. Sockets use the system clock, not
// Config.Now.
const socketTime = 10 * time.Second

// withinSocketTime lets the reads or writes of a request fail after socketTime, by set, its SetReadDeadline or
// SetWriteDeadline. stop ends that. Over HTTP/2 each call of set is a message to the goroutine of the connection, and a
// deadline that has passed also resets a stream without a write in progress. So there it is called only after the
// time. A recorder in a test has no socket, so the errors of set are ignored.
func (x *exchange) withinSocketTime(set func(time.Time) error) (stop func()) {
	if x.ProtoMajor == 1 {
		_ = set(time.Now().Add(socketTime))
		return func() { _ = set(time.Time{}) }
	}
	passed := make(chan struct{})
	timer := time.AfterFunc(socketTime, func() {
		defer close(passed)
		_ = set(time.Unix(1, 0))
	})
	return func() {
		if !timer.Stop() {
			<-passed // net/http ends the process when the request is over before it
		}
	}
}

// write sends the status and body of an answer within socketTime.
func (x *exchange) write(status int, body []byte) error {
	control := http.NewResponseController(x.w)
	defer x.withinSocketTime(control.SetWriteDeadline)()
	x.w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	x.w.WriteHeader(status)
	_, err := x.w.Write(body)
	if err == nil {
		err = control.Flush()
	}
	if err != nil && !errors.Is(err, http.ErrNotSupported) {
		return api.NewProblem(api.KindUnavailable, api.CodeNoAnswer, "").Because(err)
	}
	return nil
}
