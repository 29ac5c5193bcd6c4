package process_test

import (
	"errors"
	"os"
	"testing"

	"github.com/pawlsec/pawl/cmd/bench/process"
)

func TestGrownBy(t *testing.T) {
	opened, closed := 0, 0
	if _, err := process.GrownBy(os.Getpid(), 20, func() (func(), error) {
		opened++
		return func() { closed++ }, nil
	}); err != nil || opened != 22 || closed != 22 {
		t.Errorf("%d opened and %d closed, %v; want a tenth more than 20 of each", opened, closed, err)
	}
	no := errors.New("no")
	opened, closed = 0, 0
	if _, err := process.GrownBy(os.Getpid(), 20, func() (func(), error) {
		if opened++; opened == 3 {
			return nil, no
		}
		return func() { closed++ }, nil
	}); !errors.Is(err, no) || closed != 2 {
		t.Errorf("an error gives %v with %d closed, want it and 2", err, closed)
	}
}
