package postgres_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/parts"
	"github.com/pawlsec/pawl/plugins/postgres"
)

// TestReplaced checks that the backend notices when the database is not the continuation of what it was, and that a
// restart is none of that.
func TestReplaced(tt *testing.T) {
	t := ownTarget(tt)
	standby := parts.OwnStandby(tt, t.server)
	_, first, _ := strings.Cut(t.server.Address(), ":")
	_, second, _ := strings.Cut(standby.Address(), ":")
	backend, err := postgres.New(postgres.Config{Credentials: t.creds, DSN: fmt.Sprintf(
		"host=127.0.0.1,127.0.0.1 port=%s,%s dbname=%s sslmode=disable target_session_attrs=read-write",
		first, second, t.name)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	if err := backend.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	var at postgres.Position
	continues := func(what string, before postgres.Position, want bool) {
		t.Helper()
		now, got, err := backend.WhereAfter(t.Context(), before)
		if err != nil || got != want {
			t.Errorf("%s continues = %v, %v, want %v", what, got, err, want)
		}
		at = now
	}
	notified := func(what string) {
		t.Helper()
		select {
		case <-backend.Replaced():
		case <-time.After(30 * time.Second):
			t.Errorf("%s: the backend did not notice it", what)
		}
	}
	notified("the first connection")
	continues("what was first reached", at, false)
	continues("the same server", at, true)
	continues("a restored snapshot", postgres.Ahead(at), false)
	if err := t.server.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := t.server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	continues("the same server after a restart", at, true)
	select {
	case <-backend.Replaced():
		t.Error("the backend took a restart for another server")
	default:
	}

	r := &replica{target: t, standby: standby, there: pool(tt, standby.DSN(t.name))}
	if err := t.server.Stop(); err != nil {
		t.Fatal(err)
	}
	r.execThere("SELECT pg_promote()")
	notified("a promoted standby")
	continues("a promoted standby", at, false)
	continues("the promoted standby later", at, true)
}

// TestNameFollowsPromotion lets the name in dsn lead to a promoted standby while the first server lives on, with the
// broker's connections. The backend must follow the name, and notice.
func TestNameFollowsPromotion(tt *testing.T) {
	r := newReplica(tt)
	var moved atomic.Bool
	r.backend = r.backendWith(forward(tt, func() string {
		if moved.Load() {
			return r.standby.Address()
		}
		return r.server.Address()
	}), nil)
	if err := r.backend.Check(r.Context()); err != nil {
		r.Fatal(err)
	}
	notified := func(what string) {
		r.Helper()
		select {
		case <-r.backend.Replaced():
		case <-time.After(30 * time.Second):
			r.Errorf("%s: the backend did not notice it", what)
		}
	}
	notified("the first connection")
	r.execThere("SELECT pg_promote()")
	moved.Store(true)
	notified("a name that leads to a promoted standby")
}
