package vault

import (
	"net"
	"net/http/httptrace"
	"sync"
)

// conn is a TLS connection that counts what is written to it. net/http reports a kept-alive connection that Vault closed
// in the same way whether the request had been written or not.
type conn struct {
	net.Conn // a *tls.Conn

	mu      sync.Mutex // guards the fields below; never held during a write
	written int64      // bytes of the writes that have begun, without those that certainly sent nothing
	sealed  bool       // nothing more is written
}

// Write implements [net.Conn].
func (c *conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	if c.sealed {
		c.mu.Unlock()
		return 0, net.ErrClosed
	}
	c.written += int64(len(p)) // before the write: one that is under way may have sent something
	c.mu.Unlock()
	n, err := c.Conn.Write(p)
	if n == 0 && err != nil {
		// No TLS record was sent whole, and Vault cannot read a part of one. crypto/tls sends nothing after such an error.
		c.mu.Lock()
		c.written -= int64(len(p))
		c.mu.Unlock()
	}
	return n, err
}

// mark returns a value for untouched.
func (c *conn) mark() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.written
}

// untouched reports whether nothing was written since the mark, and sees to it that nothing will be.
func (c *conn) untouched(mark int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sealed = true
	return c.written == mark
}

// sending follows one request to its connection.
type sending struct {
	connected bool  // the request has a connection
	conn      *conn // that connection, if it counts
	mark      int64 // of conn, before the request
}

// trace returns the hook that tells s of the connection.
func (s *sending) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		s.connected = true
		if s.conn, _ = info.Conn.(*conn); s.conn != nil {
			s.mark = s.conn.mark()
		}
	}}
}

// cause says why a request that failed certainly was not sent; nil if it may have been. The request must have ended.
func (s *sending) cause() error {
	switch {
	case !s.connected:
		return errNotSent
	case s.conn != nil && s.conn.untouched(s.mark):
		return errNotWritten
	}
	return nil
}
