package attest_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/pawlsec/pawl/attest"
)

// TestHandshakesComputeInTurn begins many handshakes at once. Two compute at a time, and silent connections and those
// that stop in their handshake hold up none.
func TestHandshakesComputeInTurn(t *testing.T) {
	const atOnce, clients = 2, 12
	var computing atomic.Int32
	began, more := make(chan int32, clients), make(chan struct{})
	held := make(chan struct{}) // closed: the handshakes are held while they compute
	p := newPlaceWith(t, attest.Limits{Computing: atOnce}, func() {
		select {
		case <-held:
		default:
			return
		}
		began <- computing.Add(1)
		<-more
		computing.Add(-1)
	})
	for i := range 2 * atOnce {
		silent, err := net.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		stopped, err := net.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		defer stopped.Close()
		c := tls.Client(&onlyHello{Conn: stopped}, tlsconfig.TLSClientConfig(p.s.Source(p.s.ID("/any")), tlsconfig.AuthorizeAny()))
		if err := c.Handshake(); err == nil {
			t.Fatal("a handshake without an end was completed")
		}
		p.until("they are in their handshakes", 0, 2*(i+1))
	}
	close(held)
	var done sync.WaitGroup
	for i := range clients {
		done.Go(func() {
			c, err := p.dial(fmt.Sprintf("/agent/%d", i))
			if err != nil {
				t.Errorf("dial = %v", err)
				return
			}
			if status, _, err := ask(c, "/"); status != http.StatusOK {
				t.Errorf("a request = %d, %v, want 200", status, err)
			}
		})
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); ; <-tick.C {
		waiting, _ := p.listener.Computing()
		if waiting == clients-atOnce || len(began) > atOnce {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d handshakes wait, want %d", waiting, clients-atOnce)
		}
	}
	close(more)
	done.Wait()
	close(began)
	most := int32(0)
	for n := range began {
		most = max(most, n)
	}
	if most != atOnce {
		t.Errorf("%d handshakes computed at a time, want %d", most, atOnce)
	}
	if waiting, free := p.listener.Computing(); waiting != 0 || free != atOnce {
		t.Errorf("at the end %d wait and %d turns are free, want 0 and %d", waiting, free, atOnce)
	}
}

// onlyHello is the connection of a client that sends the first message of its handshake and no other.
type onlyHello struct {
	net.Conn
	sent bool
}

func (c *onlyHello) Write(b []byte) (int, error) {
	if c.sent {
		return 0, net.ErrClosed
	}
	c.sent = true
	return c.Conn.Write(b)
}

// TestAddressesTakeTurns has many handshakes of one address that wait. That of another address gets the next turn but
// one, and a connection that has gone gets none.
func TestAddressesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := attest.NewProcessors(1)
		var order []string // guarded by the only turn
		var all sync.WaitGroup
		gone := make(chan struct{})
		wait := func(address string, gone <-chan struct{}) {
			all.Go(func() {
				if p.Take(address, gone) {
					order = append(order, address)
					p.Give()
				}
			})
			synctest.Wait()
		}
		if !p.Take("flood", nil) {
			t.Fatal("the first handshake got no turn")
		}
		for range 3 {
			wait("flood", nil)
		}
		wait("gone", gone)
		wait("a", nil)
		wait("b", nil)
		close(gone)
		synctest.Wait()
		if n, free := p.Waiting(); n != 5 || free != 0 {
			t.Errorf("%d wait and %d turns are free, want 5 and none", n, free)
		}
		p.Give()
		all.Wait()
		if want := []string{"flood", "a", "b", "flood", "flood"}; !slices.Equal(order, want) {
			t.Errorf("the turns were %v, want %v", order, want)
		}
		if n, free := p.Waiting(); n != 0 || free != 1 {
			t.Errorf("at the end %d wait and %d turns are free, want none and one", n, free)
		}
	})
}
