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

// StatusListType is the typ of a status list's token (draft-ietf-oauth-status-list, section 5.1).
const StatusListType = "statuslist+jwt"

// The bounds of a status list. Half of it may be in use, so that a free index is soon found by
// guessing, and an index tells nothing about when its token was made.
const (
	listSize = 1 << 18 // tokens that have a bit
	listRoom = listSize / 2
	listLife = 2 * time.Minute  // from its iat to its exp
	listTTL  = 10 * time.Second // how long a verifier may use its copy
	listTidy = 10 * time.Second // how often indexes whose time is over are given back
)

// statusClaim is a token's reference to its bit.
type statusClaim struct {
	List statusReference `json:"status_list"`
}

type statusReference struct {
	Index uint32 `json:"idx"`
	URI   string `json:"uri"`
}

// listClaims are those of the list's own token.
type listClaims struct {
	Issuer  string    `json:"iss"`
	Subject string    `json:"sub"` // the URI that the tokens name
	Issued  int64     `json:"iat"`
	Expires int64     `json:"exp"`
	TTL     int64     `json:"ttl"` // seconds
	List    listValue `json:"status_list"`
}

type listValue struct {
	Bits int    `json:"bits"`
	List string `json:"lst"` // the bits, zlib, base64url
}

// slot is an index in use.
type slot struct {
	grant broker.GrantID
	until time.Time // no verifier takes the token, or has a list with its bit, after this
	ended bool      // its bit is set
}

// statusList is the bits of the tokens that are not past their end.
type statusList struct {
	issuer, uri string
	sign        func(typ string, payload []byte) ([]byte, error)
	now         func() time.Time
	room        int // how many indexes may be in use

	mu      sync.Mutex // guards what follows; signing is local, and happens under it
	slots   map[uint32]slot
	indexes map[broker.GrantID]uint32
	tidied  time.Time
	signed  []byte // nil: a bit has changed since
	made    time.Time
}

func newStatusList(cfg Config) *statusList {
	return &statusList{issuer: cfg.Issuer, uri: cfg.StatusURI, sign: cfg.Sign, now: cfg.Now, room: listRoom,
		slots: map[uint32]slot{}, indexes: map[broker.GrantID]uint32{}}
}

// take gives the grant's token an index that no other has.
func (l *statusList) take(g broker.Grant) (uint32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if now.Sub(l.tidied) >= listTidy || len(l.slots) >= l.room {
		l.tidyLocked(now)
	}
	if len(l.slots) >= l.room {
		return 0, broker.Errorf(broker.Unavailable, "issue", "%d tokens are alive, and the status list has no room for more", len(l.slots)).
			With(broker.CodeBackendDown).After(time.Second)
	}
	for {
		var raw [4]byte
		if _, err := rand.Read(raw[:]); err != nil {
			return 0, fmt.Errorf("jwt: drawing an index: %w", err)
		}
		index := binary.BigEndian.Uint32(raw[:]) % listSize
		if _, taken := l.slots[index]; !taken {
			l.putLocked(index, slot{grant: g.ID, until: g.Expires.Add(leeway + listLife)})
			return index, nil
		}
	}
}

// tidyLocked gives back what no token that a verifier takes, and no list that one holds, is about.
func (l *statusList) tidyLocked(now time.Time) {
	l.tidied = now
	for index, s := range l.slots {
		if now.After(s.until) {
			delete(l.slots, index)
			delete(l.indexes, s.grant)
			if s.ended {
				l.signed = nil
			}
		}
	}
}

func (l *statusList) putLocked(index uint32, s slot) {
	l.slots[index], l.indexes[s.grant] = s, index
	if s.ended {
		l.signed = nil
	}
}

// end sets the bits of grants. One whose time is over needs none: its token says so itself.
func (l *statusList) end(grants []broker.Grant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, g := range grants {
		index, ok := l.indexes[g.ID]
		if s := l.slots[index]; ok && !s.ended && g.Ending != broker.EndingExpired {
			s.ended = true
			l.putLocked(index, s)
		}
	}
}

// says gives what the list says of a grant's token; known is false when it has no bit.
func (l *statusList) says(id broker.GrantID) (ended, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	index, known := l.indexes[id]
	return l.slots[index].ended, known
}

// token is the list as it is now, signed anew only when a bit has changed or half its life is over.
func (l *statusList) token() ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if age := now.Sub(l.made); l.signed != nil && age >= 0 && age < listLife/2 {
		return l.signed, nil
	}
	bits := make([]byte, listSize/8)
	for index, s := range l.slots {
		if s.ended {
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
	signed, err := l.sign(StatusListType, payload)
	if err != nil {
		return nil, fmt.Errorf("jwt: signing the status list: %w", err)
	}
	l.signed, l.made = signed, now
	return signed, nil
}

// StatusList gives the signed status list as of now. It asks nobody.
func (b *Backend) StatusList() ([]byte, error) {
	if b.list == nil {
		return nil, errors.New("jwt: there is no status list")
	}
	return b.list.token()
}

// HasStatusList reports whether tokens name a status list.
func (b *Backend) HasStatusList() bool { return b.list != nil }

// Remember is the age of the oldest grant that [Backend.Restore] must be given.
const Remember = broker.MaxTTL + leeway + listLife

// Restore fills the status list of a process that has just started from the grants that the ledger
// has: those of this backend that were made within [Remember], over or not. active says of each
// whether its token is good still.
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
			continue // no token of it was recorded, or one that names no list
		}
		good, err := active(g.ID)
		if err != nil {
			return fmt.Errorf("jwt: restoring the status list: %w", err)
		}
		b.list.putLocked(uint32(index), slot{grant: g.ID, until: g.Expires.Add(leeway + listLife), ended: !good})
	}
	return nil
}

// refIndex stands between a token's id and its index in the name by which the ledger knows it.
const refIndex = "#"
