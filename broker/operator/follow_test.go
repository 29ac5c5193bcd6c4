package operator_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/api"
	"github.com/pawlsec/pawl/broker/operator"
)

// answers lists the behaviour of the broker at each opening of the stream, as words. A number is an event with so
// many dead, and "done" is a settled event; then the stream ends. "empty" is a stream without an event, "cut" breaks the
// connection, "down" refuses with 503, "gone" refuses with 404, and "problem" is a problem event. The last entry repeats.
type answers []string

// fakeBroker serves answers, and counts the streams opened.
type fakeBroker struct {
	*httptest.Server

	mu     sync.Mutex // guards opened
	opened int
}

func serve(t *testing.T, list answers) *fakeBroker {
	t.Helper()
	b := &fakeBroker{}
	b.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		b.mu.Lock()
		words := list[min(b.opened, len(list)-1)]
		b.opened++
		b.mu.Unlock()
		for word := range strings.FieldsSeq(words) {
			answer(w, word)
		}
	}))
	t.Cleanup(b.Close)
	return b
}

func answer(w http.ResponseWriter, word string) {
	refuse := func(status int, kind api.Kind) {
		w.Header().Set("Content-Type", api.ProblemType)
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"kind":%q,"code":"c","title":"t","status":%d}`, kind, status)
	}
	event := func(name, data string) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "event: %s\ndata: %s\n\n", name, data)
		w.(http.Flusher).Flush()
	}
	switch word {
	case "cut":
		panic(http.ErrAbortHandler)
	case "down":
		refuse(http.StatusServiceUnavailable, api.KindUnavailable)
	case "gone":
		refuse(http.StatusNotFound, api.KindNotFound)
	case "empty":
		w.Header().Set("Content-Type", "text/event-stream")
	case "problem":
		event(api.EventProblem, `{"kind":"unavailable","code":"c","title":"t","status":503}`)
	case "done":
		event(api.EventRevocation, `{"id":"rv","dead":9,"settled":"2026-01-02T03:04:05Z"}`)
	default:
		event(api.EventRevocation, `{"id":"rv","dead":`+word+`}`)
	}
}

// TestFollow checks that Follow reports the end of a revocation despite lost connections. It must not wait for an end
// that cannot come.
func TestFollow(t *testing.T) {
	for name, row := range map[string]struct {
		answers answers
		dead    []int    // received by f
		kind    api.Kind // of the error; empty: none
		opened  int      // streams; 0: any number over 2
	}{
		"at once":                     {answers{"1 2 done"}, []int{1, 2, 9}, "", 1},
		"ends early":                  {answers{"1", "1 2", "done"}, []int{1, 2, 9}, "", 3},
		"is disconnected":             {answers{"1 cut", "2 cut", "2 3 done"}, []int{1, 2, 3, 9}, "", 3},
		"down for a while":            {answers{"1 cut", "down", "cut", "done"}, []int{1, 9}, "", 4},
		"never available":             {answers{"down"}, nil, api.KindUnavailable, 1},
		"no such revocation":          {answers{"gone"}, nil, api.KindNotFound, 1},
		"gone in between":             {answers{"1 cut", "gone"}, []int{1}, api.KindNotFound, 2},
		"a problem event":             {answers{"1 problem"}, []int{1}, api.KindUnavailable, 1},
		"does not come back":          {answers{"1 cut", "down"}, []int{1}, api.KindUnavailable, 0},
		"never has an event":          {answers{"empty"}, nil, api.KindUnavailable, 0},
		"ends before its first event": {answers{" "}, nil, api.KindUnavailable, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := serve(t, row.answers)
			c, err := operator.New(operator.Config{Address: b.URL, HTTP: b.Client(), Patience: 400 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			var dead []int
			err = c.Follow(t.Context(), "rv", func(rv api.Revocation) error { dead = append(dead, rv.Dead); return nil })
			var p *api.Problem
			if row.kind == "" && err != nil || row.kind != "" && (!errors.As(err, &p) || p.Kind != row.kind) {
				t.Errorf("Follow() = %v, want the kind %q", err, row.kind)
			}
			if !slices.Equal(dead, row.dead) || row.opened > 0 && b.opened != row.opened || row.opened == 0 && b.opened < 3 {
				t.Errorf("Follow() received %v over %d streams, want %v over %d", dead, b.opened, row.dead, row.opened)
			}
		})
	}
}

// TestFollowStops checks that Follow ends with any error of f, and with its context.
func TestFollowStops(t *testing.T) {
	b := serve(t, answers{"1 cut"})
	c, err := operator.New(operator.Config{Address: b.URL, HTTP: b.Client()})
	if err != nil {
		t.Fatal(err)
	}
	enough := api.NewProblem(api.KindUnavailable, "", "enough")
	if err := c.Follow(t.Context(), "rv", func(api.Revocation) error { return enough }); !errors.Is(err, enough) || b.opened != 1 {
		t.Errorf("Follow() = %v over %d streams, want f's error over one", err, b.opened)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := c.Follow(ctx, "rv", func(api.Revocation) error { cancel(); return nil }); err == nil {
		t.Error("Follow() with an ended context = nil")
	}
	never, err := operator.New(operator.Config{Address: b.URL, HTTP: b.Client(), Patience: -1})
	if err != nil {
		t.Fatal(err)
	}
	before := b.opened
	if err := never.Follow(t.Context(), "rv", func(api.Revocation) error { return nil }); err == nil || b.opened != before+1 {
		t.Errorf("Follow() without patience = %v over %d streams, want an error over one", err, b.opened-before)
	}
}
