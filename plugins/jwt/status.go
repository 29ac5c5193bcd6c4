package jwt

import (
	"bytes"
	"cmp"
	"compress/zlib"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// statusListType is the typ of a status list's token (draft-ietf-oauth-status-list, section 5.1).
const statusListType = "statuslist+jwt"

// The limits of a status list. At most half of the bits are in use, so that a few random draws find a free index. A
// random index does not reveal when its token was issued.
const (
	listSize     = 1 << 18 // bits
	listCapacity = listSize / 2
	listLife     = 2 * time.Minute  // from its iat to its exp
	listTTL      = 10 * time.Second // the longest time for which a verifier may use its copy
	listReap     = 10 * time.Second // the interval at which expired indexes are freed
)

// statusClaim is a token's reference to its bit on the status list.
type statusClaim struct {
	List statusReference `json:"status_list"`
}

type statusReference struct {
	Index uint32 `json:"idx"`
	URI   string `json:"uri"`
}

// listClaims are the claims of the status list's own token.
type listClaims struct {
	Issuer  string    `json:"iss"`
	Subject string    `json:"sub"` // the list's URI, as tokens name it
	Issued  int64     `json:"iat"`
	Expires int64     `json:"exp"`
	TTL     int64     `json:"ttl"` // seconds
	List    listValue `json:"status_list"`
}

type listValue struct {
	Bits int    `json:"bits"`
	List string `json:"lst"` // the bits, compressed with zlib, in base64url
}

// slot is an index in use.
type slot struct {
	grant   broker.GrantID
	until   time.Time // after this no verifier accepts the token or has a list with its bit
	revoked bool      // its bit is set
}

// statusList holds the bits of the tokens that have not expired.
type statusList struct {
	issuer, uri string
	sign        func(typ string, payload []byte) ([]byte, error)
	now         func() time.Time
	capacity    int // the limit of indexes in use

	mu      sync.Mutex // guards the fields below; signing is local, and happens under it
	slots   map[uint32]slot
	indexes map[broker.GrantID]uint32
	reaped  time.Time
	signed  []byte // nil: a bit has changed since
	made    time.Time
}

func newStatusList(cfg Config) *statusList {
	return &statusList{issuer: cfg.Issuer, uri: cfg.StatusURI, sign: cfg.Sign, now: cfg.Now, capacity: listCapacity,
		slots: map[uint32]slot{}, indexes: map[broker.GrantID]uint32{}}
}

// allocate returns a free index for the grant's token.
func (l *statusList) allocate(g broker.Grant) (uint32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if now.Sub(l.reaped) >= listReap || len(l.slots) >= l.capacity {
		l.reapLocked(now)
	}
	if len(l.slots) >= l.capacity {
		return 0, broker.Errorf(broker.Unavailable, "issue", "the status list is full: %d tokens are alive", len(l.slots)).
			With(broker.CodeBackendDown).After(time.Second)
	}
	for {
		var raw [4]byte
		if _, err := rand.Read(raw[:]); err != nil {
			return 0, fmt.Errorf("jwt: drawing an index: %w", err)
		}
		index := binary.BigEndian.Uint32(raw[:]) % listSize
		if _, taken := l.slots[index]; !taken {
			l.putLocked(index, slot{grant: g.ID, until: g.Expires.Add(broker.Leeway + listLife)})
			return index, nil
		}
	}
}

// reapLocked frees the indexes that no acceptable token and no current copy of the list refers to.
func (l *statusList) reapLocked(now time.Time) {
	l.reaped = now
	for index, s := range l.slots {
		if now.After(s.until) {
			delete(l.slots, index)
			delete(l.indexes, s.grant)
			if s.revoked {
				l.signed = nil
			}
		}
	}
}

func (l *statusList) putLocked(index uint32, s slot) {
	l.slots[index], l.indexes[s.grant] = s, index
	if s.revoked {
		l.signed = nil
	}
}

// revoke sets the bits of grants. It skips an expired grant: the token's own expiry ends it.
func (l *statusList) revoke(grants []broker.Grant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, g := range grants {
		index, ok := l.indexes[g.ID]
		if s := l.slots[index]; ok && !s.revoked && g.Ending != broker.EndingExpired {
			s.revoked = true
			l.putLocked(index, s)
		}
	}
}

// status reports whether a grant's token is marked as revoked; known is false when the token has no bit.
func (l *statusList) status(id broker.GrantID) (revoked, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	index, known := l.indexes[id]
	return l.slots[index].revoked, known
}

// token returns the current list. It signs only when a bit has changed, or the last signature is older than half the
// list's life.
func (l *statusList) token() ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if age := now.Sub(l.made); l.signed != nil && age >= 0 && age < listLife/2 {
		return l.signed, nil
	}
	bits := make([]byte, listSize/8)
	for index, s := range l.slots {
		if s.revoked {
			bits[index/8] |= 1 << (index % 8)
		}
	}
	var packed bytes.Buffer
	w := zlib.NewWriter(&packed)
	_, err := w.Write(bits)
	if err = cmp.Or(err, w.Close()); err != nil {
		return nil, fmt.Errorf("jwt: packing the status list: %w", err)
	}
	payload, err := json.Marshal(listClaims{Issuer: l.issuer, Subject: l.uri, Issued: now.Unix(), Expires: now.Add(listLife).Unix(),
		TTL: int64(listTTL / time.Second), List: listValue{Bits: 1, List: base64.RawURLEncoding.EncodeToString(packed.Bytes())}})
	if err != nil {
		return nil, fmt.Errorf("jwt: encoding the status list: %w", err)
	}
	signed, err := l.sign(statusListType, payload)
	if err != nil {
		return nil, fmt.Errorf("jwt: signing the status list: %w", err)
	}
	l.signed, l.made = signed, now
	return signed, nil
}

// StatusList returns the current signed status list. It makes no request.
func (b *Backend) StatusList() ([]byte, error) {
	if b.list == nil {
		return nil, errors.New("jwt: there is no status list")
	}
	return b.list.token()
}

// HasStatusList reports whether tokens name a status list.
func (b *Backend) HasStatusList() bool { return b.list != nil }

// Remember is the age of the oldest grant that [Backend.Restore] needs.
const Remember = broker.MaxTTL + broker.Leeway + listLife

// Restore fills the status list after a start of the process. The grants are those of this backend in the ledger that
// were made within [Remember], ended ones included. active reports whether a grant's token is still active.
func (b *Backend) Restore(grants []broker.Grant, active func(broker.GrantID) (bool, error)) error {
	if b.list == nil {
		return nil
	}
	b.list.mu.Lock()
	defer b.list.mu.Unlock()
	for _, g := range grants {
		_, text, ok := strings.Cut(g.Lease.Ref, refIndex)
		index, err := strconv.ParseUint(text, 10, 32)
		if !ok || err != nil || index >= listSize {
			continue // no token was recorded, or it has no status list
		}
		valid, err := active(g.ID)
		if err != nil {
			return fmt.Errorf("jwt: restoring the status list: %w", err)
		}
		b.list.putLocked(uint32(index), slot{grant: g.ID, until: g.Expires.Add(broker.Leeway + listLife), revoked: !valid})
	}
	return nil
}

// refIndex separates a token's id from its index in the token's name in the ledger.
const refIndex = "#"
