package attest

import (
	"container/list"
	"runtime"
	"sync"
)

// processors lets the handshakes of a listener compute in turn. A handshake is a millisecond of arithmetic that every
// stranger can ask for. Without a bound a flood of them would have all processors, and each request would wait behind
// the handshakes that are ready to run. Addresses with handshakes that wait get turns in rounds.
type processors struct {
	mu        sync.Mutex // guards the fields below
	free      int
	addresses list.List                // of *waiting, the next one first
	byAddress map[string]*list.Element // in addresses
}

// waiting has the handshakes of one address that wait.
type waiting struct {
	address string
	turns   list.List // of chan struct{}, oldest first, each closed when its turn has come
}

// halfOfThem is how many handshakes of a listener compute at a time, where the limits do not say.
func halfOfThem() int { return max(runtime.GOMAXPROCS(0)/2, 1) }

// take waits for a turn. It is false when the connection has gone before.
func (p *processors) take(address string, gone <-chan struct{}) bool {
	p.mu.Lock()
	if p.free > 0 {
		p.free--
		p.mu.Unlock()
		return true
	}
	if p.byAddress == nil {
		p.byAddress = map[string]*list.Element{}
	}
	at := p.byAddress[address]
	if at == nil {
		at = p.addresses.PushBack(&waiting{address: address})
		p.byAddress[address] = at
	}
	turn := make(chan struct{})
	e := at.Value.(*waiting).turns.PushBack(turn)
	p.mu.Unlock()
	select {
	case <-turn:
		return true
	case <-gone:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-turn: // it came at the same moment
		p.giveLocked()
	default:
		at.Value.(*waiting).turns.Remove(e)
		p.leftLocked(at)
	}
	return false
}

// give ends a turn.
func (p *processors) give() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.giveLocked()
}

func (p *processors) giveLocked() {
	at := p.addresses.Front()
	if at == nil {
		p.free++
		return
	}
	turns := &at.Value.(*waiting).turns
	close(turns.Remove(turns.Front()).(chan struct{}))
	p.addresses.MoveToBack(at)
	p.leftLocked(at)
}

// leftLocked forgets an address without a handshake that waits.
func (p *processors) leftLocked(at *list.Element) {
	if w := at.Value.(*waiting); w.turns.Len() == 0 {
		p.addresses.Remove(at)
		delete(p.byAddress, w.address)
	}
}
