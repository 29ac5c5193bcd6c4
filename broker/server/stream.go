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

	"github.com/pawlsec/pawl/broker/api"
)

// feed is what a stream shows.
type feed struct {
	who   string        // whom the stream counts against
	event string        // the name of its events
	until time.Time     // the end of who's identity; zero: none
	least time.Duration // between two looks
	// watch gives a channel that is closed when it is time to look again.
	watch func() (changed <-chan struct{}, cancel func())
	// look gives an event's data, and whether it is the last.
	look func(context.Context) (data any, final bool, err error)
}

// stream is an answer of server-sent events under way.
type stream struct {
	x       *exchange
	control *http.ResponseController
	last    []byte // data of the last event
	sent    int
}

// follow sends what f shows, at once and then whenever it has changed, until it is final, the
// client goes, its identity ends or the server closes. Whoever was cut off early connects
// again and sees the present: events say how things stand, not what happened.
func (s *Server) follow(x *exchange, f feed) error {
	leave, err := s.enter(f.who)
	if err != nil {
		return err
	}
	defer leave()
	st := &stream{x: x, control: http.NewResponseController(x.w)}
	defer func() { x.note(slog.Int("events", st.sent)) }()
	beat := time.NewTicker(s.cfg.Heartbeat)
	defer beat.Stop()
	var over <-chan time.Time
	if !f.until.IsZero() {
		timer := time.NewTimer(f.until.Sub(s.cfg.Now()))
		defer timer.Stop()
		over = timer.C
	}
	for {
		// Watch before looking: a change in between is then seen.
		changed, cancel := f.watch()
		final, err := st.look(f)
		if err == nil && !final {
			err = s.wait(x.Context(), st, changed, beat.C, over, f.least)
		}
		cancel()
		if errors.Is(err, errOver) || err == nil && final {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// errOver says that a stream has come to an end that is nobody's fault.
var errOver = errors.New("the stream is over")

// wait returns when it is time to look again. Beats look, too: time itself ends delegations.
func (s *Server) wait(ctx context.Context, st *stream, changed <-chan struct{}, beat, over <-chan time.Time, least time.Duration) error {
	select {
	case <-changed:
	case <-beat:
		return st.write(": \n\n")
	case <-over:
		return errOver
	case <-s.closed:
		return errOver
	case <-ctx.Done():
		return errOver
	}
	if least == 0 {
		return nil
	}
	pause := time.NewTimer(least)
	defer pause.Stop()
	select {
	case <-pause.C:
		return nil
	case <-s.closed:
		return errOver
	case <-ctx.Done():
		return errOver
	}
}

// look sends one event if there is news. An error before the first event is the answer. Later
// it is an event, and the last, unless it may pass: then the client had better connect again.
func (st *stream) look(f feed) (final bool, err error) {
	data, final, err := f.look(st.x.Context())
	name := f.event
	if err != nil {
		p := *problemOf(err)
		if st.sent == 0 || st.x.Context().Err() != nil || p.Kind == api.KindUnavailable || p.Kind == api.KindInternal {
			return true, err
		}
		p.Request = st.x.id
		name, data, final = api.EventProblem, &p, true
	}
	raw, jsonErr := json.Marshal(data, json.Deterministic(true))
	if jsonErr != nil {
		return true, fmt.Errorf("encoding an event: %w", jsonErr)
	}
	if st.sent > 0 && bytes.Equal(raw, st.last) {
		return final, nil
	}
	if st.sent == 0 {
		st.x.w.Header().Set("Content-Type", "text/event-stream")
		st.x.w.WriteHeader(http.StatusOK)
	}
	st.sent, st.last = st.sent+1, raw
	if writeErr := st.write(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", st.sent, name, raw)); writeErr != nil {
		return true, writeErr
	}
	return final, err
}

func (st *stream) write(text string) error {
	_ = st.control.SetWriteDeadline(time.Now().Add(socketTime)) // a recorder in a test has no socket
	if _, err := st.x.w.Write([]byte(text)); err != nil {
		return fmt.Errorf("%w: %w", errOver, err)
	}
	if err := st.control.Flush(); err != nil {
		return fmt.Errorf("%w: %w", errOver, err)
	}
	return nil
}

// enter counts a stream against its holder; leave takes it off again.
func (s *Server) enter(who string) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[who] >= s.cfg.Streams {
		return nil, api.NewProblem(api.KindDenied, api.CodeTooManyStreams, fmt.Sprintf("%d streams are open", s.cfg.Streams)).After(time.Second)
	}
	s.open[who]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.open[who]--; s.open[who] == 0 {
			delete(s.open, who)
		}
	}, nil
}
