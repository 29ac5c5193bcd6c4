package wire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"golang.org/x/sys/unix"

	"github.com/pawlsec/pawl/attest"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/server"
)

// Limits bound what one caller, or a client without identity, can take of the broker. A caller is a SPIFFE ID, with all
// of its SVIDs and connections. A refusal by a limit is counted in pawl_limited_total, and the caller is told its code
// and when to try again.
type Limits struct {
	// requests of an agent a second, in bursts of as many; close, heartbeat and acknowledge count apart; zero: 200
	Requests int `yaml:"requests"`
	// introspections of a service a second; zero: 2000
	Introspections int `yaml:"introspections"`
	Streams        int `yaml:"streams"` // open event streams of an agent; zero: 50
	// request bodies of a caller that are arriving, and of all clients without identity together; zero: 32
	Bodies int `yaml:"bodies"`
	// steps of one backend that run at a time; the callers whose steps wait for it take turns; zero: 64
	Mints        int `yaml:"mints"`
	WaitingMints int `yaml:"waiting_mints"` // steps of a caller that wait for their turn; zero: 64
	// refusals of a caller that are recorded one by one in a minute; the others are counted in one entry; zero: 60
	Refusals int `yaml:"refusals"`
	// bytes of the ledger that a caller's requests may fill in a day, a quarter of it at once; zero: 2000000000
	LedgerPerDay int64 `yaml:"ledger_per_day"`
	OpenChains   int   `yaml:"open_chains"` // open chains of an agent; zero: 1000
	Connections  int   `yaml:"connections"` // open connections of a caller; zero: 128
	// open connections without an SVID from one address, or one /64 of IPv6; zero: 64
	AddressConnections int `yaml:"address_connections"`
}

func (l Limits) orDefaults() Limits {
	l.Requests = cmp.Or(l.Requests, 200)
	l.Introspections = cmp.Or(l.Introspections, 2000)
	l.Streams = cmp.Or(l.Streams, 50)
	l.Bodies = cmp.Or(l.Bodies, 32)
	l.Mints = cmp.Or(l.Mints, 64)
	l.WaitingMints = cmp.Or(l.WaitingMints, 64)
	l.Refusals = cmp.Or(l.Refusals, 60)
	l.LedgerPerDay = cmp.Or(l.LedgerPerDay, 2_000_000_000)
	l.OpenChains = cmp.Or(l.OpenChains, broker.MaxOpenChains)
	l.Connections = cmp.Or(l.Connections, 128)
	l.AddressConnections = cmp.Or(l.AddressConnections, 64)
	return l
}

func (l Limits) ofRequests(refused func(string), s *shares) server.Limits {
	return server.Limits{Requests: l.Requests, Introspections: l.Introspections, Streams: l.Streams, Bodies: l.Bodies,
		Share: s.wait, Refused: refused}
}

// byName lists the limits by their configuration keys.
func (l Limits) byName() map[string]int {
	return map[string]int{
		server.LimitRequests:       l.Requests,
		server.LimitIntrospections: l.Introspections,
		server.LimitStreams:        l.Streams,
		server.LimitBodies:         l.Bodies,
		"mints":                    l.Mints,
		"waiting_mints":            l.WaitingMints,
		"refusals":                 l.Refusals,
		server.LimitLedger:         int(l.LedgerPerDay),
		"open_chains":              l.OpenChains,
		attest.LimitEach:           l.Connections,
		attest.LimitAddress:        l.AddressConnections,
	}
}

func (l Limits) check() error {
	var wrong []error
	for name, n := range l.byName() {
		if n < 0 {
			wrong = append(wrong, fmt.Errorf("limits.%s is negative", name))
		}
	}
	return errors.Join(wrong...)
}

// files shares out the files that the process may have open. A quarter is kept back for operators, the ledger, Vault
// and the targets: agents, and clients without identity, cannot take it.
type files struct {
	limit     int // RLIMIT_NOFILE, which the Go runtime has raised as far as the system lets it
	kept      int
	agents    int // connections of the agents' listener
	strangers int // of these, without an SVID
	operators int // connections of the operators' listener, out of kept
	socket    int // connections of the local socket, out of kept
}

// fewFiles is the limit below which a start warns.
const fewFiles = 1024

func countFiles() (files, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return files{}, fmt.Errorf("reading the limit of open files: %w", err)
	}
	return shareFiles(int(min(l.Cur, 1<<20))), nil
}

func shareFiles(limit int) files {
	f := files{limit: limit, kept: limit / 4, operators: limit / 16, socket: limit / 16}
	f.agents = limit - f.kept
	f.strangers = min(limit/4, 4096)
	return f
}

func (f files) log(log *slog.Logger) {
	level := slog.LevelInfo
	if f.limit < fewFiles {
		level = slog.LevelWarn
	}
	log.Log(context.Background(), level, "open files", "limit", f.limit, "kept", f.kept, "agents", f.agents,
		"without_svid", f.strangers, "operators", f.operators, "socket", f.socket)
}
