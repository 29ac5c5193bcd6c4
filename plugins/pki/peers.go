package pki

import (
	"errors"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// peers describes the TLS servers that accept a tool's certificates.
type peers struct {
	resume bool          // they resume sessions without a check of the certificate's end
	listed bool          // they resume the session of a certificate on their list, too
	last   time.Duration // no session lives longer than this after the certificate's end
}

// maxLast bounds the time for which a certificate stays open in the ledger after its end.
const maxLast = 24 * time.Hour

var errPeers = errors.New("must be \"handshake\", \"resume DURATION\" or \"resume-unlisted DURATION\", where the duration is " +
	"the time, of at most 24h, after which the servers have dropped every session")

// parsePeers reads the setting peers.
func parsePeers(value string) (p peers, err error) {
	word, duration, resume := strings.Cut(value, " ")
	if !resume {
		if word != "" && word != "handshake" {
			return peers{}, errPeers
		}
		return peers{}, nil
	}
	p.resume, p.listed = true, word == "resume"
	p.last, err = time.ParseDuration(duration)
	if err != nil || p.last <= 0 || p.last > maxLast || !p.listed && word != "resume-unlisted" {
		return peers{}, errPeers
	}
	return p, nil
}

// mark adds to a finished certificate that its servers resume sessions.
func (p peers) mark(f *broker.Finished) {
	if p.resume {
		f.Outlives = f.Expires.Add(p.last)
	}
	if p.listed {
		f.Ref += resumed
	}
}

// expiry returns the time by which a grant's certificate expires.
func expiry(g broker.Grant) time.Time {
	if g.State == broker.StateHandle && g.Lease.Expires.IsZero() {
		return g.LatestEnd().UTC() // a crash may have lost the record of a certificate that was handed over
	}
	if g.Lease.Expires.After(g.Expires) {
		return g.Lease.Expires.UTC()
	}
	return g.Expires.UTC()
}

// afterlife describes the sessions that may outlive a grant's certificate.
type afterlife struct {
	until  time.Time // zero: none
	listed bool      // they may also outlive the certificate's listing
}

func afterlifeOf(g broker.Grant) afterlife {
	if !g.Lease.Outlives.After(expiry(g)) {
		return afterlife{}
	}
	return afterlife{g.Lease.Outlives.UTC(), strings.HasSuffix(g.Lease.Ref, resumed)}
}

// allow takes back a conclusion that ignores sessions: of a certificate that has expired and, where the servers do not
// check their list either, of one on the list.
func (a afterlife) allow(e *broker.Evidence, expired bool) {
	if !e.At.Before(a.until) || e.Outcome == broker.OutcomeDead && e.Listed && !a.listed {
		return
	}
	if e.Outcome == broker.OutcomeDead || expired {
		e.Outcome, e.Listed = broker.OutcomeUnknown, false
		e.Answer += "; by the tool's setting peers, servers may resume its sessions without a check until " + a.until.Format(time.RFC3339)
	}
}
