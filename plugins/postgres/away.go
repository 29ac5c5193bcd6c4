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

// note records whether the standby answered.
func (st *standby) note(err error) {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && !errors.Is(err, context.DeadlineExceeded) && pg.Code != "57P03" {
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
