package postgres

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// standby is one hot standby. All grants of the database share the goroutine that severs, so no call may wait for a
// standby that does not answer, and only one in a while may wait for one with its replay behind.
type standby struct {
	address *pgxpool.Config

	mu      sync.Mutex // guards away and stalled
	away    error      // why it did not answer; nil: it did
	stalled time.Time  // when a call last waited for its replay in vain
}

const (
	// standbyTimeout bounds a call to a standby, with standbyTimeoutEach for each grant.
	standbyTimeout     = 2 * time.Second
	standbyTimeoutEach = time.Millisecond
	// replayGrace is how long a call waits for a standby to replay, and replayGraceAgain how long it does if a call
	// within stallMemory waited in vain.
	replayGrace      = time.Second
	replayGraceAgain = 50 * time.Millisecond
	stallMemory      = 5 * time.Second
)

var (
	errStranger = errors.New("it is another server, and not a standby of this one")
	errPromoted = errors.New("it does not follow the primary any more")
	// errSeveral refuses to prove anything at an address that leads to several servers by turns, as a load balancer's
	// does. The sessions at the others are neither ended nor counted.
	errSeveral = errors.New("its address leads to several servers: name each of them in standbys, by its own address")
)

// unfit reports whether a standby answered, and is none at which anything is proven. It says so again when asked again.
func unfit(err error) bool {
	return errors.Is(err, errStranger) || errors.Is(err, errPromoted) || errors.Is(err, errSeveral) ||
		errors.As(err, new(*poolerError))
}

// note records whether the standby answered. One that is unfit to prove anything did: its sessions are ended.
func (st *standby) note(err error) {
	var pg *pgconn.PgError
	if unfit(err) || errors.As(err, &pg) && !errors.Is(err, context.DeadlineExceeded) && pg.Code != "57P03" {
		err = nil
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.away = err
}

func (st *standby) isAway() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.away
}

func (st *standby) stall() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.stalled = time.Now()
}

// patience returns how long to wait for the replay.
func (st *standby) patience() time.Duration {
	st.mu.Lock()
	defer st.mu.Unlock()
	if time.Since(st.stalled) < stallMemory {
		return replayGraceAgain
	}
	return replayGrace
}
