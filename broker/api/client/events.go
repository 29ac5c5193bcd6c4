package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/pawlsec/pawl/broker/api"
)

// Event is one event of a stream. One without a name is a comment, which the broker sends to keep the stream alive.
type Event struct {
	Name string
	Data []byte
}

// maxEvent is the largest event that is read, in bytes.
const maxEvent = 1 << 20

// eventReader reads the events of a text/event-stream.
type eventReader struct {
	in *bufio.Reader
}

// newEvents returns a reader of the events in r.
func newEvents(r io.Reader) *eventReader { return &eventReader{in: bufio.NewReader(r)} }

// next waits for the next event. It returns io.EOF after the last whole one. It drops an incomplete event at the end,
// as the standard requires. An event over 1 MiB is an error.
func (e *eventReader) next() (Event, error) {
	var ev Event
	var data []byte
	size, hasData := 0, false
	for {
		line, err := e.line(maxEvent - size)
		if err != nil {
			return Event{}, err
		}
		size += len(line)
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch {
		case len(line) == 0 && hasData:
			ev.Data = bytes.TrimSuffix(data, []byte("\n"))
			return ev, nil
		case len(line) > 0 && len(name) == 0 && !hasData && ev.Name == "":
			return Event{}, nil
		case len(line) == 0:
			ev.Name = "" // a name without data is not an event
		case string(name) == "event":
			ev.Name = string(value)
		case string(name) == "data":
			data, hasData = append(append(data, value...), '\n'), true
		}
	}
}

// line reads up to a newline, with or without a carriage return before it.
func (e *eventReader) line(most int) ([]byte, error) {
	var line []byte
	for {
		piece, err := e.in.ReadSlice('\n')
		if len(line)+len(piece) > most {
			return nil, errors.New("an event is too large")
		}
		line = append(line, piece...)
		if err == nil {
			line = bytes.TrimSuffix(line[:len(line)-1], []byte("\r"))
			if bytes.IndexByte(line, '\r') >= 0 {
				return nil, errors.New("a carriage return inside a line") // alone it would end the line
			}
			return line, nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
	}
}

// Follow opens a stream and calls f with each event. It returns nil at the end of the stream, or the error of f
// unchanged. Every other error is an *[api.Problem], also after too long a silence.
func (c *Client) Follow(ctx context.Context, path string, f func(Event) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	alarm := time.AfterFunc(c.silence, func() { cancel(fmt.Errorf("received nothing for %s", c.silence)) })
	defer alarm.Stop()
	h, release := c.take()
	defer release()
	resp, err := c.send(ctx, h, http.MethodGet, path, http.Header{"Accept": {"text/event-stream"}}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
		raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxEvent)) // refusal checks whether it is a problem
		return c.pauseAs(refusal(resp.StatusCode, raw))
	}
	for events := newEvents(resp.Body); ; alarm.Reset(c.silence) {
		ev, err := events.next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && ctx.Err() != nil:
			return noAnswer(context.Cause(ctx))
		case err != nil:
			return noAnswer(err)
		}
		if err := f(ev); err != nil {
			return err
		}
	}
}

// Problem decodes the data of a problem event.
func (ev Event) Problem() *api.Problem { return refusal(http.StatusOK, ev.Data) }

// Read decodes the event's data into v.
func (ev Event) Read(v any) error {
	if json.Unmarshal(ev.Data, v) != nil {
		return noAnswer(fmt.Errorf("the data of a %q event is invalid", ev.Name))
	}
	return nil
}
