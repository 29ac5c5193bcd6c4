package attest

import (
	"container/list"
	"crypto/tls"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// told is how many connections beyond its limit a SPIFFE ID or an address may have at a time, to be told so.
const told = 16

// room has the open connections of a listener.
type room struct {
	limits Limits

	mu         sync.Mutex          // guards the fields below
	holders    map[string]*holding // by SPIFFE ID or address
	handshakes list.List           // of *bound: in their handshake, oldest first
	strangers  list.List           // of *bound: complete and without an SVID, oldest first
	identified int
}

// holding has the connections of one SPIFFE ID, or without an SVID from one address.
type holding struct {
	conns list.List // of *bound, oldest first
	over  int       // how many of them are beyond the limit
}

// bound is a connection that takes a place in a room until it is closed.
type bound struct {
	net.Conn
	room    *room
	address string
	busy    atomic.Int32  // requests under way: their headers were read, and they are not answered
	used    atomic.Bool   // a request has come
	over    *broker.Error // refuses every request; nil: within the limit. Set before the connection is served

	ended      chan struct{} // closed when the place was given back
	processors *processors   // of its handshake; nil: it is not in one. The handshake's goroutine has this and the next
	computes   bool          // has a turn

	// The room's mutex guards the rest.
	holder string
	held   *list.Element // in the holder's conns
	in     *list.List    // handshakes or strangers; nil: identified
	place  *list.Element // in in
	gone   bool
	first  *time.Timer // closes the connection if no request comes; nil: none
}

type boundKey struct{}

// boundOf returns the connection below a net.Conn of the server, or nil.
func boundOf(c net.Conn) *bound {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	b, _ := c.(*bound)
	return b
}

// NetConn returns the connection that inner accepted.
func (c *bound) NetConn() net.Conn { return c.Conn }

// Read reads. A handshake has no turn to compute while it waits for its peer.
func (c *bound) Read(p []byte) (int, error) {
	if c.processors == nil {
		return c.Conn.Read(p)
	}
	c.rest()
	n, err := c.Conn.Read(p)
	if err == nil && !c.processors.take(c.address, c.ended) {
		return 0, net.ErrClosed
	}
	c.computes = err == nil
	return n, err
}

// rest ends the connection's turn, if it has one.
func (c *bound) rest() {
	if c.computes {
		c.processors.give()
		c.computes = false
	}
}

// Close closes the connection and gives its place back.
func (c *bound) Close() error {
	c.room.leave(c)
	return c.Conn.Close()
}

// await closes the connection unless its first request comes within d.
func (c *bound) await(d time.Duration) {
	c.room.mu.Lock()
	defer c.room.mu.Unlock()
	if !c.gone && !c.used.Load() {
		c.first = time.AfterFunc(d, func() { _ = c.Close() }) // its error has no reader
	}
}

// begin records a request. end reverses that, once it is answered.
func (c *bound) begin() (end func()) {
	c.busy.Add(1)
	if !c.used.Swap(true) {
		c.keep()
	}
	return func() { c.busy.Add(-1) }
}

// keep stops the timer of the first request.
func (c *bound) keep() {
	c.room.mu.Lock()
	defer c.room.mu.Unlock()
	if c.first != nil {
		c.first.Stop()
		c.first = nil
	}
}

func (r *room) init(l Limits) {
	r.limits, r.holders = l, map[string]*holding{}
}

func (r *room) counts() (identified, strangers int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.identified, r.handshakes.Len() + r.strangers.Len()
}

// enter takes a place for a new connection. It returns nil when there is none, and the limit that this connection or a
// dropped one has reached.
func (r *room) enter(raw net.Conn) (c *bound, limit string) {
	address := addressOf(raw)
	c = &bound{Conn: raw, room: r, address: address, ended: make(chan struct{})}
	var drop *bound
	defer func() {
		if drop != nil {
			_ = drop.Conn.Close() // dropped: its error has no reader
		}
	}()
	r.mu.Lock()
	defer r.mu.Unlock()
	strangers := r.handshakes.Len() + r.strangers.Len()
	if h := r.holders[address]; h != nil && h.conns.Len() >= r.limits.Address {
		limit, drop = LimitAddress, idle(&h.conns)
		if drop == nil && h.over >= told {
			return nil, limit
		}
		if drop == nil {
			c.over = tooMany("%d connections without an SVID from %s are open", r.limits.Address, address)
		}
	}
	if drop == nil && r.handshakes.Len() >= r.limits.Handshakes {
		limit, drop = LimitHandshakes, r.ofACrowd(&r.handshakes)
	}
	if drop == nil && strangers >= r.limits.Strangers {
		if limit, drop = LimitStrangers, r.stranger(); drop == nil {
			return nil, limit
		}
	}
	if drop == nil && strangers+r.identified >= r.limits.Most {
		if limit, drop = LimitMost, r.stranger(); drop == nil {
			drop = r.ofTheMost()
		}
		if drop == nil {
			return nil, limit
		}
	}
	if drop != nil {
		r.leaveLocked(drop)
	}
	r.holdLocked(c, address)
	c.in, c.place = &r.handshakes, r.handshakes.PushBack(c)
	return c, limit
}

// settle takes a connection out of its handshake. id is the SPIFFE ID of its SVID; empty: it has none. It is false for
// a connection that has no place.
func (r *room) settle(c *bound, id string) (limit string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.gone { // dropped meanwhile
		return "", false
	}
	r.handshakes.Remove(c.place)
	if id == "" {
		c.in, c.place = &r.strangers, r.strangers.PushBack(c)
		return "", true
	}
	r.releaseLocked(c)
	c.in, c.place, c.over = nil, nil, nil
	if h := r.holders[id]; h != nil && h.conns.Len() >= r.limits.Each {
		limit = LimitEach
		c.over = tooMany("%d connections of %s are open", r.limits.Each, id)
		if h.over >= told {
			c.gone = true
			return limit, false
		}
	}
	r.holdLocked(c, id)
	r.identified++
	return limit, true
}

func tooMany(format string, args ...any) *broker.Error {
	return broker.Errorf(broker.OverLimit, "identify", format, args...).
		With(broker.CodeTooManyConnections).After(time.Second)
}

// idle returns the oldest connection of a list without a request under way; nil: there is none. Those in a handshake
// come first.
func idle(conns *list.List) (oldest *bound) {
	for e := conns.Front(); e != nil; e = e.Next() {
		c := e.Value.(*bound)
		if c.in == &c.room.handshakes {
			return c
		}
		if oldest == nil && c.busy.Load() == 0 {
			oldest = c
		}
	}
	return oldest
}

// stranger returns a connection without an SVID that may be dropped; nil: there is none.
func (r *room) stranger() *bound {
	if c := r.ofACrowd(&r.handshakes); c != nil {
		return c
	}
	return r.ofACrowd(&r.strangers)
}

// ofACrowd returns the connection of a list without a request under way whose address has the most; of equals the
// oldest. So a flood from some addresses does not drop a slow handshake from another; nil: there is none.
func (r *room) ofACrowd(conns *list.List) (drop *bound) {
	most := 0
	for e := conns.Front(); e != nil; e = e.Next() {
		c := e.Value.(*bound)
		if n := r.holders[c.holder].conns.Len(); n > most && (c.busy.Load() == 0 || conns == &r.handshakes) {
			most, drop = n, c
		}
	}
	return drop
}

// ofTheMost returns the oldest idle connection of the holder with the most; nil: each has one, or all are busy.
func (r *room) ofTheMost() (drop *bound) {
	most := 1
	for _, h := range r.holders {
		if h.conns.Len() > most {
			if c := idle(&h.conns); c != nil {
				most, drop = h.conns.Len(), c
			}
		}
	}
	return drop
}

func (r *room) holdLocked(c *bound, holder string) {
	h := r.holders[holder]
	if h == nil {
		h = &holding{}
		r.holders[holder] = h
	}
	c.holder, c.held = holder, h.conns.PushBack(c)
	if c.over != nil {
		h.over++
	}
}

func (r *room) releaseLocked(c *bound) {
	h := r.holders[c.holder]
	h.conns.Remove(c.held)
	if c.over != nil {
		h.over--
	}
	if h.conns.Len() == 0 {
		delete(r.holders, c.holder)
	}
}

func (r *room) leave(c *bound) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaveLocked(c)
}

// leaveLocked gives the place of a connection back, once.
func (r *room) leaveLocked(c *bound) {
	if c.gone {
		return
	}
	c.gone = true
	close(c.ended)
	r.releaseLocked(c)
	if c.in != nil {
		c.in.Remove(c.place)
	} else {
		r.identified--
	}
	if c.first != nil {
		c.first.Stop()
	}
}

// dropHandshakes closes the connections that are in their handshake.
func (r *room) dropHandshakes() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for e := r.handshakes.Front(); e != nil; e = e.Next() {
		_ = e.Value.(*bound).Conn.Close() // dropped: its handshake fails and cleans up
	}
}

// addressOf returns the address of a peer without its port. A peer has a whole /64 of IPv6, so that counts as one.
func addressOf(c net.Conn) string {
	p, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return c.RemoteAddr().Network() // a Unix socket: all peers count together
	}
	a := p.Addr().Unmap()
	if a.Is6() {
		return netip.PrefixFrom(a.WithZone(""), 64).Masked().String()
	}
	return a.String()
}
