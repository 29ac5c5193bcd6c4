package demo

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// Event is one line of the timeline. Only the revocation's event has the figures.
type Event struct {
	Name   string `json:"name"`
	AtMS   int64  `json:"at_ms"` // since the agents began
	Detail string `json:"detail,omitempty"`

	// Both times begin with the request for the forbidden tool.
	FencedMS *float64 `json:"fenced_ms,omitempty"` // until the answer that the chain is fenced
	DeadMS   *float64 `json:"dead_ms,omitempty"`   // until the last secret was refused by its backend

	Secrets    *int `json:"secrets,omitempty"`     // live when the tool was requested
	AliveAfter *int `json:"alive_after,omitempty"` // secrets that still worked at the end, and other leftovers
}

// timeline prints events as they happen and keeps them.
type timeline struct {
	out   io.Writer
	began time.Time

	Events     []Event `json:"events"`
	FencedMS   float64 `json:"fenced_ms"` // this and the next are the figures of the revocation's event
	DeadMS     float64 `json:"dead_ms"`
	Secrets    int     `json:"secrets"`
	AliveAfter int     `json:"alive_after"`
}

func (t *timeline) scene(title string) { fmt.Fprintf(t.out, "\n%s\n", title) }

// note adds an event and prints it.
func (t *timeline) note(name, format string, args ...any) *Event {
	e := Event{Name: name, AtMS: time.Since(t.began).Milliseconds(), Detail: fmt.Sprintf(format, args...)}
	t.Events = append(t.Events, e)
	fmt.Fprintf(t.out, "  %6d ms  %s\n", e.AtMS, e.Detail)
	return &t.Events[len(t.Events)-1]
}

// write stores the timeline as JSON.
func (t *timeline) write(path string) error {
	raw, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(raw, '\n'), 0o644)
}
