package main

import (
	"errors"
	"testing"
	"time"
)

func TestClosedLoop(t *testing.T) {
	l := closedLoop(4, time.Minute, 100, func(int) error { return nil })
	if len(l.latencies) != 100 || l.err != nil {
		t.Errorf("closedLoop made %d calls, %v; want the 100 that it may, and no error", len(l.latencies), l.err)
	}
	no := errors.New("no")
	l = closedLoop(4, time.Minute, 1<<30, func(int) error { return no })
	if len(l.latencies) != 0 || !errors.Is(l.err, no) {
		t.Errorf("closedLoop counts %d calls that failed, with %v", len(l.latencies), l.err)
	}
}

func TestEach(t *testing.T) {
	seen := make([]bool, 50)
	if err := each(7, len(seen), func(i int) error { seen[i] = true; return nil }); err != nil {
		t.Fatal(err)
	}
	for i, ok := range seen {
		if !ok {
			t.Errorf("each left out %d", i)
		}
	}
	no := errors.New("no")
	if err := each(2, 5, func(int) error { return no }); !errors.Is(err, no) {
		t.Errorf("each = %v, want %v", err, no)
	}
}
