package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/api"
)

// feed is the content of a stream.
type feed struct {
	holder   string        // the stream counts against this holder's limit
	most     int           // that limit
	event    string        // the name of its events
	until    time.Time     // the end of the holder's identity; zero: none
	interval time.Duration // the shortest time between two reads
	apart    bool          // there may be many such streams: see apart
	// watch returns a channel that is closed when it is time to read again.
	watch func() (changed <-chan struct{}, cancel func())
	// read returns the data of an event, and whether it is the last.
	read func(context.Context) (data any, final bool, err error)
}

// stream is an answer of server-sent events in progress.
type stream struct {
	x       *exchange
	control *http.ResponseController
	last    []byte // data of the last event
	sent    int
}

// follow sends the state of f, at once and after each change. It returns when the state is final, the client
// disconnects, its identity expires or the server closes. A client that lost its stream connects again and receives
// the present state: events carry state, not history.
func (s *Server) follow(x *exchange, f feed) error {
	leave, ok := s.streams.enter(f.holder, f.most)
	if !ok {
		return s.limited(LimitStreams, api.CodeTooManyStreams, time.Second, "%d streams of %s are open", f.most, f.holder)
	}
	defer leave()
	st := &stream{x: x, control: http.NewResponseController(x.w)}
	defer func() { x.note(slog.Int("events", st.sent)) }()
	beat := time.NewTicker(s.cfg.Heartbeat)
	defer beat.Stop()
	var expired <-chan time.Time
	if !f.until.IsZero() {
		timer := time.NewTimer(f.until.Sub(s.cfg.Now()))
		defer timer.Stop()
		expired = timer.C
	}
	for {
		// Watch before reading, so that a change in between is not lost.
		changed, cancel := f.watch()
		final, err := s.update(st, f)
		if err == nil && !final {
			err = s.wait(x.Context(), st, changed, beat.C, expired, f.interval)
		}
		cancel()
		if errors.Is(err, errEnded) || err == nil && final {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// errEnded reports that a stream ended without a fault.
var errEnded = errors.New("the stream has ended")

// wait returns when it is time to read again. A heartbeat is also a reason to read, because time alone ends
// delegations.
func (s *Server) wait(ctx context.Context, st *stream, changed <-chan struct{}, beat, expired <-chan time.Time, interval time.Duration) error {
	select {
	case <-changed:
	case <-beat:
		return st.write(": \n\n")
	case <-expired:
		return errEnded
	case <-s.closed:
		return errEnded
	case <-ctx.Done():
		return errEnded
	}
	if interval == 0 {
		return nil
	}
	pause := time.NewTimer(interval)
	defer pause.Stop()
	select {
	case <-pause.C:
		return nil
	case <-s.closed:
		return errEnded
	case <-ctx.Done():
		return errEnded
	}
}

// event is the next event of a stream.
type event struct {
	name  string
	data  []byte
	final bool
}

// next reads the state. An error before the first event becomes the answer. A later one becomes the last event, and is
// returned with it. An unavailable or internal error is not sent: the client should connect again.
func (st *stream) next(f feed) (ev event, err error) {
	data, final, err := f.read(st.x.Context())
	ev = event{name: f.event, final: final}
	if err != nil {
		p := *problemOf(err)
		if st.sent == 0 || st.x.Context().Err() != nil || p.Kind == api.KindUnavailable || p.Kind == api.KindInternal {
			return event{}, err
		}
		p.Request = st.x.id
		ev.name, ev.final, data = api.EventProblem, true, &p
	}
	raw, jsonErr := json.Marshal(data, json.Deterministic(true))
	if jsonErr != nil {
		return event{}, fmt.Errorf("encoding an event: %w", jsonErr)
	}
	ev.data = raw
	return ev, err
}

// update sends one event if the state has changed.
func (s *Server) update(st *stream, f feed) (final bool, err error) {
	var ev event
	read := func() (err error) { ev, err = st.next(f); return err }
	if f.apart {
		s.turns <- struct{}{} // a fence wakes thousands of streams at once
		err = apart(read)
		<-s.turns
	} else {
		err = read()
	}
	if ev.data == nil {
		return true, err
	}
	if st.sent > 0 && bytes.Equal(ev.data, st.last) {
		return ev.final, nil
	}
	if st.sent == 0 {
		st.x.w.Header().Set("Content-Type", "text/event-stream")
		st.x.w.WriteHeader(http.StatusOK)
	}
	st.sent, st.last = st.sent+1, ev.data
	if writeErr := st.write(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", st.sent, ev.name, ev.data)); writeErr != nil {
		return true, writeErr
	}
	return ev.final, err
}

// readsAtOnce is how many streams read at a time apart from their goroutines. A read waits neither for a client nor for a
// write of the ledger.
const readsAtOnce = 64

// apart runs f in a goroutine of its own and waits for it. A stream waits for hours, with the stack that its deepest call
// has left it: to read the ledger and encode an event takes several times that of waiting. A panic of f becomes its error.
func apart(f func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = caught(f)
	}()
	<-done
	return err
}

func (st *stream) write(text string) error {
	defer st.x.withinSocketTime(st.control.SetWriteDeadline)()
	if _, err := st.x.w.Write([]byte(text)); err != nil {
		return fmt.Errorf("%w: %w", errEnded, err)
	}
	if err := st.control.Flush(); err != nil {
		return fmt.Errorf("%w: %w", errEnded, err)
	}
	return nil
}

// holdTime is the longest time for which one request holds a step. Its client then sends another one. So a client that
// vanished without closing its connection holds no step for longer than this and the grace.
const holdTime = 10 * time.Second

// hold holds a step while the request is open. The end of the connection ends the request at once, and the step soon
// after. The end of this process does not: the client holds the step at the next one.
func (s *Server) hold(x *exchange) error {
	if err := checkType[none](x); err != nil {
		return err
	}
	c, err := s.identify(x, s.endings)
	if err != nil {
		return err
	}
	id, err := pathID(x, "grant", broker.ParseGrantID)
	if err != nil {
		return err
	}
	leave, ok := s.streams.enter("hold "+c.ID.String(), s.cfg.Limits.Streams)
	if !ok {
		return s.limited(LimitStreams, api.CodeTooManyStreams, time.Second, "%d steps of %s are held", s.cfg.Limits.Streams, c.ID)
	}
	defer leave()
	release, err := s.cfg.Broker.Hold(x.Context(), c, id)
	if err != nil {
		return err
	}
	x.w.Header().Set("Content-Type", "text/event-stream")
	x.w.WriteHeader(http.StatusOK)
	st := &stream{x: x, control: http.NewResponseController(x.w)}
	if err := st.write(": \n\n"); err != nil {
		release()
		return nil
	}
	end := time.NewTimer(min(holdTime, c.NotAfter.Sub(s.cfg.Now())))
	defer end.Stop()
	select {
	case <-end.C:
	case <-x.Context().Done():
	case <-s.closed:
	}
	select {
	case <-s.closed:
	default:
		release()
	}
	return nil
}
