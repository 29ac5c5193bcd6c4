package brokertest_test

import (
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/brokertest"
)

func TestClock(t *testing.T) {
	var c brokertest.Clock
	if got := c.Now(); !got.Equal(brokertest.Epoch) || got.Location() != time.UTC {
		t.Errorf("Now = %v, want %v", got, brokertest.Epoch)
	}
	var wg sync.WaitGroup
	for range 60 {
		wg.Go(func() { c.Advance(time.Second) })
	}
	wg.Wait()
	if got, want := c.Advance(-time.Hour), brokertest.Epoch.Add(time.Minute-time.Hour); !got.Equal(want) || !c.Now().Equal(want) {
		t.Errorf("Advance = %v, Now = %v, want %v", got, c.Now(), want)
	}
}
